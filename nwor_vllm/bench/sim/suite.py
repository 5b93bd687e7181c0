"""The headline suite: stationary domains, mixed requests, regime switches, bursts, worthless drafts; five seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nwor_vllm.bench.sim import oracle
from nwor_vllm.bench.sim.curves import Curve
from nwor_vllm.bench.sim.replay import Load, replay
from nwor_vllm.bench.sim.synthetic import DOMAINS, WORTHLESS, generate
from nwor_vllm.bench.traces import Trace, join
from nwor_vllm.policy import POLICIES, make_policy

LENGTHS = (0, 1, 2, 3, 5, 8, 10, 15)
BATCHES = (1, 8, 32, 128)
SEEDS = 5
REQUEST_TOKENS = 100


@dataclass(frozen=True)
class Cell:
    workload: str  # stationary, mixed, switch, burst, adversarial, worthless
    name: str
    batch: int
    curve: Curve
    policy: str
    params: dict[str, Any]
    lengths: tuple[int, ...] = LENGTHS
    steps: int = 400  # of the batch, roughly: tokens = steps x batch x 2.5, at least four times that at batch 1


def cells(curve: Curve, policy: str, params: dict[str, Any], batches: Sequence[int] = BATCHES) -> list[Cell]:
    out = []
    for batch in batches:
        out += [Cell("stationary", d.name, batch, curve, policy, params) for d in DOMAINS]
        out += [Cell(w, w, batch, curve, policy, params) for w in ("mixed", "switch", "adversarial", "worthless")]
    return [*out, Cell("burst", "burst", 8, curve, policy, params)]


def load_of(cell: Cell, seed: int, recorded: dict[str, Trace] | None = None) -> Load:
    tokens = max(int(cell.steps * cell.batch * 2.5), 4000)
    count = tokens // REQUEST_TOKENS + cell.batch + 8
    rng = np.random.default_rng([seed, cell.batch])

    def trace(name: str, share: float = 1.0) -> Trace:
        if recorded and name in recorded:
            return recorded[name]
        domain = next(d for d in (*DOMAINS, WORTHLESS) if d.name == name)
        return generate(domain, max(8, int(count * share)), REQUEST_TOKENS, max(cell.lengths), seed)

    if cell.workload in ("stationary", "worthless"):
        whole = trace(cell.name)
        return Load(whole, tuple(rng.permutation(whole.requests).tolist()), cell.batch, tokens)
    if cell.workload in ("mixed", "burst"):
        whole = join([trace(d.name, 1 / len(DOMAINS)) for d in DOMAINS])
        order = tuple(rng.permutation(whole.requests).tolist())
        if cell.workload == "mixed":
            return Load(whole, order, cell.batch, tokens)
        return Load(whole, order, cell.batch, 4 * tokens, batches=(1, 8, 32, 8), period=tokens // 2)
    easy, hard = trace("code", 0.6), trace("translation" if cell.workload == "switch" else "worthless", 0.6)
    whole = join([easy, hard])
    first, second = list(range(easy.requests)), list(range(easy.requests, whole.requests))
    half = tokens // (2 * REQUEST_TOKENS)
    if cell.workload == "switch":
        a = [first[i % len(first)] for i in range(half)]
        return Load(whole, (*a, *(second[i % len(second)] for i in range(half + cell.batch))), cell.batch, tokens)
    # Adversarial: good and worthless drafts take turns, just long enough for a slow learner to be wrong each time.
    turn = max(cell.batch, 4)
    turns = [
        (first, second)[(i // turn) % 2][i % len((first, second)[(i // turn) % 2])]
        for i in range(2 * half + cell.batch)
    ]
    return Load(whole, tuple(turns), cell.batch, tokens)


def measure(cell: Cell, seed: int, recorded: dict[str, Trace] | None = None) -> dict[str, float]:
    load = load_of(cell, seed, recorded)
    rates = oracle.fixed_rates(load, cell.curve, cell.lengths)
    kind = POLICIES[cell.policy]
    got = replay(make_policy(cell.policy, kind.params(**cell.params), cell.lengths), load, cell.curve, seed)
    o1 = max(rates.values())
    row = {
        "rate": got.rate,
        "none": rates[0],
        "o1": o1,
        "o1_k": float(max(rates, key=lambda k: rates[k])),
        "o3": max(oracle.o3(load, cell.curve, rates), got.rate),
        "rounds": float(got.rounds),
        "draft_steps_per_step": got.draft_steps / got.steps,
        "verified_per_round": got.verified / got.rounds,
        "accepted_per_round": got.accepted / got.rounds,
    }
    return row | ({"o2": oracle.o2(load, cell.curve, cell.lengths)} if load.batches else {})


def run(
    todo: Sequence[Cell], seeds: Iterable[int], jobs: int, recorded: dict[str, Trace] | None = None
) -> list[dict[str, Any]]:
    """One row per cell: ratios as geometric means over the seeds, and the worst seed's."""
    work = [(cell, seed, recorded) for cell in todo for seed in seeds]
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            measured = list(pool.map(_measure, work, chunksize=4))
    else:
        measured = [_measure(item) for item in work]
    rows = []
    for cell in todo:
        mine = [m for (c, _, _), m in zip(work, measured, strict=True) if c is cell]
        rows.append(_row(cell, mine))
    return rows


def _measure(item: tuple[Cell, int, dict[str, Trace] | None]) -> dict[str, float]:
    return measure(*item)


def _row(cell: Cell, mine: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"workload": cell.workload, "name": cell.name, "batch": cell.batch, "policy": cell.policy}
    for label, over in (("over_none", "none"), ("over_o1", "o1"), ("over_o2", "o2"), ("over_o3", "o3")):
        if over in mine[0]:
            ratios = [m["rate"] / m[over] for m in mine]
            row[label], row[f"{label}_min"] = geomean(ratios), min(ratios)
    row["o1_over_o3"] = geomean([m["o1"] / m["o3"] for m in mine])
    row["o1_k"] = sorted({int(m["o1_k"]) for m in mine})
    for name in ("rounds", "draft_steps_per_step", "verified_per_round", "accepted_per_round"):
        row[name] = float(np.mean([m[name] for m in mine]))
    return row


def geomean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The headline's figures; `ceiling` ones are what the oracle itself reaches of the same goal."""
    stationary = [r for r in rows if r["workload"] == "stationary"]
    moving = [r for r in rows if r["workload"] in ("mixed", "switch") and r["batch"] in (1, 8)]
    worthless = [r for r in rows if r["workload"] == "worthless"]
    return {
        "geomean_o3": geomean([r["over_o3"] for r in stationary]) if stationary else None,
        "worst_o3": min((r["over_o3"] for r in stationary), default=None),
        "worst_o1_stationary": min((r["over_o1"] for r in stationary), default=None),
        "geomean_o1_stationary": geomean([r["over_o1"] for r in stationary]) if stationary else None,
        "mixed_over_o1": min((r["over_o1"] for r in moving), default=None),
        "mixed_over_o1_geomean": geomean([r["over_o1"] for r in moving]) if moving else None,
        "mixed_over_o1_ceiling": min((1 / r["o1_over_o3"] for r in moving), default=None),
        "geomean_o1_over_o3": geomean([r["o1_over_o3"] for r in stationary]) if stationary else None,
        "worst_over_no_spec": min((r["over_none"] for r in worthless), default=None),
    }
