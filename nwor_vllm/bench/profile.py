"""`nwor profile`: one run of a grid under Nsight Compute; with --cost, what a step of this engine costs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nwor_vllm.bench import cost_profile, plan, provenance, record
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.ncu import profile
from nwor_vllm.bench.ncu.expect import ContradictionError
from nwor_vllm.bench.ncu.parse import SECTOR_BYTES, Kernel, totals
from nwor_vllm.errors import ConfigError

ROWS = (
    ("analytic_bytes", "expected", "by the model's shape"),
    ("logical_bytes", "counted", "by our counters"),
    ("store_bytes", "stored", "by the kernels that write K/V, into L2"),
    ("dram_bytes", "DRAM", "written in the whole window, by every kernel"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    plan.add_grid_flags(parser, optional=True)
    parser.add_argument("--cost", action="store_true", help="measure step times by batch and draft length instead")
    parser.add_argument("--output", type=Path, help="the file for the answer as JSON")
    parser.add_argument("--timeout-s", type=float, default=profile.TIMEOUT_S, help="for all of it (default 600)")
    cost_profile.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.cost:
        return cost_profile.run(args)
    cell, folder = _cell(args)
    answer = measure(cell, folder / "profile" / cell.id, args.timeout_s)
    if args.output is not None:
        record.replace_text(args.output, json.dumps(answer, indent=1, allow_nan=False) + "\n")
    print(page(answer))
    if answer["status"] == "contradiction":
        raise ContradictionError(answer["reason"])
    return 0 if answer["status"] in ("ok", "unavailable") else 1


def _cell(args: argparse.Namespace) -> tuple[Cell, Path]:
    if args.grid is None:
        raise ConfigError("name a GRID.yaml and one of its runs with --only, or --cost")
    if not args.timeout_s > 0:
        raise ConfigError(f"--timeout-s is {args.timeout_s}; expected seconds above 0")
    grid, out = plan.resolve(args, os.environ)
    cells = [cell for cell in grid.cells if args.only in cell.id]
    if len(cells) != 1:
        names = ", ".join(cell.id for cell in (cells or grid.cells))
        raise ConfigError(f"--only {args.only!r} names {len(cells)} runs of {grid.name}; choose one of {names}")
    return cells[0].model_copy(update={"ncu": True}), out


def measure(cell: Cell, folder: Path, timeout_s: float) -> dict[str, Any]:
    """What a grid's profiled run does, and without ncu the same window counted."""
    found = profile.run(cell, folder, os.environ, _say, timeout_s)
    window = found.window
    if window is None:
        window = profile.count(cell, folder, os.environ, _say, timeout_s)
    beside = replace(found, window=window).beside_clock(cell, ())
    return {
        "id": cell.id, "arm": cell.arm, "status": found.status, "reason": found.reason,
        "baseline": profile.is_baseline(cell), "window": beside.window,
        **{name: getattr(beside, name) for name, _, _ in ROWS}, "reasons": beside.reasons,
        "kernels": by_name(found.kernels), "ncu_metrics": found.totals, "counters": window.get("counters"),
        "hardware": provenance.hardware(), "versions": provenance.versions(),
    }  # fmt: skip


def by_name(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name, []).append(kernel)
    return [{"name": name, "launches": len(found), **totals(found)} for name, found in sorted(groups.items())]


def page(answer: dict[str, Any]) -> str:
    lines = [
        f"{answer['id']} ({answer['arm']}): ncu {answer['status']}"
        + (": " if answer["reason"] else "")
        + answer["reason"]
    ]
    lines.append(f"bytes of K/V written, {answer['window']}:")
    for name, word, meaning in ROWS:
        value = answer[name]
        shown = (
            f"{'unknown':>16}  {answer['reasons'].get(name, '')}" if value is None else f"{value:>16,.0f}  {meaning}"
        )
        lines.append(f"  {word:<9}{shown}")
    for kernel in answer["kernels"]:
        stored = next((kernel[name] * SECTOR_BYTES for name in profile.STORES if name in kernel), None)
        text = "stores unknown" if stored is None else f"{stored:,.0f} bytes stored"
        lines.append(f"  {kernel['name']}: {kernel['launches']} launches, {text}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
