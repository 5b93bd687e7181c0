"""The headline's workloads: recorded domains alone, mixed, one after the other; bursts; drafts worth nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nwor_vllm.bench import traces
from nwor_vllm.bench.sim.load import Load
from nwor_vllm.bench.sim.synthetic import DOMAINS, WORTHLESS, generate
from nwor_vllm.bench.traces import Trace
from nwor_vllm.errors import MissingError

RECORDED = Path(__file__).parent / "recorded"
REQUESTS, K_MAX = 384, 15  # of one cell, and of the traces
EASY, HARD = "code@0.7", "creative@0.7"  # the regimes of `switch`
BURSTS = (1, 8, 32, 8)
OTHERS = ("mixed", "switch", "adversarial", "worthless", "misleading")

Pool = Mapping[str, Trace]


@dataclass(frozen=True)
class Workload:
    kind: str  # stationary, mixed, switch, adversarial, burst; worthless and misleading: drafts that are never kept
    name: str
    batch: int


@functools.cache
def recorded(folder: Path = RECORDED) -> dict[str, Trace]:
    """By domain and temperature: the requests of all batch sizes, as acceptance does not depend on them."""
    found: dict[str, list[Trace]] = {}
    for path in sorted(folder.glob("*.npz")):
        trace = traces.load(path)
        recording = trace.about.get("recording", {"domain": path.stem, "temperature": 0})
        found.setdefault(f"{recording['domain']}@{recording['temperature']:g}", []).append(trace)
    if not found:
        raise MissingError(f"no traces in {folder}; `nwor record --out {folder}` makes them")
    return {name: traces.join(parts) for name, parts in found.items()}


def synthetic() -> dict[str, Trace]:
    easy, hard = (next(d for d in DOMAINS if d.name == name.partition("@")[0]) for name in (EASY, HARD))
    named = {d.name: d for d in DOMAINS} | {EASY: easy, HARD: hard}
    return {name: generate(d, 128, 80, K_MAX, 0) for name, d in named.items()}


def workloads(pool: Pool, batches: tuple[int, ...]) -> list[Workload]:
    out = []
    for batch in batches:
        out += [Workload("stationary", name, batch) for name in pool]
        out += [Workload(kind, kind, batch) for kind in OTHERS]
    return [*out, Workload("burst", "burst", 8)]


def load_of(work: Workload, seed: int, tokens: int, pool: Pool) -> Load:
    rng = np.random.default_rng([seed, work.batch, *work.name.encode()])

    def some(name: str, count: int = REQUESTS) -> Trace:
        if name not in pool:
            raise MissingError(f"no trace of {name} for the workload {work.name!r}; `nwor record` makes them")
        whole = pool[name]
        return traces.select(whole, rng.permutation(whole.requests)[:count].tolist())

    def load(trace: Trace) -> Load:
        return Load(trace, tuple(rng.permutation(trace.requests).tolist()), work.batch, tokens)

    if work.kind == "stationary":
        return load(some(work.name))
    if work.kind in ("mixed", "burst"):
        mixed = load(traces.join([some(name, -(-REQUESTS // len(pool))) for name in pool]))
        if work.kind == "mixed":
            return mixed
        return Load(mixed.trace, mixed.order, work.batch, 4 * tokens, batches=BURSTS, period=tokens // 2)
    if work.kind == "worthless":
        return load(generate(WORTHLESS, 96, 80, K_MAX, seed))
    if work.kind == "misleading":  # the drafter is as sure of itself as on code, and wrong
        sure = some(EASY)
        luck = rng.geometric(0.97, len(sure.accepted)) - 1
        return load(Trace(sure.starts, np.minimum(luck, K_MAX), sure.confidence, sure.categories))
    first = some(EASY, REQUESTS // 2)
    second = some(HARD, REQUESTS // 2) if work.kind == "switch" else generate(WORTHLESS, 96, 80, K_MAX, seed)
    both = traces.join([first, second])
    mean = len(both.accepted) / both.requests
    half = max(1, round(tokens / (2 * mean * work.batch)))  # requests of each regime per client
    turn = half if work.kind == "switch" else 1  # adversarial: a slow learner is wrong each time
    order = []
    for i in range(2 * half):
        kind = (i // turn) % 2
        base, count = (0, first.requests) if kind == 0 else (first.requests, second.requests)
        order += [base + (i * work.batch + c) % count for c in range(work.batch)]
    return Load(both, tuple(order), work.batch, tokens)
