"""`nwor zoo script`: write a scripted pair and say how to serve it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from nwor_vllm.zoo.script_marks import parse_class
from nwor_vllm.zoo.script_shape import NAMED, shape_like
from nwor_vllm.zoo.scripted import ScriptedPair, write_scripted

WIDTHS = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "head_dim")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="the directory to make")
    parser.add_argument("--like", help=f"a named shape: {', '.join(NAMED)}")
    for width in WIDTHS:
        parser.add_argument(f"--{width.replace('_', '-')}", type=int, help="part of the shape; changes --like's")
    parser.add_argument(
        "--accept",
        action="append",
        required=True,
        metavar="[NAME=]P1,P2,...[@TOKENS][/...]",
        help="a class of prompts by the probability that draft position 1, 2, ... is accepted once reached (the last "
        "value holds for later ones); name=0.9@64/0.3@64 changes after 64 tokens, and back; repeat for more classes",
    )
    parser.add_argument("--seed", type=int, default=0, help="another draw of the same programme (0)")
    parser.add_argument(
        "--doubt-confidence", type=float, default=0.4, help="largest draft probability where the drafter errs (0.4)"
    )
    parser.add_argument(
        "--blur", type=float, default=0.0, help="share of drafts whose confidence says the opposite (0)"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--weights", action="store_true", default=None, help="write safetensors (default up to 1 GiB)")
    kind.add_argument(
        "--config-only", dest="weights", action="store_false", default=None, help="leave the weights to the load format"
    )


def run(args: argparse.Namespace) -> int:
    pair = write_scripted(
        args.out,
        shape_like(args.like, {width: getattr(args, width) for width in WIDTHS}),
        [parse_class(text, index) for index, text in enumerate(args.accept)],
        seed=args.seed,
        doubt_confidence=args.doubt_confidence,
        blur=args.blur,
        weights=args.weights,
    )
    print(_summary(pair))
    return 0


def _summary(pair: ScriptedPair) -> str:
    widths = " ".join(f"{name}={value}" for name, value in asdict(pair.shape).items())
    lines = [f"shape     {widths} ({pair.shape.parameters() / 1e6:,.1f} M parameters)"]
    for ring in pair.rings:
        regimes = " / ".join(
            ",".join(f"{value:g}" for value in regime.accept) + (f" for {regime.tokens}" if regime.tokens else "")
            for regime in ring.spec.regimes
        )
        lines.append(f"class     {ring.spec.name}: {regimes}; tokens {ring.start}..{ring.start + ring.size - 1}")
    lines += [f"target    {pair.target}", f"drafter   {pair.drafter}", f"prompts   {pair.path / 'prompts.jsonl'}"]
    if not pair.weights:
        lines.append(
            "load with --load-format scripted --worker-extension-cls nwor_vllm.zoo.script_loader.ScriptedWorker"
        )
    return "\n".join(lines)
