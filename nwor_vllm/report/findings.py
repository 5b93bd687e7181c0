"""From records to findings: each run beside no speculation and fixed draft lengths, held to 5 % over its grid."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nwor_vllm.bench import stats
from nwor_vllm.bench.record import BestFixed, Mode, Ratio, Record, read
from nwor_vllm.errors import CorruptFileError, MissingError

# What a run is held against, in the order of the columns. The first that a record has stands in each.
BASELINES = {
    "no speculation": ("vanilla_engine", "vanilla"),
    "fixed length": ("fixed",),
    "best fixed length": ("best_fixed",),
}


@dataclass(frozen=True, slots=True)
class Against:
    """A run's time over another arm's: below 1 the run was faster."""

    name: str
    n: int
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    mde: float | None
    outputs: str = ""  # identical, near_tie, violation, sampled
    p_holm: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        return stats.verdict(stats.PairedRatio(self.n, self.ratio, self.low, self.high, self.p, self.mde), self.p_holm)

    @property
    def sign(self) -> str:
        """faster, slower, or undecided."""
        return self.verdict if self.verdict in ("faster", "slower") else "undecided"


@dataclass(frozen=True, slots=True)
class Run:
    record: Record
    subject: Mode
    against: dict[str, Against]  # by baseline; one that the run itself is, is absent
    control: Against | None  # A/A

    @property
    def id(self) -> str:
        return self.record.id

    def saved(self, field: str) -> float | None:
        """The share of a count that the fixed draft length of the same record did not save."""
        fixed = (
            next((m for m in self.record.summary.per_mode[1:] if m.mode == "fixed"), None)
            if self.record.summary
            else None
        )
        own, other = getattr(self.subject, field), getattr(fixed, field, None)
        return None if own is None or not other else 1 - own / other


@dataclass(frozen=True, slots=True)
class Findings:
    runs: list[Run]
    failed: list[Record]
    unreadable: list[str]

    @property
    def grids(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.record.grid, []).append(run)
        return found

    def baselines(self, grid: str) -> set[str]:
        """What any run of this grid was held against."""
        return {name for run in self.grids[grid] for name in run.against}


def gather(folders: Iterable[Path]) -> Findings:
    """Every record in these folders and the folders in them, without what stands beside one or was superseded."""
    runs, failed, unreadable = [], [], []
    for folder in folders:
        if not folder.is_dir():
            raise MissingError(f"{folder} is no folder")
        places = [path for pattern in ("*.json", "*/*.json") for path in folder.glob(pattern)]
        for path in sorted(places, key=_natural):
            beside = path.parent.with_name(path.parent.name + ".json").exists()
            if beside or path.parent.name == "superseded" or path.name.startswith("."):
                continue
            try:
                record = read(path)
            except CorruptFileError as error:
                unreadable.append(str(error))
                continue
            if record.status == "done" and record.summary is not None:
                runs.append(_run(record, record.summary.per_mode[0], record.summary.best_fixed))
            else:
                failed.append(record)
    held: list[Run] = []
    for members in Findings(runs, [], []).grids.values():
        held += _held(members)
    return Findings(held, failed, unreadable)


def _natural(path: Path) -> list[tuple[int, str]]:
    """run2 before run10."""
    parts: list[tuple[int, str]] = []
    for part in str(path).replace("_", "/").split("/"):
        digits = "".join(c for c in part if c.isdigit())
        parts.append((int(digits[:9]) if digits else -1, part))
    return parts


def _run(record: Record, subject: Mode, best: BestFixed | None) -> Run:
    found = {ratio.against: _against(ratio) for ratio in record.comparisons}
    if best is not None:
        ties = f", tied with {', '.join(map(str, best.tied_with))}" if best.tied_with else ""
        found["best_fixed"] = Against(
            "best_fixed", best.n, best.ratio, best.low, best.high, best.p, best.mde, note=f"K={best.draft_length}{ties}"
        )
    against = {}
    for baseline, names in BASELINES.items():
        hit = next((found[name] for name in names if name in found), None)
        if hit is not None:
            against[baseline] = hit
    control = next((item for name, item in found.items() if name.partition("@")[0] == "repeat"), None)
    return Run(record, subject, against, control)


def _against(ratio: Ratio) -> Against:
    return Against(
        ratio.against, ratio.n, ratio.ratio, ratio.low, ratio.high, ratio.p, ratio.mde, ratio.verdict,
        note="" if ratio.metric == "latency_s" else "by request",
    )  # fmt: skip


def _held(runs: Sequence[Run]) -> list[Run]:
    """Holm over everything that a grid's table says. A/A arms are the control, not part of the family."""
    known = [(i, name) for i, run in enumerate(runs) for name, found in run.against.items() if found.p is not None]
    adjusted = stats.holm([runs[i].against[name].p or 0.0 for i, name in known])
    held = [replace(run, against=dict(run.against)) for run in runs]
    for (i, name), p in zip(known, adjusted, strict=True):
        held[i].against[name] = replace(held[i].against[name], p_holm=p)
    return held


def sentences(found: Findings) -> list[str]:
    """The findings in words, the unflattering ones as loud as the others."""
    said = []
    for grid, runs in found.grids.items():
        for baseline in BASELINES:
            seen = [run.against[baseline] for run in runs if baseline in run.against]
            if seen:
                said.append(f"{grid}: against {baseline}, {_counted(seen)}")
    controls = [run.control for run in found.runs if run.control is not None and run.control.p is not None]
    if controls:
        alarms = sum((c.p or 0.0) < 1 - stats.CONFIDENCE for c in controls)
        said.append(
            f"A/A: {alarms} of {len(controls)} runs differ from their own repetition at 95 %; chance alone: 5 %"
        )
    said.append(_outputs(found.runs))
    if found.failed or found.unreadable:
        said.append(f"not in the tables: {len(found.failed)} failed runs, {len(found.unreadable)} unreadable records")
    return said


def _counted(seen: Sequence[Against]) -> str:
    signs = Counter(item.sign for item in seen)
    middle = math.exp(sum(math.log(item.ratio) for item in seen) / len(seen))
    text = f"{signs['faster']} of {len(seen)} runs faster, {signs['slower']} slower"
    if signs["undecided"]:
        text += f", {signs['undecided']} not told apart"
    return f"{text}; time x{middle:.3f} in geometric mean"


def _outputs(runs: Sequence[Run]) -> str:
    verdicts: Counter[str] = Counter()
    for run in runs:
        if run.record.cell.temperature == 0:
            verdicts.update(ratio.verdict for ratio in run.record.comparisons)
    if not verdicts:
        return "outputs: no run at temperature 0 has a second arm to compare with"
    parts = ", ".join(f"{verdicts[name]} {name.replace('_', ' ')}" for name in ("identical", "near_tie", "violation"))
    return f"outputs at temperature 0, arm against arm: {parts}"
