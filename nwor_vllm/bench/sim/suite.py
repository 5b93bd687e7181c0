"""The headline suite: every workload under every cost, a policy against its oracles, several seeds, all cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nwor_vllm.bench.sim import oracle
from nwor_vllm.bench.sim.curves import Curve
from nwor_vllm.bench.sim.replay import replay
from nwor_vllm.bench.sim.workloads import Pool, Workload, load_of
from nwor_vllm.config import from_mapping
from nwor_vllm.policy import POLICIES, make_policy

LENGTHS = (0, 1, 2, 3, 5, 8, 10, 15)
BATCHES = (1, 8, 32, 128)
SEEDS = 5
STEPS = {1: 1100, 8: 1000, 32: 600, 128: 480}  # of a batch, at 2.5 tokens a request
AIM = 1.10  # over O1 on mixed and switching traffic


@dataclass(frozen=True)
class Task:
    work: Workload
    seed: int
    curve: Curve
    policy: str
    params: dict[str, Any]
    unsteady: bool = False


def tokens_of(batch: int) -> int:
    steps = STEPS.get(batch) or STEPS[min(STEPS, key=lambda b: abs(b - batch))]
    return int(2.5 * steps * batch)


_pool: dict[str, Pool] = {}  # of a worker process


def _start(pool: Pool) -> None:
    _pool["pool"] = pool


def run(todo: Sequence[Task], pool: Pool, jobs: int) -> list[dict[str, Any]]:
    """One row per workload: ratios as geometric means over the seeds, and the worst seed's."""
    ordered = sorted(todo, key=lambda t: -tokens_of(t.work.batch))  # the long ones first
    if jobs > 1:
        with ProcessPoolExecutor(jobs, initializer=_start, initargs=(pool,)) as workers:
            measured = list(workers.map(_measure, ordered, chunksize=4))
    else:
        _start(pool)
        measured = [_measure(task) for task in ordered]
    rows: dict[Workload, list[dict[str, float]]] = {task.work: [] for task in todo}
    for task, found in zip(ordered, measured, strict=True):
        rows[task.work].append(found)
    return [_row(work, found) for work, found in rows.items()]


def _measure(task: Task) -> dict[str, float]:
    return measure(task, _pool["pool"])


def measure(task: Task, pool: Pool) -> dict[str, float]:
    load = load_of(task.work, task.seed, tokens_of(task.work.batch), pool)
    lengths = tuple(k for k in LENGTHS if k <= load.trace.k_max)
    rates = oracle.fixed_rates(load, task.curve, lengths)
    params = from_mapping(POLICIES[task.policy].params, task.params, "policy_params")
    policy = make_policy(task.policy, params, lengths)
    got = replay(policy, load, task.curve, task.seed, unsteady=task.unsteady)
    row = {
        "rate": got.rate,
        "none": rates[0],
        "o1": max(rates.values()),
        "o1_k": float(max(rates, key=lambda k: rates[k])),
        "rounds": float(got.rounds),
        "draft_steps_per_step": got.draft_steps / got.steps,
        "verified_per_round": got.verified / got.rounds,
        "accepted_per_round": got.accepted / got.rounds,
    }
    if load.batches:
        return row | {"o2": oracle.o2(load, task.curve, lengths, rates)}
    if task.seed == 0:
        row["rule"] = max(oracle.best_rule(load, task.curve, lengths), row["o1"])
        # Once more, as a server that has run for a while.
        row["warm"] = replay(policy, load, task.curve, seed=1, unsteady=task.unsteady).rate
    clairvoyant = max(oracle.o3(load, task.curve, rates), got.rate)
    exact = load.batch == 1
    return row | {
        "o2": row["o1"],  # one batch size: a table is one length
        "o3": clairvoyant,
        "bound": clairvoyant if exact else max(oracle.bound(load, task.curve), clairvoyant),
    }


RATIOS = (
    ("over_none", "rate", "none"), ("over_o1", "rate", "o1"), ("over_o2", "rate", "o2"), ("over_o3", "rate", "o3"),
    ("over_bound", "rate", "bound"), ("o1_over_none", "o1", "none"), ("o2_over_o1", "o2", "o1"),
    ("o3_over_o1", "o3", "o1"), ("o3_over_none", "o3", "none"), ("bound_over_o1", "bound", "o1"),
    ("over_rule", "rate", "rule"), ("rule_over_o1", "rule", "o1"), ("rule_over_o3", "rule", "o3"),
    ("warm_over_none", "warm", "none"), ("warm_over_o1", "warm", "o1"), ("warm_over_o3", "warm", "o3"),
)  # fmt: skip


def _row(work: Workload, found: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"workload": work.kind, "name": work.name, "batch": work.batch}
    for label, over, under in RATIOS:
        ratios = [m[over] / m[under] for m in found if over in m and under in m]
        if ratios:
            row[label] = geomean(ratios)
            if over == "rate":
                row[f"{label}_min"] = min(ratios)
    row["o1_k"] = sorted({int(m["o1_k"]) for m in found})
    for name in ("rounds", "draft_steps_per_step", "verified_per_round", "accepted_per_round"):
        row[name] = float(np.mean([m[name] for m in found]))
    return row


def geomean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The headline's figures, and what the oracles themselves reach of the same goals."""
    stationary = [r for r in rows if r["workload"] == "stationary"]
    moving = [r for r in rows if r["workload"] in ("mixed", "switch") and r["batch"] in (1, 8)]
    worthless = [r for r in rows if r["workload"] in ("worthless", "misleading")]

    def over(some: Sequence[dict[str, Any]], name: str, how: Any) -> float | None:
        return how([r[name] for r in some]) if some else None

    def reached(name: str) -> dict[str, float | None]:
        return {
            "geomean_o3": over(stationary, f"{name}_o3", geomean),
            "worst_o3": over(stationary, f"{name}_o3", min),
            "worst_o1_stationary": over(stationary, f"{name}_o1", min),
            "geomean_o1_stationary": over(stationary, f"{name}_o1", geomean),
            "mixed_over_o1": over(moving, f"{name}_o1", min),
            "geomean_mixed_over_o1": over(moving, f"{name}_o1", geomean),
            "worst_over_no_spec": over(worthless, f"{name}_none", min),
        }

    return {
        **reached("over"),
        "geomean_bound": over(stationary, "over_bound", geomean),
        "geomean_rule": over(stationary, "over_rule", geomean),
        "warm": reached("warm_over"),
        "oracles": {
            "o1_over_none_stationary": over(stationary, "o1_over_none", geomean),
            "o3_over_none_stationary": over(stationary, "o3_over_none", geomean),
            "o3_over_o1_stationary": over(stationary, "o3_over_o1", geomean),
            "o1_share_of_o3": over([{"x": 1 / r["o3_over_o1"]} for r in stationary], "x", geomean),
            "rule_share_of_o3": over(stationary, "rule_over_o3", geomean),
            "worst_rule_share_of_o3": over(stationary, "rule_over_o3", min),
            "o2_over_o1_burst": over([r for r in rows if r["workload"] == "burst"], "o2_over_o1", min),
            "o3_over_o1_moving": {f"{r['name']} {r['batch']}": r["o3_over_o1"] for r in moving},
            "rule_over_o1_moving": {f"{r['name']} {r['batch']}": r["rule_over_o1"] for r in moving},
            "bound_over_o1_moving": {f"{r['name']} {r['batch']}": r["bound_over_o1"] for r in moving},
            "aim_out_of_reach": [f"{r['name']} {r['batch']}" for r in moving if r["bound_over_o1"] < AIM],
            "aim_beyond_o3": [f"{r['name']} {r['batch']}" for r in moving if r["o3_over_o1"] < AIM],
        },
    }
