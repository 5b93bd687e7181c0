"""`nwor plan`: what a grid holds, what is done, what is pending and why, how long it will take."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.bench import grid as grids
from nwor_vllm.bench import load, provenance, record
from nwor_vllm.bench.grid import Cell, Grid
from nwor_vllm.errors import ConfigError, CorruptFileError

EMBEDDED = {"target": "zoo:target", "drafter": "zoo:eagle", "tensor_parallel_size": 1, "method": "eagle"}
PUBLISHED = {
    "target": "meta-llama/Llama-3.1-8B-Instruct",
    "drafter": "yuhuili/EAGLE-LLaMA3.1-Instruct-8B",
    "tensor_parallel_size": 2,
    "method": "eagle",
}
METHODS = ("none", "ngram", "eagle", "eagle3", "draft_model", "dflash")


@dataclass(frozen=True, slots=True)
class Planned:
    cell: Cell
    key: str
    path: Path
    state: str  # done, pending, exhausted
    why: str
    attempts: int
    seconds: float | None  # of the last run of these settings

    @property
    def runnable(self) -> bool:
        return self.state == "pending"


def examine(cell: Cell, out: Path, max_attempts: int = record.MAX_ATTEMPTS) -> Planned:
    """Done means valid with the same key, not present."""
    path, key = out / cell.file, provenance.key(cell)
    if not path.exists():
        return Planned(cell, key, path, "pending", "missing", 0, None)
    try:
        old = record.read(path)
    except CorruptFileError as error:
        return Planned(cell, key, path, "pending", f"invalid: {error}", 0, None)
    if old.key != key:
        why = provenance.difference(old.provenance.get("identity", {}), cell, old.cell)
        like = old.status == "done" and old.cell.engine.target == cell.engine.target
        return Planned(cell, key, path, "pending", f"other key: {why}", 0, old.seconds if like else None)
    if old.status == "failed":
        failure = old.failure.message if old.failure else ""
        state = "exhausted" if old.attempts >= max_attempts else "pending"
        return Planned(cell, key, path, state, f"failed {old.attempts}x: {failure[:120]}", old.attempts, None)
    return Planned(cell, key, path, "done", "", old.attempts, old.seconds)


def examine_all(grid: Grid, out: Path, only: str = "", max_attempts: int = record.MAX_ATTEMPTS) -> list[Planned]:
    cells = [cell for cell in grid.cells if only in cell.id]
    if only and not cells:
        raise ConfigError(f"ONLY={only!r} names no run of {grid.name}; a run's file name must contain it")
    return [examine(cell, out, max_attempts) for cell in cells]


def estimate_s(planned: Sequence[Planned]) -> float | None:
    """From past records: seconds a batch token, times what is pending. None without a past."""
    pending = [p for p in planned if p.runnable]
    rates = [p.seconds / _size(p.cell) for p in planned if p.seconds]
    rates = rates or (_rates_beside(pending[0]) if pending else [])
    return statistics.median(rates) * sum(_size(p.cell) for p in pending) if rates else None


def _rates_beside(item: Planned) -> list[float]:
    """Of the same models in other grids' folders."""
    found = []
    for path in sorted(item.path.parents[1].glob("*/*.json")):
        try:
            old = record.read(path)
        except record.UNREADABLE:
            continue
        if old.status == "done" and old.cell.engine.target == item.cell.engine.target:
            found.append(old.seconds / _size(old.cell))
    return found


def _size(cell: Cell) -> int:
    return cell.requests * cell.max_tokens * cell.batches


def configure(parser: argparse.ArgumentParser) -> None:
    add_grid_flags(parser)
    parser.add_argument("--json", action="store_true", help="for tools: .cells[] with id, file, key, state, group")
    parser.add_argument("--tsv", action="store_true", help="for shell: group, state, file, why")
    parser.add_argument(
        "--groups", action="store_true", help="for shell: the engine groups with pending runs, one a line"
    )


def add_grid_flags(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The flags that `plan` and `bench` share. Flag > environment > grid file > default."""
    parser.add_argument(
        "grid", type=Path, metavar="GRID.yaml", nargs="?" if optional else None, help="a grid of sweeps_config/"
    )
    parser.add_argument("--out", type=Path, help="where the records go (default: the grid's own folder)")
    parser.add_argument("--profile", choices=grids.PROFILES, help="PROFILE; default: full with a GPU, else embedded")
    parser.add_argument("--target", help="TARGET_MODEL: folder, hub id or zoo:NAME")
    parser.add_argument("--drafter", help="DRAFT_MODEL: the same")
    parser.add_argument("--method", choices=METHODS, help="kind of drafter (default: eagle)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, help="TENSOR_PARALLEL_SIZE (default 2, or the visible GPUs)"
    )
    parser.add_argument("--dataset", help="JSONL or ShareGPT file instead of the embedded prompts")
    parser.add_argument("--policy", help="what adaptive runs are driven by (default: goodput)")
    parser.add_argument("--batches", type=int, help="measured batches a run")
    parser.add_argument("--references", nargs="+", metavar="ARM", help="arms beside the subject, over the grid's own")
    load.add_flags(parser)
    parser.add_argument("--seeds", type=int, help="NUM_SEEDS: repeat every run with that many seeds")
    parser.add_argument("--only", help="ONLY: runs whose file name contains this")
    parser.add_argument("--retry-failed", action="store_true", help="run what failed too often once more")


def given_flags(args: argparse.Namespace) -> list[str]:
    """What was asked for on the command line, for another command with these flags."""
    known = argparse.ArgumentParser(add_help=False)
    add_grid_flags(known, optional=True)
    given: list[str] = []
    for action in known._actions:
        value = getattr(args, action.dest)
        if not action.option_strings or action.dest == "out" or value == action.default:
            continue
        flag = action.option_strings[0]
        if action.nargs == 0:
            given.append(flag)
        else:
            given += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return given


def cell_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of any run, of a grid or not."""
    named = {name: getattr(args, name) for name in ("policy", "batches", "references")}
    return {name: value for name, value in named.items() if value is not None} | load.settings(args)


def resolve(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Grid, Path]:
    """The grid with every setting decided, and its folder."""
    profile = args.profile or environ.get("PROFILE") or ("full" if provenance.gpus() else "embedded")
    names = {"target": "TARGET_MODEL", "drafter": "DRAFT_MODEL", "tensor_parallel_size": "TENSOR_PARALLEL_SIZE"}
    overrides: dict[str, Any] = dict(EMBEDDED if profile == "embedded" or not provenance.gpus() else PUBLISHED)
    if provenance.gpus() and profile != "embedded":
        overrides["tensor_parallel_size"] = min(2, len(provenance.gpus()))
    for field, variable in names.items():
        value = getattr(args, field) if getattr(args, field) is not None else environ.get(variable) or None
        if value is not None:
            overrides[field] = _whole(variable, value) if field == "tensor_parallel_size" else value
    for field in ("method", "dataset"):
        if getattr(args, field) is not None:
            overrides[field] = getattr(args, field)
    overrides |= cell_flags(args)
    if overrides["method"] in ("none", "ngram"):
        overrides["drafter"] = ""
    seeds = args.seeds if args.seeds is not None else _whole("NUM_SEEDS", environ.get("NUM_SEEDS") or 1)
    args.only = args.only if args.only is not None else environ.get("ONLY", "")
    grid = grids.load(args.grid, profile, overrides, seeds)
    provenance.require_models(grid.cells)
    return grid, args.out or Path(grid.out)


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}; expected a whole number") from None


def run(args: argparse.Namespace) -> int:
    grid, out = resolve(args, os.environ)
    limit = 10**9 if args.retry_failed else record.MAX_ATTEMPTS
    planned = examine_all(grid, out, args.only, limit)
    if args.json:
        print(json.dumps({"grid": grid.name, "out": str(out), "estimate_s": estimate_s(planned),
                          "cells": [_as_json(p) for p in planned]}, indent=1, allow_nan=False))  # fmt: skip
    elif args.groups:
        print("\n".join(dict.fromkeys(p.cell.engine.group for p in planned if p.runnable)))
    elif args.tsv:
        print("\n".join("\t".join((p.cell.engine.group, p.state, p.cell.file, _line(p.why))) for p in planned))
    else:
        _table(grid, out, planned)
    return 0


def _as_json(p: Planned) -> dict[str, Any]:
    return {
        "id": p.cell.id, "file": p.cell.file, "key": p.key, "state": p.state, "why": p.why, "attempts": p.attempts,
        "group": p.cell.engine.group, "panel": p.cell.panel, "arm": p.cell.arm, "headline": p.cell.headline,
        "ncu": p.cell.ncu, "seconds": p.seconds, "cell": p.cell.model_dump(mode="json"),
    }  # fmt: skip


def _line(text: str) -> str:
    return " ".join(text.split())


def _table(grid: Grid, out: Path, planned: Sequence[Planned]) -> None:
    width = max(len(p.cell.file) for p in planned)
    for p in planned:
        star = "*" if p.cell.headline else " "
        print(f"{star} {p.cell.file:<{width}}  {p.cell.arm:<10}  {p.state:<9}  {_line(p.why)}".rstrip())
    pending = sum(p.runnable for p in planned)
    groups = len({p.cell.engine.group for p in planned if p.runnable})
    seconds = estimate_s(planned)
    time = "no estimate yet" if seconds is None else f"about {seconds / 60:.1f} min"
    done = sum(p.state == "done" for p in planned)
    print(
        f"{grid.name} in {out}: {len(planned)} runs, {done} done, {pending} pending in {groups} engine starts, {time}"
    )
