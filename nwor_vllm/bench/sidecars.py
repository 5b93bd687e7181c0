"""What is written beside a record: a page for people, the study's three files, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from nwor_vllm.bench.arms import Arm
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.metrics import BatchResult, RequestResult, output_hash
from nwor_vllm.bench.record import Record, replace_text

Row = Mapping[str, object]
Measured = Sequence[tuple[Arm, Sequence[BatchResult]]]  # the subject first
SUMMARY = {  # column of summary.csv -> the column of requests.csv that it is the mean of
    "avg_prompt_length": "prompt_length", "avg_generated_tokens": "generated_tokens", "avg_ttft_ms": "ttft_ms",
    "avg_tpot_ms": "tpot_ms", "avg_acceptance_rate": "average_acceptance_rate",
    "avg_network_idle_ms": "total_network_idle_ms", "avg_latency_ms": "total_latency_ms", "avg_rounds": "num_rounds",
}  # fmt: skip
TABLE = {  # heading and unit in the console's table, and the column of summary.csv
    "Avg TTFT": ("avg_ttft_ms", 1.0, "ms"), "Avg TPOT": ("avg_tpot_ms", 1.0, "ms"),
    "Avg Accept": ("avg_acceptance_rate", 100.0, "%"), "Avg NetIdle": ("avg_network_idle_ms", 1.0, "ms"),
    "Avg Latency": ("avg_latency_ms", 1.0, "ms"),
}  # fmt: skip
METRICS = {"latency_s": "Time", "request_latency_s": "Latency of requests"}
PER_ROUND = ("request_id", "gamma", "batch", "mode", "round", "verified", "accepted", "acceptance_rate")


def write(record: Record, path: Path, measured: Measured) -> None:
    """`x.md`, and in the folder `x/`: the subject's config.yaml, metrics.json, responses.jsonl; every arm's CSV."""
    folder = path.with_suffix("")
    rows = [row for arm, batches in measured for row in _requests(arm, batches)]
    subject = measured[0][1]
    mode = record.summary.per_mode[0] if record.summary else None
    body = {
        **(mode.model_dump(mode="json", exclude={"outputs_sha256"}) if mode else {}),
        "per_request": rows[: sum(len(batch.requests) for batch in subject)],
    }
    replace_text(path.with_suffix(".md"), page(record))
    replace_text(folder / "config.yaml", yaml.safe_dump(record.cell.model_dump(mode="json"), sort_keys=False))
    replace_text(folder / "metrics.json", json.dumps(body, indent=1, allow_nan=False) + "\n")
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in _responses(subject))
    replace_text(folder / "responses.jsonl", lines)
    replace_text(folder / "requests.csv", _csv(rows, list(rows[0])))
    rounds = [row for arm, batches in measured for row in _rounds(arm, batches)]
    replace_text(folder / "per_round.csv", _csv(rounds, PER_ROUND))
    means = summary(rows)
    replace_text(folder / "summary.csv", _csv(means, list(means[0])))


def _requests(arm: Arm, batches: Sequence[BatchResult]) -> list[Row]:
    """Null, in CSV empty, is unknown: one process has no network to idle on."""
    return [
        {
            "request_id": r.id, "gamma": arm.draft_length, "prompt_length": r.prompt_tokens,
            "generated_tokens": len(r.token_ids), "ttft_ms": _ms(r.ttft_s), "tpot_ms": _ms(r.tpot_s),
            "average_acceptance_rate": acceptance(r), "total_network_idle_ms": None,
            "total_latency_ms": _ms(r.latency_s), "num_rounds": r.rounds, "batch": batch.index, "mode": arm.mode,
            "threshold": arm.threshold, "finish_reason": r.finish_reason, "arrival_ms": _ms(r.arrival_s),
            "queue_ms": _ms(r.queue_s), "drafted": r.drafted, "accepted": r.accepted,
            "tokens_per_s": len(r.token_ids) / r.latency_s if r.latency_s else None,
        }
        for batch in batches
        for r in batch.requests
    ]  # fmt: skip


def acceptance(request: RequestResult) -> float | None:
    """The mean over rounds of the fraction of verified draft tokens that was accepted."""
    shares = [accepted / verified for verified, accepted in request.per_round or () if verified]
    return sum(shares) / len(shares) if shares else None


def _rounds(arm: Arm, batches: Sequence[BatchResult]) -> list[Row]:
    return [
        dict(zip(PER_ROUND, (r.id, arm.draft_length, batch.index, arm.mode, number, verified, accepted,
                             accepted / verified if verified else None), strict=True))
        for batch in batches
        for r in batch.requests
        for number, (verified, accepted) in enumerate(r.per_round or (), 1)
    ]  # fmt: skip


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row an arm, in the order they were measured: means over its requests."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["gamma"], row["threshold"]), []).append(row)
    found: list[Row] = []
    for (mode, gamma, threshold), members in groups.items():
        means = {name: _mean([row[column] for row in members]) for name, column in SUMMARY.items()}
        found.append({"mode": mode, "gamma": gamma, "threshold": threshold, "requests": len(members), **means})
    return found


def _mean(values: Sequence[object]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float)]
    return sum(known) / len(known) if known else None


def read_summary(path: Path) -> list[Row]:
    """Of the record at `path`, as `summary` made it."""
    with (path.with_suffix("") / "summary.csv").open(encoding="utf-8", newline="") as file:
        return [
            {**row, **{name: float(row[name]) if row[name] else None for name in SUMMARY}}
            for row in csv.DictReader(file)
        ]


def table(means: Sequence[Row]) -> str:
    """The same for the console, by draft length."""
    width = 90
    lines = ["=" * width, "BENCHMARK SUMMARY", "=" * width]
    lines += [f"{'Gamma':>6}{'Reqs':>7}" + "".join(f"{name:>14}" for name in TABLE) + "  Arm", "-" * width]
    for row in sorted(means, key=lambda row: int(str(row["gamma"]))):
        shown = []
        for column, scale, unit in TABLE.values():
            value = row[column]
            shown.append(f"{value * scale:.2f}{unit}" if isinstance(value, float) else "unknown")
        lines.append(
            f"{row['gamma']!s:>6}{row['requests']!s:>7}" + "".join(f"{x:>14}" for x in shown) + f"  {row['mode']}"
        )
    return "\n".join([*lines, "=" * width])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)


def _responses(batches: Sequence[BatchResult]) -> list[Row]:
    return [
        {
            "id": r.id, "batch": b.index, "response": r.text, "token_ids": list(r.token_ids),
            "sha256": output_hash(r.token_ids),
        }
        for b in batches
        for r in b.requests
    ]  # fmt: skip


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def page(record: Record) -> str:
    """The record in words and one table."""
    cell = record.cell
    lines = [
        f"# {record.id}", "",
        f"{cell.requests} requests a batch, {cell.max_tokens} tokens each, temperature {cell.temperature}, "
        f"draft length {cell.draft_length}, {cell.batches} batches, {cell.engine.target} with "
        f"{cell.engine.drafter or 'no drafter'}."
        + _load(cell), "",
        "| arm | batch s | request s | tokens/s | objectives met | drafted | accepted | tau | stopped |",
        "| --- " * 9 + "|",
    ]  # fmt: skip
    for mode in record.summary.per_mode if record.summary else []:
        numbers = (mode.spec_num_draft_tokens, mode.spec_acceptance_ratio, mode.spec_mean_accepted_length)
        name = f"{mode.mode} K={mode.draft_length}" if mode.mode == "fixed" else mode.mode
        cells = [name, f"{mode.latency_avg_s:.4f}", _text(mode.request_latency_s.mean), f"{mode.throughput_tok_s:.1f}"]
        cells += [_text(number) for number in (mode.slo_met_share, *numbers, mode.tokens_stopped_by_confidence)]
        lines.append("| " + " | ".join(cells) + " |")
    for ratio in record.comparisons:
        interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
        seen = "" if ratio.mde is None else f", smallest detectable {ratio.mde:.1%}"
        lines += [
            "",
            f"{METRICS[ratio.metric]} against {ratio.against}: x{ratio.ratio:.3f}{interval}, n={ratio.n}{seen}; "
            f"outputs {ratio.outputs}.",
        ]
    best = record.summary.best_fixed if record.summary else None
    if best is not None:
        ties = f", not told from {', '.join(map(str, best.tied_with))}" if best.tied_with else ""
        lines += [
            "",
            f"Best fixed draft length in hindsight: {best.draft_length}{ties}; time against it x{best.ratio:.3f}.",
        ]
    lines += ["", *(f"Note: {flag}." for flag in record.flags)]
    return "\n".join(lines).rstrip() + "\n"


def _load(cell: Cell) -> str:
    words = []
    if cell.request_rate != "inf":
        words.append(f"{cell.request_rate} requests a second arrive (burstiness {cell.burstiness})")
    if cell.max_concurrency is not None:
        words.append(f"at most {cell.max_concurrency} requests are in flight")
    return " " + "; ".join(words).capitalize() + "." if words else ""


def _text(value: float | int | None) -> str:
    return "unknown" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
