"""`nwor zoo`: the embedded pair and scripted pairs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from nwor_vllm.errors import ConfigError
from nwor_vllm.zoo import chats, store


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="zoo_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="the members of the pair, and where they lie")
    listing.add_argument("--json", action="store_true", help="one JSON object per member")
    where = commands.add_parser("path", help="print a member's folder, verified; builds a widened target if needed")
    names = ", ".join(store.MEMBERS)
    where.add_argument("member", nargs="?", default="target", help=f"one of {names} (default target)")
    ask = commands.add_parser("prompts", help="seeded prompts as JSON lines: id, domain, prompt")
    ask.add_argument("--domain", default="all", help=f"one of {', '.join(chats.DOMAINS)}, or all (default)")
    ask.add_argument("-n", type=int, default=50, help="how many (default 50)")
    ask.add_argument("--seed", type=int, default=1, help="seed (default 1)")
    _configure_build(commands.add_parser("build", help="train the pair from nothing; resumes where it was killed"))
    _configure_script(commands)


def _configure_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder to build in (default: where the pair is read from)")
    parser.add_argument("--steps", type=int, help="steps of the target; the drafters follow in proportion")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--only", help="comma-separated parts: target, eagle, eagle3, draft (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile, where no compiler is")


def _configure_script(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "a pair of any Llama shape whose acceptance is programmed"
    # Its flags live beside its code, which is read only when the command is used.
    if len(sys.argv) > 2 and sys.argv[2] == "script":
        module = importlib.import_module("nwor_vllm.zoo.script_cli")
        module.configure(commands.add_parser("script", help=text))
    else:
        commands.add_parser("script", help=text, add_help=False)


def run(args: argparse.Namespace) -> int:
    if args.zoo_command == "script":
        code: int = importlib.import_module("nwor_vllm.zoo.script_cli").run(args)
        return code
    return {"list": _list, "path": _path, "prompts": _prompts, "build": _build}[args.zoo_command](args)


def _list(args: argparse.Namespace) -> int:
    for member in store.MEMBERS.values():
        folder = str(store.weights_root() / member.name) if member.ffn is None else "built on demand"
        if args.json:
            row = {"name": member.name, "role": member.role, "method": member.method, "folder": folder}
            print(json.dumps(row))
        else:
            print(f"{member.name:<7} {member.role} ({folder})")
    return 0


def _path(args: argparse.Namespace) -> int:
    print(store.path(args.member))
    return 0


def _prompts(args: argparse.Namespace) -> int:
    for row in chats.prompts(args.domain, args.n, args.seed):
        print(json.dumps(row, ensure_ascii=False))
    return 0


def _build(args: argparse.Namespace) -> int:
    from nwor_vllm.zoo.build import PARTS, TARGET_STEPS, BuildPlan, build

    parts = tuple(args.only.split(",")) if args.only else PARTS
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"unknown part {part!r} in --only; valid: {', '.join(PARTS)}")
    plan = BuildPlan(
        out=args.out or store.weights_root(),
        steps=TARGET_STEPS if args.steps is None else args.steps,
        threads=args.threads,
        compile_loss=not args.no_compile,
        only=parts,
    )
    build(plan)
    return 0
