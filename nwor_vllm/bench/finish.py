"""From a panel's results to its records: summaries, paired comparisons, verdicts on outputs, files."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nwor_vllm.bench import arms, metrics, outputs, provenance, record, sidecars, stats
from nwor_vllm.bench.arms import Arm
from nwor_vllm.bench.failures import explain
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.metrics import BatchResult, judged_by
from nwor_vllm.bench.ncu.profile import NOT_REQUESTED, Profiled
from nwor_vllm.bench.plan import Planned
from nwor_vllm.bench.session import Driver, Engines, Panel, Session
from nwor_vllm.bench.workload import Prompt

INTERVAL = ("low", "high", "p", "mde")
Results = Mapping[Arm, Sequence[BatchResult]]


def finish(
    panel: Panel, batches: Sequence[Sequence[Prompt]], engines: Engines, session: Session, started: float,
    probes: Mapping[str, Profiled],
) -> None:  # fmt: skip
    judging = engines.of(arms.subject(panel.cell))
    peak, why = judging.peak_memory_bytes()
    compared: dict[str, list[record.Ratio]] = {
        item.cell.id: ratios(item.cell, panel, batches, judging) for item in panel.planned
    }
    for item in panel.planned:
        listed = arms.beside(item.cell, list(panel.results))
        modes = []
        for i, arm in enumerate(listed):
            results, role = panel.results[arm], "reference" if i else "subject"
            profiled = NOT_REQUESTED if i else probes[item.cell.id]
            ncu = profiled.beside_clock(item.cell, results)
            modes.append(metrics.summarise(arm.label(role), results, item.cell.slo, ncu, profiled.totals))
        best = best_fixed(item.cell, panel.results)
        reasons = {"failure": "the run is done"} | ({"peak_memory_bytes": why} if peak is None else {})
        share = (time.time() - started) / len(panel.planned)
        done = _base(item, session, started, share) | {
            "status": "done", "peak_memory_bytes": peak, "comparisons": compared[item.cell.id], "failure": None,
            "summary": record.Summary(per_mode=modes, best_fixed=best, reasons=_not_searched(item.cell, best)),
            "flags": panel.flags + differing(compared[item.cell.id]), "warmup": panel.warmup, "reasons": reasons,
        }  # fmt: skip
        finished = record.Record(**done)
        # The record comes last: it is what says that all of this is there.
        own = arms.beside(item.cell, [])
        sidecars.write(finished, item.path, [(arm, panel.results[arm]) for arm in own])
        save(finished, item.path)
        stopped = modes[0].tokens_stopped_by_confidence
        if stopped is not None and item.cell.threshold:
            session.say(f"Confidence early exit stats: {stopped} tokens stopped ({item.cell.id})")
        if best is not None:
            session.say(f"best fixed draft length {best.draft_length}: time against it x{best.ratio:.3f}")
        session.say(f"done {item.cell.file}")


def differing(compared: Sequence[record.Ratio]) -> list[str]:
    """At temperature 0 every arm has to write the same tokens; where one did not, the reader is told."""
    return [
        f"outputs against {c.against} at temperature 0: {c.outputs}"
        for c in compared
        if c.verdict in ("near_tie", "violation")
    ]


def ratios(cell: Cell, panel: Panel, batches: Sequence[Sequence[Prompt]], judging: Driver) -> list[record.Ratio]:
    """The subject against every other arm, batch by batch on the same prompts."""
    own, *others = arms.beside(cell, list(panel.results))
    subject = panel.results[own]
    tolerance = outputs.NEAR_TIE[judging.dtype()] if cell.temperature == 0 else None

    def score(found: Sequence[outputs.Difference]) -> list[dict[int, float]]:
        texts = [(panel.prompt(batches, item), item.shared) for item in found]
        judging.switch(Arm("vanilla", "off", 0, 0.0).setting())
        return judging.top_logprobs(texts, cell)

    found = []
    for other in others:
        verdict = outputs.judge(subject, panel.results[other], tolerance, score)
        found.append(
            record.Ratio(
                against=other.name(cell), metric=judged_by(cell), **_paired(cell, subject, panel.results[other]),
                verdict=verdict.kind, outputs=verdict.text, divergences=list(verdict.divergences),
            )
        )  # fmt: skip
    return found


def _paired(cell: Cell, a: Sequence[BatchResult], b: Sequence[BatchResult]) -> dict[str, Any]:
    metric = judged_by(cell)
    result = stats.paired_ratio([batch.time(metric) for batch in a], [batch.time(metric) for batch in b])
    reasons = {} if result.low is not None else dict.fromkeys(INTERVAL, "one batch has no interval")
    return {**asdict(result), "reasons": reasons}


def best_fixed(cell: Cell, results: Results) -> record.BestFixed | None:
    """The best in hindsight of the fixed lengths, where they were searched."""
    if "best_fixed" not in cell.references:
        return None
    lengths = {arm.draft_length: found for arm, found in results.items() if arm.mode == "fixed"}
    if not lengths:
        return None
    metric = judged_by(cell)
    means = {k: sum(b.time(metric) for b in found) / len(found) for k, found in sorted(lengths.items())}
    best = min(means, key=means.__getitem__)
    tied = []
    for k, found in sorted(lengths.items()):
        against = _paired(cell, found, lengths[best])
        if k != best and (against["low"] is None or against["low"] <= 1 <= against["high"]):
            tied.append(k)
    return record.BestFixed(
        draft_length=best, metric=metric, candidates={str(k): mean for k, mean in means.items()}, tied_with=tied,
        **_paired(cell, results[arms.subject(cell)], lengths[best]),
    )  # fmt: skip


def _not_searched(cell: Cell, best: record.BestFixed | None) -> dict[str, str]:
    if best is not None:
        return {}
    asked = "best_fixed" in cell.references
    return {"best_fixed": "this run does not speculate" if asked else "not searched: add best_fixed to references"}


def fail(panel: Panel, error: Exception, session: Session, started: float) -> list[Planned]:
    failure = explain(error)
    session.say(f"FAILED: {failure.exception}: {failure.message}")
    session.say(f"what to do: {failure.advice}")
    unknown: dict[str, Any] = dict.fromkeys(("summary", "peak_memory_bytes", "warmup"))
    for item in panel.planned:
        base = _base(item, session, started, time.time() - started)
        reasons = dict.fromkeys(unknown, "the run failed")
        save(record.Record(**base, **unknown, status="failed", failure=failure, reasons=reasons), item.path)
    return list(panel.planned)


def _base(item: Planned, session: Session, started: float, seconds: float) -> dict[str, Any]:
    cell = item.cell
    return {
        "grid": cell.grid, "id": cell.id, "file": cell.file, "key": item.key, "panel": cell.panel,
        "config_key": provenance.config_key(cell), "headline": cell.headline, "attempts": item.attempts + 1,
        "started_at": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"), "seconds": seconds,
        "cell": cell, "provenance": provenance.describe(cell, session.environ),
    }  # fmt: skip


def save(new: record.Record, path: Path) -> None:
    """A finished record of other settings is set aside, never overwritten: it was measured."""
    try:
        old = record.read(path)
    except record.UNREADABLE:
        old = None
    if old is not None and old.status == "done" and old.key != new.key:
        aside = path.parent / "superseded" / f"{path.stem}.{old.key}.json"
        aside.parent.mkdir(exist_ok=True)
        os.replace(path, aside)
    record.write(new, path)
