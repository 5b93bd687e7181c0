"""Measuring: arms interleaved on equal prompts, from warm-up to the last batch. The engine is a parameter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from nwor_vllm.bench import arms, finish, workload
from nwor_vllm.bench.arms import Arm
from nwor_vllm.bench.metrics import BatchResult, judged_by
from nwor_vllm.bench.ncu.expect import ContradictionError
from nwor_vllm.bench.plan import Planned
from nwor_vllm.bench.record import Warmup
from nwor_vllm.bench.session import Engines, Panel, Session
from nwor_vllm.bench.workload import Prompt

SETTLED = 0.02  # warm-up ends when an arm's block medians differ by less
MAX_WARMUP_FACTOR = 2


def run_group(planned: Sequence[Planned], session: Session) -> list[Planned]:
    """Measure cells that share an engine. Every one ends as a record; those that failed are returned."""
    # Profiling needs an engine of its own, so it comes while the machine is free; it never contributes a time.
    probes = {item.cell.id: session.profile(item.cell) for item in planned}
    panels: dict[str, Panel] = {}
    failed: list[Planned] = []
    for item in planned:
        found = probes[item.cell.id]
        if found.status == "contradiction":
            failed += finish.fail(Panel([item]), ContradictionError(found.reason), session, time.time())
        else:
            panels.setdefault(item.cell.panel, Panel([])).planned.append(item)
    engines = Engines(session)
    try:
        for number, panel in enumerate(panels.values(), 1):
            names = ", ".join(p.cell.id for p in panel.planned)
            session.say(f"panel {number}/{len(panels)}: {names}")
            started = time.time()
            try:
                engines.open(panel)
                batches = measure(panel, engines, session)
                finish.finish(panel, batches, engines, session, started, probes)
            except Exception as error:
                # One panel's failure is a fact to record, not the end of the night: the next gets a fresh engine.
                failed += finish.fail(panel, error, session, started)
                engines.close()
    finally:
        engines.close()
    return failed


def measure(panel: Panel, engines: Engines, session: Session) -> Sequence[Sequence[Prompt]]:
    """Fills the panel's results; returns the prompts they came from."""
    cell, chosen = panel.cell, panel.arms
    work = workload.build(cell)
    if work.repeats:
        panel.flags.append("the dataset has fewer prompts than the run needs: prompts repeat in later batches")
    panel.warmup = warm_up(panel, work.warmup, engines)
    session.say(f"warm-up: {in_words(panel.warmup)}")
    if panel.warmup.settled is False:
        panel.flags.append(f"warm-up: {in_words(panel.warmup)}")
    for index, prompts in enumerate(work.batches):
        for position, arm in enumerate(arms.order(chosen, index)):
            driver = engines.of(arm)
            driver.switch(arm.setting())
            driver.counters()  # drop what came before
            seconds, requests = driver.generate(prompts, cell)
            result = BatchResult(index, position, seconds, workload.sha256(prompts), tuple(requests), driver.counters())
            panel.results.setdefault(arm, []).append(result)
        timing = ", ".join(f"{arm.name(cell)} {panel.results[arm][-1].seconds:.2f} s" for arm in chosen)
        session.say(f"batch {index + 1}/{len(work.batches)}: {timing}")
    return work.batches


def warm_up(panel: Panel, batches: Sequence[Sequence[Prompt]], engines: Engines) -> Warmup:
    """Each arm on prompts of its own until its blocks agree, or twice what was asked for."""
    cell, chosen = panel.cell, panel.arms
    took: dict[Arm, list[float]] = {arm: [] for arm in chosen}
    limit = len(batches) * MAX_WARMUP_FACTOR if len(batches) > 1 else len(batches)
    blocks = 0
    while blocks < limit:
        for arm in arms.order(chosen, blocks):
            driver = engines.of(arm)
            driver.switch(arm.setting())
            prompts = batches[blocks % len(batches)]
            seconds, requests = driver.generate(prompts, cell)
            block = BatchResult(blocks, 0, seconds, "", tuple(requests), None)
            took[arm].append(block.time(judged_by(cell)) / max(block.tokens, 1))
        blocks += 1
        if blocks >= len(batches) and blocks > 1 and max(abs(_moved(values)) for values in took.values()) <= SETTLED:
            break
    if blocks < 2:
        few = "one block cannot show whether it settled" if blocks else "no warm-up was asked for"
        return Warmup(blocks=blocks, limit=limit, tolerance=SETTLED, settled=None, changes={}, reasons={"settled": few})
    changes = {arm.name(cell): _moved(values) for arm, values in took.items()}
    settled = max(map(abs, changes.values())) <= SETTLED
    return Warmup(blocks=blocks, limit=limit, tolerance=SETTLED, settled=settled, changes=changes)


def _moved(values: Sequence[float]) -> float:
    half = max(1, len(values) // 2)
    return statistics.median(values[-half:]) / statistics.median(values[:half]) - 1


def in_words(warmup: Warmup) -> str:
    if warmup.settled is None:
        return f"{warmup.blocks} blocks, {warmup.reasons['settled']}"
    arm, change = max(warmup.changes.items(), key=lambda item: abs(item[1]))
    said = "settled" if warmup.settled else f"not settled within {warmup.tolerance:.0%}"
    return f"{warmup.blocks} blocks of at most {warmup.limit}, {said}: {arm} moved by {change:+.1%}"
