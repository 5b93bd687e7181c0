"""`nwor compare A B`: records paired by settings, batches by prompts. Ratio, interval, what could have been seen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nwor_vllm.bench import stats
from nwor_vllm.bench.record import Batch, Mode, Record, read
from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError

METRICS = ("latency", "throughput", "draft_tokens")


@dataclass(frozen=True, slots=True)
class Comparison:
    """`b` against `a`: a ratio below 1 means b has less of the metric."""

    a: str
    b: str
    metric: str
    n: int
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    mde: float | None
    verdict: str
    outputs: str
    aa: bool = False  # a run against its own repetition: the control that has to show nothing


def subject(record: Record, where: str) -> Mode:
    if record.summary is None or record.status != "done":
        raise CorruptFileError(f"{where} is a failed run: {record.failure.message if record.failure else ''}")
    return record.summary.per_mode[0]


def judged_by(a: Record, b: Record, metric: str) -> str:
    """Where requests arrive over time a batch ends with the last arrival, however fast the engine is."""
    arriving = "inf" not in (a.cell.request_rate, b.cell.request_rate)
    return "request_latency" if metric == "latency" and arriving else metric


def values(batch: Batch, metric: str) -> float | None:
    if metric == "latency":
        return batch.seconds
    if metric == "request_latency":
        return batch.request_latency_s
    if metric == "throughput":
        return batch.tokens / batch.seconds
    return None if batch.spec_num_draft_tokens is None else float(batch.spec_num_draft_tokens)


def paired(a: Mode, b: Mode, metric: str = "latency") -> tuple[list[float], list[float]]:
    """The batches both ran on the same prompts. Other prompts are another experiment, not a pair."""
    known = {(batch.index, batch.prompts_sha256): batch for batch in a.batches}
    left, right = [], []
    for batch in b.batches:
        twin = known.get((batch.index, batch.prompts_sha256))
        if twin is None:
            continue
        x, y = values(twin, metric), values(batch, metric)
        if x is not None and y is not None and x > 0 and y > 0:
            left.append(x)
            right.append(y)
    return left, right


def outputs_verdict(a: Mode, b: Mode, temperature: float) -> str:
    """Were the generated tokens the same? Above temperature 0 speculation promises the distribution, not the draw."""
    shared = sorted(a.outputs_sha256.keys() & b.outputs_sha256.keys())
    if not shared:
        return "no shared requests"
    differing = [name for name in shared if a.outputs_sha256[name] != b.outputs_sha256[name]]
    if not differing:
        return "identical"
    text = f"{len(differing)} of {len(shared)} differ, first {differing[0]}"
    return text if temperature == 0 else f"{text} (sampled)"


def judged(a: Record, b: Record) -> str | None:
    """What was said of the outputs when both were arms of one panel: only then was the target asked about ties."""
    if a.panel != b.panel or a.started_at != b.started_at or a.summary is None:
        return None
    first = a.summary.per_mode[0]
    name = f"{first.mode}@{first.threshold}" if first.threshold else first.mode
    return next((ratio.outputs for ratio in b.comparisons if ratio.against == name), None)


def compare_records(pairs: Sequence[tuple[Path, Path]], metric: str) -> list[Comparison]:
    """A row a pair, held to 5 % over all of them (Holm); then the A/A arms of the records, each on its own."""
    drafts: list[tuple[Path, Path, str, stats.PairedRatio, str]] = []
    controls: dict[Path, Comparison] = {}
    for left, right in pairs:
        a, b = read(left), read(right)
        first, second = subject(a, str(left)), subject(b, str(right))
        measured = judged_by(a, b, metric)
        x, y = paired(first, second, measured)
        if not x:
            raise ConfigError(f"{left} and {right} share no batch of the same prompts; they cannot be paired")
        outputs = judged(a, b) or outputs_verdict(first, second, max(a.cell.temperature, b.cell.temperature))
        drafts.append((left, right, measured, stats.paired_ratio(y, x), outputs))
        controls |= {path: row for path, record in ((left, a), (right, b)) if (row := control(path, record, metric))}
    adjusted = iter(stats.holm([draft[3].p for draft in drafts if draft[3].p is not None]))
    rows = []
    for left, right, measured, result, outputs in drafts:
        p_holm = None if result.p is None else next(adjusted)
        rows.append(_row(left, right, measured, result, p_holm, outputs))
    return rows + list(controls.values())


def control(path: Path, record: Record, metric: str) -> Comparison | None:
    """The record's A/A arm, where it has one: the subject against the subject once more."""
    modes = record.summary.per_mode if record.summary else []
    again = next((mode for mode in modes if mode.mode == "repeat"), None)
    if again is None:
        return None
    metric = judged_by(record, record, metric)
    x, y = paired(again, modes[0], metric)
    if not x:
        return None
    result = stats.paired_ratio(y, x)
    outputs = outputs_verdict(again, modes[0], record.cell.temperature)
    return replace(_row(path, path, metric, result, result.p, outputs), aa=True)


def _row(
    left: Path, right: Path, metric: str, result: stats.PairedRatio, p_adjusted: float | None, outputs: str
) -> Comparison:
    said = stats.verdict(result, p_adjusted)
    if metric == "throughput":
        said = {"faster": "slower", "slower": "faster"}.get(said, said)
    elif metric == "draft_tokens":
        said = {"faster": "fewer", "slower": "more"}.get(said, said)
    return Comparison(str(left), str(right), metric, **asdict(result), p_holm=p_adjusted, verdict=said, outputs=outputs)


def find_pairs(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """Two records, or two folders whose records pair by settings and dataset (`config_key`)."""
    for path in (a, b):
        if not path.exists():
            raise MissingError(f"{path} does not exist")
    if a.is_dir() != b.is_dir():
        raise ConfigError(f"{a} and {b}: expected two records or two folders")
    if not a.is_dir():
        return [(a, b)]
    left, right = _by_settings(a), _by_settings(b)
    shared = [key for key in left if key in right]
    if not shared:
        raise ConfigError(f"{a} and {b} share no finished run of the same settings")
    return [(left[key], right[key]) for key in shared]


def _by_settings(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            record = read(path)
        except CorruptFileError:
            continue  # plan calls it invalid; other JSON may lie here too
        if record.status == "done":
            found[f"{path.relative_to(folder).parent}/{record.config_key}"] = path
    return found


def adaptive_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every `*_adaptive0*.json` with its `*_adaptive1*.json`."""
    pairs = [
        (p, p.with_name(p.name.replace("_adaptive0", "_adaptive1"))) for p in sorted(folder.glob("*_adaptive0*.json"))
    ]
    found = [(a, b) for a, b in pairs if b.exists()]
    if not found:
        raise MissingError(f"{folder} holds no pair of *_adaptive0.json and *_adaptive1.json")
    return found


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="a record, or a folder of records: the baseline")
    parser.add_argument("b", type=Path, nargs="?", help="what is compared with it; left out: the adaptive pairs in A")
    parser.add_argument("--metric", choices=METRICS, default="latency", help="what is compared (default latency)")
    parser.add_argument("--json", action="store_true", help="for tools: one object")


def run(args: argparse.Namespace) -> int:
    pairs = find_pairs(args.a, args.b) if args.b is not None else adaptive_pairs(args.a)
    if args.a.is_dir():
        pairs = [pair for pair in pairs if _usable(pair)]
    rows = compare_records(pairs, args.metric)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False))
        return 0
    for row in rows:
        print(sentence(row))
    return 0


def _usable(pair: tuple[Path, Path]) -> bool:
    """A failed run leaves its pair out of a folder's comparison, and says so."""
    try:
        for path in pair:
            subject(read(path), str(path))
    except CorruptFileError as error:
        print(f"nwor: left out: {error}", file=sys.stderr)
        return False
    return True


def sentence(row: Comparison) -> str:
    a, b = Path(row.a), Path(row.b)
    name = b.stem if a.stem == b.stem else f"{b.stem} against {a.stem}"
    if row.aa:
        name = f"A/A {b.stem}"
    if row.low is None or row.high is None or row.mde is None:
        return f"{name}: {row.metric} x{row.ratio:.3f}, {row.verdict}; outputs {row.outputs}"
    text = (
        f"{name}: {row.metric} x{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}], n={row.n}, "
        f"smallest detectable {row.mde:.1%}: {row.verdict}; outputs {row.outputs}"
    )
    if row.aa and row.p is not None and row.p < 1 - stats.CONFIDENCE:
        text += " - a run differs from its own repetition: trust no difference of this size beside it"
    return text
