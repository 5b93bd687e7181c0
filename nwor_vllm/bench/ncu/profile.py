"""The Nsight Compute part of a run: profiled in processes of its own, laid beside what our counters and arithmetic say.

Two passes: the kernels that write K/V, which must agree with arithmetic; then every kernel of the same window, because
small writes stay in L2 and reach DRAM during later kernels.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nwor_vllm.bench import arms, provenance
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.metrics import BatchResult, Counters, combine
from nwor_vllm.bench.ncu import expect, probe
from nwor_vllm.bench.ncu.parse import SECTOR_BYTES, Kernel, totals
from nwor_vllm.bench.record import Ncu
from nwor_vllm.errors import CorruptFileError, NworError

TIMEOUT_S = 600.0  # both passes together
LEAST_S = 30.0  # no pass starts with less left
LAUNCHES = 20_000
STORES = ("lts__t_sectors_srcunit_tex_op_write.sum", "lts__t_sectors_op_write.sum")
DRAM = "dram__bytes_write.sum"
FIELDS = ("kernels", "store_bytes", "dram_bytes", "logical_bytes", "analytic_bytes")
DRAFTERS = ("eagle", "eagle3")  # whose rows arithmetic can tell
NOTHING_DRAFTED = Counters(0, 0, 0, 0, (), 0, 0, 0, {})
Bytes = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Profiled:
    """ncu's answer for one cell. `totals` is None wherever nothing was measured."""

    status: str
    reason: str = ""
    kernels: tuple[Kernel, ...] = ()  # that write K/V
    totals: dict[str, float] | None = None  # over the window, or over those kernels where the window's pass failed
    whole: bool = False  # the totals are the window's
    window: Mapping[str, Any] | None = None  # what the profiled process itself counted
    notes: tuple[str, ...] = field(default=())

    @property
    def store_bytes(self) -> float | None:
        sums = totals(self.kernels)
        found = next((sums[name] for name in STORES if name in sums), None)
        return None if found is None else found * SECTOR_BYTES

    def beside_clock(self, cell: Cell, results: Sequence[BatchResult]) -> Ncu:
        """The byte counts side by side; without ncu, those of the clock run."""
        if self.status == "not_requested":
            nothing: dict[str, Any] = dict.fromkeys(FIELDS)
            return Ncu(
                status="not_requested", reason=self.reason, reasons=dict.fromkeys(FIELDS, self.reason), **nothing
            )
        logical, analytic = self.expected() if self.window is not None else clock_bytes(cell, results)
        values: dict[str, Any] = {
            "kernels": len(self.kernels) or None, "store_bytes": self.store_bytes,
            "dram_bytes": (self.totals or {}).get(DRAM) if self.whole else None,
            "logical_bytes": logical, "analytic_bytes": analytic,
        }  # fmt: skip
        why = "; ".join(filter(None, (self.reason, *self.notes))) or "ncu took no such metric"
        reasons = {name: why for name, value in values.items() if value is None}
        status: Any = self.status
        return Ncu(status=status, reason=self.reason, window=self.scope(), **values, reasons=reasons)

    def expected(self) -> Bytes:
        window = self.window or {}
        return window.get("logical_bytes"), window.get("analytic_bytes")

    def scope(self) -> str:
        if self.window is None:
            return "the clock run"
        return "; ".join((str(self.window.get("text", "a window of its own")), *self.notes))


NOT_REQUESTED = Profiled("not_requested", "this run is not profiled")


def clock_bytes(cell: Cell, results: Sequence[BatchResult]) -> Bytes:
    """(counted, expected) bytes of the K/V that target and drafter wrote."""
    drafts = cell.engine.method != "none" and cell.engine.draft_length > 0
    if not drafts:  # such an engine has no counters, and nothing to count but its tokens
        results = [replace(batch, counters=NOTHING_DRAFTED) for batch in results]
    found = [batch.counters for batch in results if batch.counters is not None]
    if len(found) < len(results) or not found:
        return None, None
    counted = combine(found)
    known = (counted.target_kv_bytes_written, counted.draft_kv_bytes_written)
    logical = None if None in known else float(sum(n for n in known if n is not None))
    try:
        return logical, _expected(cell, results, counted)
    except NworError:
        return logical, None


def _expected(cell: Cell, results: Sequence[BatchResult], counted: Counters) -> float | None:
    method = cell.engine.method
    if method not in (*DRAFTERS, "none", "ngram"):
        return None
    seen = expect.steps(results, counted)
    target = expect.kv_shape(Path(provenance.model_path(cell.engine.target)), cell.engine.dtype)
    written = expect.target_rows(seen, counted) * target.bytes_per_token
    if method in DRAFTERS and cell.draft_length:
        own = expect.kv_shape(Path(provenance.model_path(cell.engine.drafter)), cell.engine.dtype)
        # Every step drafts, also the last of a request, whose drafts no counter of verified rounds sees.
        drafted = seen.all * cell.draft_length if is_baseline(cell) else counted.drafted + seen.first
        written += (
            expect.draft_rows(seen, counted, drafted) * replace(own, dtype_bytes=target.dtype_bytes).bytes_per_token
        )
    return float(written)


def is_baseline(cell: Cell) -> bool:
    """Nothing is avoided: stores and arithmetic must agree, or the counters are not what we think."""
    return arms.subject(cell).policy == "fixed" and not cell.threshold


def run(cell: Cell, folder: Path, environ: Mapping[str, str], say: probe.Say, timeout_s: float = TIMEOUT_S) -> Profiled:
    """Profile a cell under ncu, or say why that cannot be."""
    if not cell.ncu:
        return NOT_REQUESTED
    asked = probe.preflight(provenance.gpus(), environ)
    if asked.status != "ok":
        say(f"ncu {asked.status}: {asked.reason}")
        return Profiled(asked.status, asked.reason)
    if cell.engine.tensor_parallel_size > 1:
        say("ncu: profiled at tensor parallel size 1, because kernel replay deadlocks collectives")
    ends = time.monotonic() + timeout_s
    writes = _pass(cell, folder, "kv_writes", probe.KV_KERNELS, timeout_s, environ, say)
    if writes.status != "ok":
        say(f"ncu {writes.status}: {writes.reason}")
        return Profiled(writes.status, writes.reason)
    try:
        window = read_window(folder)
    except CorruptFileError as error:
        return Profiled("failed", str(error))
    left = ends - time.monotonic()
    if left >= LEAST_S:
        everything = _pass(cell, folder, "window", "", left, environ, say)
    else:
        everything = probe.Probe("timeout", f"the pass over the K/V kernels left {max(left, 0):.0f} s")
    return judge(cell, writes.kernels, everything, window)


def _pass(
    cell: Cell, folder: Path, name: str, kernels: str, limit: float, environ: Mapping[str, str], say: probe.Say
) -> probe.Probe:
    report = folder / f"ncu_{name}.ncu-rep"
    say(f"ncu: profiling {cell.id} ({name.replace('_', ' ')}), at most {limit:.0f} s")
    argv = probe.command(report, child(cell, folder, "--profiled"), LAUNCHES, kernels)
    return probe.run(argv, report, folder / f"ncu_{name}.log", limit, environ, say)


def child(cell: Cell, folder: Path, *flags: str) -> list[str]:
    """The process that runs the window, its orders written."""
    folder.mkdir(parents=True, exist_ok=True)
    described, window = folder / "cell.json", folder / "window.json"
    described.write_text(cell.model_dump_json(), encoding="utf-8")
    window.unlink(missing_ok=True)
    return [sys.executable, "-P", "-m", "nwor_vllm.bench.ncu.window", str(described), str(window), *flags]


def read_window(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "window.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"the profiled process left no counts of its own: {error}") from None
    return found


def count(cell: Cell, folder: Path, environ: Mapping[str, str], say: probe.Say, timeout_s: float) -> dict[str, Any]:
    """The same window without ncu: logical and analytic bytes."""
    ended = probe.bounded(child(cell, folder), folder / "window.log", timeout_s, environ, say, what="window")
    if ended.timed_out or ended.code != 0:
        why = f"did not finish in {timeout_s:.0f} s" if ended.timed_out else f"ended with {ended.code}"
        raise NworError(
            f"the counted run {why}: {ended.tail[-1] if ended.tail else ''} (all of it: {folder}/window.log)"
        )
    return read_window(folder)


def judge(cell: Cell, kernels: Sequence[Kernel], everything: probe.Probe, window: Mapping[str, Any]) -> Profiled:
    notes = []
    if everything.status != "ok":
        notes.append(f"DRAM bytes of the K/V kernels alone: the pass over all kernels ended {everything.status}, "
                     f"{everything.reason}")  # fmt: skip
    if cut := max(len(kernels), len(everything.kernels)) >= LAUNCHES:
        notes.append(f"cut at {LAUNCHES} kernel launches, so not held against arithmetic")
    sums = totals(everything.kernels if everything.status == "ok" else kernels)
    found = Profiled("ok", "", tuple(kernels), sums, everything.status == "ok", window, tuple(notes))
    stores, analytic = found.store_bytes, window.get("analytic_bytes")
    if cut or stores is None or not analytic or not is_baseline(cell):
        return found
    problem = expect.contradiction(stores, analytic)
    return replace(found, status="contradiction", reason=problem) if problem else found
