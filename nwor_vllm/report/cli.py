"""`nwor report`: the findings on the terminal, and all of it as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from nwor_vllm.bench.record import replace_text
from nwor_vllm.errors import MissingError
from nwor_vllm.report import page
from nwor_vllm.report.findings import BASELINES, Findings, Run, gather, sentences


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="records to report on (default: sweeps)"
    )
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first folder)")
    parser.add_argument("--title", default="Elastic speculative decoding: what the runs show", help="of the page")


def run(args: argparse.Namespace) -> int:
    folders: list[Path] = args.folders or [Path("sweeps")]
    found = gather(folders)
    if not (found.runs or found.failed or found.unreadable):
        raise MissingError(f"no record in {', '.join(map(str, folders))}; run ./run_all_experiments.sh first")
    output: Path = args.output or folders[0] / "report.html"
    replace_text(output, page.render(found, args.title, datetime.now()))
    print(text(found))
    print(f"\nreport: {output.resolve()}")
    return 0


def text(found: Findings) -> str:
    lines = []
    for grid, runs in found.grids.items():
        lines += ["", f"{grid}: time over the baseline's, below 1 is faster; * headline", *_table(runs)]
    lines += ["", "Findings", *(f"- {line}" for line in sentences(found))]
    lines += [
        f"- failed: {record.id}: {record.failure.message[:160] if record.failure else ''}" for record in found.failed
    ]
    return "\n".join(lines).lstrip("\n")


def _table(runs: Sequence[Run]) -> list[str]:
    rows = [["  run", "arm", "s a batch", *(f"against {name}" for name in BASELINES), "outputs"]]
    for run in runs:
        outputs = ", ".join(dict.fromkeys(ratio.verdict.replace("_", " ") for ratio in run.record.comparisons))
        rows.append([
            ("* " if run.record.headline else "  ") + run.id, run.subject.mode, f"{run.subject.latency_avg_s:.3f}",
            *(_cell(run, name) for name in BASELINES), outputs,
        ])  # fmt: skip
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in filled}
    return ["  ".join(row[i].ljust(widths[i]) for i in filled).rstrip() for row in rows]


def _cell(run: Run, name: str) -> str:
    item = run.against.get(name)
    if item is None:
        return ""
    said = item.verdict.replace("no difference larger than ", "+-")
    return f"{page.cell(item)} {said}"
