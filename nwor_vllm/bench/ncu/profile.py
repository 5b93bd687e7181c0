"""The Nsight Compute part of a run: profiled in a process of its own, laid beside what the clock run counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.bench import provenance
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.metrics import BatchResult, kv_rows
from nwor_vllm.bench.ncu import probe
from nwor_vllm.bench.ncu.expect import contradiction, kv_shape
from nwor_vllm.bench.ncu.parse import SECTOR_BYTES, totals
from nwor_vllm.bench.record import Ncu
from nwor_vllm.errors import NworError

TIMEOUT_S = 600.0
LAUNCHES = 400
STORES = "lts__t_sectors_op_write.sum"
DRAM = "dram__bytes_write.sum"
FIELDS = ("kernels", "store_bytes", "dram_bytes", "logical_bytes", "analytic_bytes")


@dataclass(frozen=True, slots=True)
class Profiled:
    """ncu's answer for one cell. `totals` is None wherever nothing was measured."""

    status: str
    reason: str = ""
    totals: dict[str, float] | None = None
    kernels: int | None = None
    window: Mapping[str, Any] | None = None  # what the profiled process itself counted

    def beside_clock(self, cell: Cell, results: Sequence[BatchResult]) -> Ncu:
        """The byte counts side by side; without ncu, those of the clock run."""
        if self.status == "not_requested":
            nothing: dict[str, Any] = dict.fromkeys(FIELDS)
            return Ncu(
                status="not_requested", reason=self.reason, reasons=dict.fromkeys(FIELDS, self.reason), **nothing
            )
        logical, analytic = self._window() if self.window is not None else clock_bytes(cell, results)
        store = self.totals.get(STORES) if self.totals else None
        values: dict[str, Any] = {
            "kernels": self.kernels, "store_bytes": None if store is None else store * SECTOR_BYTES,
            "dram_bytes": self.totals.get(DRAM) if self.totals else None,
            "logical_bytes": logical, "analytic_bytes": analytic,
        }  # fmt: skip
        why = self.reason or "ncu took no such metric"
        reasons = {name: why for name, value in values.items() if value is None}
        status: Any = self.status
        return Ncu(status=status, reason=self.reason, window=self._text(), **values, reasons=reasons)

    def _window(self) -> tuple[float | None, float | None]:
        window = self.window or {}
        return window.get("logical_bytes"), window.get("analytic_bytes")

    def _text(self) -> str:
        return "the clock run" if self.window is None else f"{LAUNCHES} kernel launches at tensor parallel size 1"


NOT_REQUESTED = Profiled("not_requested", "this run is not profiled")


def clock_bytes(cell: Cell, results: Sequence[BatchResult]) -> tuple[float | None, float | None]:
    """(counted, expected) bytes of the target's K/V writes in the clock run."""
    counted = [batch.counters.target_kv_bytes_written if batch.counters else None for batch in results]
    logical = None if None in counted else float(sum(n for n in counted if n is not None))
    rows = kv_rows(results)
    dtype = cell.engine.dtype
    try:
        shape = kv_shape(Path(provenance.model_path(cell.engine.target)), dtype)
    except NworError:
        return logical, None
    return logical, None if rows is None else float(rows * shape.bytes_per_token)


def run(cell: Cell, folder: Path, environ: Mapping[str, str], say: Any, timeout_s: float = TIMEOUT_S) -> Profiled:
    """Profile a cell under ncu, or say why that cannot be."""
    if not cell.ncu:
        return NOT_REQUESTED
    asked = probe.preflight(provenance.gpus(), environ)
    if asked.status != "ok":
        say(f"ncu {asked.status}: {asked.reason}")
        return Profiled(asked.status, asked.reason)
    folder.mkdir(parents=True, exist_ok=True)
    described, report, window = folder / "cell.json", folder / "ncu.ncu-rep", folder / "window.json"
    described.write_text(cell.model_dump_json(), encoding="utf-8")
    window.unlink(missing_ok=True)
    child = [sys.executable, "-m", "nwor_vllm.bench.ncu.window", str(described), str(window)]
    say(f"ncu: profiling {cell.id}, at most {timeout_s:.0f} s")
    found = probe.run(probe.command(report, child, LAUNCHES), report, folder / "ncu.log", timeout_s, environ, say)
    if found.status != "ok":
        say(f"ncu {found.status}: {found.reason}")
        return Profiled(found.status, found.reason)
    return judge(cell, totals(found.kernels), len(found.kernels), json.loads(window.read_text(encoding="utf-8")))


def judge(cell: Cell, sums: dict[str, float], kernels: int, window: Mapping[str, Any]) -> Profiled:
    """On the baseline nothing is avoided: stores and arithmetic must agree, or the counters are not what we think."""
    stores, analytic = sums.get(STORES), window.get("analytic_bytes")
    baseline = not cell.adaptive and not cell.threshold
    problem = contradiction(stores * SECTOR_BYTES, analytic) if baseline and stores and analytic else ""
    return Profiled("contradiction" if problem else "ok", problem, sums, kernels, window)
