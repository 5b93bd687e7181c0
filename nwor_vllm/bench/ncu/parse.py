"""Kernels and their metrics out of an `.ncu-rep`, or out of either shape of ncu's CSV. Everything in base units."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.errors import CorruptFileError, MissingError

METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors_srcunit_tex_op_write.sum",  # what the kernels themselves stored
    "lts__t_sectors_op_write.sum",  # that, and what one half of L2 passes to the other
    "l1tex__t_bytes_pipe_lsu_mem_global_op_st.sum",
    "gpu__time_duration.sum",
)
SECTOR_BYTES = 32
BASE_UNITS = {"gpu__time_duration.sum": "ns"}  # a report that does not name its chip comes without units
UNITS: Mapping[str, float] = {
    "": 1.0, "%": 1.0, "sector": 1.0, "inst": 1.0, "cycle": 1.0, "request": 1.0, "block": 1.0, "register/thread": 1.0,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
    "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    metrics: Mapping[str, float]  # a metric that ncu could not take is absent


def totals(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Over a window: sums where the metric is a sum, means where it is a percentage."""
    columns: dict[str, list[float]] = {}
    for kernel in kernels:
        for name, value in kernel.metrics.items():
            columns.setdefault(name, []).append(value)
    return {
        name: math.fsum(values) / (len(values) if "pct" in name or ".avg" in name else 1)
        for name, values in columns.items()
    }


def read_csv(text: str, wanted: Collection[str] = METRICS) -> list[Kernel]:
    """`--csv` output: the long details page or the wide raw page, whatever ncu printed around it."""
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip() and not line.startswith("==")]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise CorruptFileError('ncu\'s CSV has no header row that starts with "ID"')
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines[start:])), strict=True))
    except csv.Error as error:
        raise CorruptFileError(f"ncu's CSV is malformed: {error}") from None
    header = rows[0]
    if "Kernel Name" not in header:
        raise CorruptFileError("ncu's CSV has no column Kernel Name")
    if "Metric Name" in header:
        return _long(header, rows[1:], wanted)
    return _wide(header, rows[1:], wanted)


def _long(header: list[str], rows: list[list[str]], wanted: Collection[str]) -> list[Kernel]:
    try:
        at = {name: header.index(name) for name in ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")}
    except ValueError as error:
        raise CorruptFileError(f"ncu's details CSV lacks a column: {error}") from None
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in rows:
        # Where ncu applied rules, rows of metrics end before the rules' columns.
        _check_width(row, header, max(at.values()) + 1)
        _, metrics = found.setdefault(row[at["ID"]], (row[at["Kernel Name"]], {}))
        name = row[at["Metric Name"]]
        if name in wanted:
            _store(metrics, name, row[at["Metric Value"]], row[at["Metric Unit"]])
    return [Kernel(name, metrics) for name, metrics in found.values()]


def _wide(header: list[str], rows: list[list[str]], wanted: Collection[str]) -> list[Kernel]:
    columns = {name: i for i, name in enumerate(header) if name in wanted}
    if not rows:
        return []
    units, kernels = rows[0], []
    _check_width(units, header)
    if units[0]:
        raise CorruptFileError("ncu's raw CSV has no row of units under its header")
    for row in rows[1:]:
        _check_width(row, header)
        metrics: dict[str, float] = {}
        for name, i in columns.items():
            _store(metrics, name, row[i], units[i])
        kernels.append(Kernel(row[header.index("Kernel Name")], metrics))
    return kernels


def _check_width(row: list[str], header: list[str], least: int | None = None) -> None:
    if not (len(header) if least is None else least) <= len(row) <= len(header):
        raise CorruptFileError(f"ncu's CSV has a row of {len(row)} fields under a header of {len(header)}")


def _store(metrics: dict[str, float], name: str, text: str, unit: str) -> None:
    """`n/a` and empty are no measurement: left out, never 0."""
    if text.strip().lower() in ("", "n/a", "no data", "nan", "inf", "-nan"):
        return
    if unit not in UNITS:
        raise CorruptFileError(f"ncu's CSV gives {name} in {unit!r}; known units: {', '.join(filter(None, UNITS))}")
    try:
        value = float(text.replace(",", "")) * UNITS[unit]
    except ValueError:
        raise CorruptFileError(f"ncu's CSV gives {name} as {text!r:.40}; expected a number") from None
    if math.isfinite(value):
        metrics[name] = value


def read_report(path: Path, wanted: Collection[str] = METRICS) -> list[Kernel]:
    """An `.ncu-rep`, through NVIDIA's reader (`pip install nwor-vllm[ncu]`); needs neither a GPU nor ncu."""
    if not path.is_file() or path.stat().st_size == 0:
        raise CorruptFileError(f"{path.name} is missing or has no bytes: ncu wrote no report")
    try:
        reader: Any = importlib.import_module("ncu_report")
    except ImportError as error:
        raise MissingError(
            f"reading {path.name} needs the ncu-report package: pip install ncu-report ({error})"
        ) from None
    try:
        context = reader.load_report(str(path))
        kernels = []
        for r in range(context.num_ranges()):
            section = context.range_by_idx(r)
            for a in range(section.num_actions()):
                kernels.append(_action(section.action_by_idx(a), wanted))
    except (RuntimeError, ValueError, OSError) as error:
        raise CorruptFileError(f"{path.name} is no Nsight Compute report: {error}") from None
    if not all(kernel.name for kernel in kernels):
        raise CorruptFileError(f"{path.name} is damaged: {len(kernels)} kernels, some without a name")
    if not kernels:
        # A damaged file loads as 0 ranges without an error, or as kernels of nothing.
        raise CorruptFileError(f"{path.name} holds no kernels: nothing matched, or the report is damaged")
    return kernels


def _action(action: Any, wanted: Collection[str]) -> Kernel:
    metrics: dict[str, float] = {}
    for name in wanted:
        metric = action.metric_by_name(name)
        if metric is not None and metric.as_double() is not None:
            _store(metrics, name, repr(metric.as_double()), metric.unit() or BASE_UNITS.get(name, ""))
    return Kernel(action.name(), metrics)
