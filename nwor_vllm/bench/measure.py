"""Measuring: arms interleaved in one engine on equal prompts, from warm-up to records. The engine is a parameter."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from nwor_vllm.bench import arms, compare, metrics, provenance, record, sidecars, stats, workload
from nwor_vllm.bench.arms import Arm
from nwor_vllm.bench.failures import explain
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import BatchResult, Counters, Objective, RequestResult
from nwor_vllm.bench.ncu.expect import ContradictionError
from nwor_vllm.bench.ncu.profile import NOT_REQUESTED, Profiled
from nwor_vllm.bench.plan import Planned
from nwor_vllm.bench.workload import Prompt

SETTLED = 0.02  # warm-up ends when an arm's block medians differ by less
MAX_WARMUP_FACTOR = 2


class Driver(Protocol):
    """An engine that runs batches and switches policy live."""

    def switch(self, setting: Mapping[str, Any]) -> None: ...

    def generate(self, prompts: Sequence[Prompt], cell: Cell) -> tuple[float, list[RequestResult]]: ...

    def counters(self) -> Counters | None:
        """Increments since the last call."""
        ...

    def peak_memory_bytes(self) -> tuple[int | None, str]:
        """And why not, where unknown."""
        ...

    def close(self) -> None: ...


OpenEngine = Callable[[Engine], Driver]
Say = Callable[[str], None]


@dataclass(slots=True)
class Panel:
    """Cells measured together: the same prompts, interleaved."""

    planned: list[Planned]
    results: dict[Arm, list[BatchResult]] = field(default_factory=dict)
    warmup: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    @property
    def cell(self) -> Cell:
        return self.planned[0].cell

    @property
    def arms(self) -> list[Arm]:
        return arms.of_panel([p.cell for p in self.planned])


@dataclass(frozen=True, slots=True)
class Session:
    """What stays the same while a group is measured."""

    open_engine: OpenEngine
    profile: Callable[[Cell], Profiled]
    objective: Objective
    say: Say
    environ: Mapping[str, str]


def run_group(planned: Sequence[Planned], session: Session) -> list[Planned]:
    """Measure cells that share an engine. Every one ends as a record; those that failed are returned."""
    # Profiling needs an engine of its own, so it comes while the machine is free; it never contributes a time.
    probes = {item.cell.id: session.profile(item.cell) for item in planned}
    panels: dict[str, Panel] = {}
    failed: list[Planned] = []
    for item in planned:
        found = probes[item.cell.id]
        if found.status == "contradiction":
            failed += _fail(Panel([item]), ContradictionError(found.reason), session, time.time())
        else:
            panels.setdefault(item.cell.panel, Panel([])).planned.append(item)
    driver: Driver | None = None
    try:
        for number, panel in enumerate(panels.values(), 1):
            names = ", ".join(p.cell.id for p in panel.planned)
            session.say(f"panel {number}/{len(panels)}: {names}")
            started = time.time()
            try:
                if driver is None:
                    driver = session.open_engine(panel.cell.engine)
                    session.say(f"engine ready after {time.time() - started:.1f} s")
                measure(panel, driver, session)
                _finish(panel, driver, session, started, probes)
            except Exception as error:
                # One panel's failure is a fact to record, not the end of the night: the next gets a fresh engine.
                failed += _fail(panel, error, session, started)
                if driver is not None:
                    _close(driver, session)
                    driver = None
    finally:
        if driver is not None:
            _close(driver, session)
    return failed


def _close(driver: Driver, session: Session) -> None:
    try:
        driver.close()
    except Exception as error:
        session.say(f"engine did not close cleanly: {error}")


def measure(panel: Panel, driver: Driver, session: Session) -> None:
    cell, chosen = panel.cell, panel.arms
    work = workload.build(cell)
    if work.repeats:
        panel.flags.append("the dataset has fewer prompts than the run needs: prompts repeat in later batches")
    panel.warmup = warm_up(chosen, work.warmup, driver, cell, session.say)
    if panel.warmup["settled"] is False:
        panel.flags.append("warm-up did not settle within 2 %")
    for index, prompts in enumerate(work.batches):
        for position, arm in enumerate(arms.order(chosen, index)):
            driver.switch(arm.setting())
            driver.counters()  # drop what came before
            seconds, requests = driver.generate(prompts, cell)
            result = BatchResult(index, position, seconds, workload.sha256(prompts), tuple(requests), driver.counters())
            panel.results.setdefault(arm, []).append(result)
        timing = ", ".join(f"{arm.mode} {panel.results[arm][-1].seconds:.2f} s" for arm in chosen)
        session.say(f"batch {index + 1}/{len(work.batches)}: {timing}")


def warm_up(
    chosen: Sequence[Arm], batches: Sequence[Sequence[Prompt]], driver: Driver, cell: Cell, say: Say
) -> dict[str, Any]:
    """Each arm on prompts of its own until its blocks agree, or twice what was asked for."""
    seconds: dict[Arm, list[float]] = {arm: [] for arm in chosen}
    settled: bool | None = None
    rounds = 0
    while batches and rounds < len(batches) * MAX_WARMUP_FACTOR:
        for arm in arms.order(chosen, rounds):
            driver.switch(arm.setting())
            took, requests = driver.generate(batches[rounds % len(batches)], cell)
            tokens = sum(len(request.token_ids) for request in requests)
            seconds[arm].append(took / max(tokens, 1))
        rounds += 1
        if rounds >= len(batches):
            if len(batches) == 1:
                break  # one block cannot show whether it settled
            settled = all(_settled(values) for values in seconds.values())
            if settled:
                break
    say(f"warm-up: {rounds} blocks" + {None: "", True: ", settled", False: ", not settled within 2 %"}[settled])
    return {"blocks": rounds, "settled": settled}


def _settled(values: Sequence[float]) -> bool:
    half = max(1, len(values) // 2)
    before, after = statistics.median(values[:half]), statistics.median(values[-half:])
    return abs(after / before - 1) <= SETTLED
