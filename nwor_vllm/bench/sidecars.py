"""What is written beside a record: a page for people, the study's three files, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from nwor_vllm.bench.metrics import BatchResult, output_hash
from nwor_vllm.bench.record import Record, replace_text


def write(record: Record, path: Path, batches: Sequence[BatchResult]) -> None:
    """`x.md`, and in the folder `x/`: config.yaml, metrics.json, responses.jsonl, requests.csv."""
    folder = path.with_suffix("")
    replace_text(path.with_suffix(".md"), page(record))
    replace_text(folder / "config.yaml", yaml.safe_dump(record.cell.model_dump(mode="json"), sort_keys=False))
    rows = _rows(record.cell.draft_length, batches)
    mode = record.summary.per_mode[0] if record.summary else None
    body = {**(mode.model_dump(mode="json", exclude={"outputs_sha256"}) if mode else {}), "per_request": rows}
    replace_text(folder / "metrics.json", json.dumps(body, indent=1, allow_nan=False) + "\n")
    replace_text(folder / "responses.jsonl", "".join(json.dumps(line) + "\n" for line in _responses(batches)))
    replace_text(folder / "requests.csv", _csv(rows))


def _rows(gamma: int, batches: Sequence[BatchResult]) -> list[dict[str, object]]:
    """Empty is unknown: one process has no network to idle on."""
    return [
        {
            "request_id": request.id, "gamma": gamma, "prompt_length": request.prompt_tokens,
            "generated_tokens": len(request.token_ids), "ttft_ms": _ms(request.ttft_s), "tpot_ms": _ms(request.tpot_s),
            "average_acceptance_rate": _ratio(request.accepted, request.drafted),
            "total_network_idle_ms": None, "total_latency_ms": _ms(request.latency_s), "num_rounds": request.rounds,
            "batch": batch.index, "finish_reason": request.finish_reason,
        }
        for batch in batches
        for request in batch.requests
    ]  # fmt: skip


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)


def _responses(batches: Sequence[BatchResult]) -> list[dict[str, object]]:
    return [
        {
            "id": r.id,
            "batch": b.index,
            "response": r.text,
            "token_ids": list(r.token_ids),
            "sha256": output_hash(r.token_ids),
        }
        for b in batches
        for r in b.requests
    ]


def _csv(rows: Sequence[dict[str, object]]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(rows[0]), lineterminator="\n")
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
        f"{cell.engine.drafter or 'no drafter'}.", "",
        "| arm | batch latency s | tokens/s | drafted | accepted | tau | stopped |", "| --- " * 7 + "|",
    ]  # fmt: skip
    for mode in record.summary.per_mode if record.summary else []:
        numbers = (mode.spec_num_draft_tokens, mode.spec_acceptance_ratio, mode.spec_mean_accepted_length)
        cells = [mode.mode, f"{mode.latency_avg_s:.4f}", f"{mode.throughput_tok_s:.1f}"]
        cells += [_text(number) for number in (*numbers, mode.tokens_stopped_by_confidence)]
        lines.append("| " + " | ".join(cells) + " |")
    for ratio in record.comparisons:
        interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
        seen = "" if ratio.mde is None else f", smallest detectable {ratio.mde:.1%}"
        lines += [
            "",
            f"Time against {ratio.against}: x{ratio.ratio:.3f}{interval}, n={ratio.n}{seen}; outputs {ratio.outputs}.",
        ]
    lines += ["", *(f"Note: {flag}." for flag in record.flags)]
    return "\n".join(lines).rstrip() + "\n"


def _text(value: float | int | None) -> str:
    return "unknown" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
