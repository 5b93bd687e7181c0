#!/usr/bin/env python
"""Writes docs/settings.md and docs/cli.md from the settings' own comments and the commands' own flags.

    ./scripts/bootstrap.sh python scripts/make_docs.py

A test compares them with what this would write, and refuses settings and flags that say nothing about themselves.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nwor_vllm.bench.cli import COMMANDS
from nwor_vllm.config import OTHER_VARIABLES, NworConfig
from nwor_vllm.policy import POLICIES

ROOT = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by scripts/make_docs.py: edit the code's comments and help texts, then run it. -->\n"

INTRODUCTION = """\
Given to vLLM as `--additional-config '{"nwor": {"policy": "goodput"}}'` or `LLM(additional_config={...})`; `true`
instead of an object means every default. The same settings as variables: `NWOR_POLICY=goodput`,
`NWOR_EARLY_EXIT__THRESHOLD=0.5` (two underscores descend; values are JSON where they parse). What is given to vLLM
wins over variables; without the key `nwor` the plugin is off. An unknown setting stops the engine.
"""

VARIABLES = {
    "NWOR_DISABLE": "`1` leaves stock vLLM untouched, whatever else is set",
    "NWOR_CONTROL_TOKEN": "the bearer token of the control endpoint, which is not served without one",
    "NWOR_ENV": "for the scripts: `current` (the active environment), `cpu`, `gpu`; empty = look for a GPU",
    "NWOR_ZOO": "a folder that `nwor zoo build` wrote, instead of the embedded pair of the package",
}


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def comments(cls: type[Any]) -> dict[str, str]:
    """What each field's trailing comment says."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = [by_line[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in by_line]
            found[node.target.id] = " ".join(said)
    return found


def settings(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, what it does) of every leaf of a settings tree."""
    said = comments(cls)
    for field in dataclasses.fields(cls):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(default):
            yield from settings(type(default), f"{prefix}{field.name}.")
        else:
            shown = "required" if default is dataclasses.MISSING else repr(default)
            yield f"{prefix}{field.name}", str(field.type), shown, said[field.name]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)]) + "\n"


def coded(rows: Iterator[tuple[str, str, str, str]]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", f"`{kind}`", f"`{default}`", text) for name, kind, default, text in rows]


def settings_page() -> str:
    head = ("setting", "type", "default", "what it does")
    parts = [
        "# Settings\n",
        MADE,
        INTRODUCTION,
        "## The tree\n",
        table(head, coded(settings(NworConfig))),
        "## Other variables\n",
        table(("variable", "what it does"), [(f"`{name}`", VARIABLES[name]) for name in sorted(OTHER_VARIABLES)]),
        "## Parameters of each policy\n",
        "They go into `policy_params`.\n",
    ]
    for name, kind in POLICIES.items():
        rows = coded(settings(kind.params))
        parts += [f"### `{name}`\n", table(head, rows) if rows else "None.\n"]
    return "\n".join(parts)


def parsers(name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A command's parser and those of its subcommands."""
    module_name, text = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"nwor {name}", description=text)
    given, sys.argv = sys.argv, ["nwor", name, "script"]  # `zoo` reads it to leave `script`'s flags unread
    try:
        importlib.import_module(module_name).configure(parser)
    finally:
        sys.argv = given
    waiting = [parser]
    while waiting:
        current = waiting.pop(0)
        yield current.prog, current
        for action in current._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += list(dict.fromkeys(action.choices.values()))


def flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
        if not action.option_strings:
            name = str(value).lower()
        elif action.nargs == 0:
            name = ", ".join(action.option_strings)
        else:
            name = f"{', '.join(action.option_strings)} {value}"
        text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
        yield f"`{name}`", text


def cli_page() -> str:
    parts = [
        "# Commands\n",
        MADE,
        "`nwor COMMAND --help` says the same. A command ends with 0, or with one line on stderr and 1 (something it\n"
        "needs is missing, or it failed) or 2 (what was asked for does not exist).\n",
    ]
    for name, (_, text) in COMMANDS.items():
        for prog, parser in parsers(name):
            shown = text if prog == f"nwor {name}" else parser.description or ""
            rows = list(flags(parser))
            parts.append(f"{'##' if prog == f'nwor {name}' else '###'} `{prog}`\n")
            parts += [f"{shown[0].upper()}{shown[1:]}.\n"] if shown else []
            parts += [table(("flag", "what it does"), rows)] if rows else []
    return "\n".join(parts)


PAGES = {"docs/settings.md": settings_page, "docs/cli.md": cli_page}


def main() -> int:
    for name, page in PAGES.items():
        (ROOT / name).write_text(page())
        print(name, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
