"""`nwor simulate`: replay acceptance traces under a cost curve and compare policies with the oracles."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from nwor_vllm.bench import traces
from nwor_vllm.bench.sim import curves, oracle, suite, workloads
from nwor_vllm.bench.sim.load import Load
from nwor_vllm.bench.sim.replay import replay
from nwor_vllm.config import from_mapping
from nwor_vllm.errors import ConfigError, unknown_key
from nwor_vllm.policy import POLICIES, make_policy

COSTS = ("plain", "h200-8b-eagle")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", choices=("headline", "synthetic"), help="all workloads and batches: recorded traces, or seeded ones"
    )
    parser.add_argument("--trace", nargs="+", type=Path, help="replay these recorded traces instead")
    parser.add_argument("--policy", default="goodput", help=f"one of {', '.join(POLICIES)}")
    parser.add_argument("--params", default="{}", help="the policy's parameters, as JSON")
    parser.add_argument(
        "--cost",
        nargs="+",
        default=list(COSTS),
        help="cost curves, the first for the top-level figures: plain (measured), h200-8b-eagle (a model), "
        "or a profile's .json",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=list(suite.BATCHES), help="concurrency")
    parser.add_argument("--only", default="", help="with --suite: workloads whose kind or name contains this")
    parser.add_argument("--seeds", type=int, default=suite.SEEDS, help="repetitions")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; every core")
    parser.add_argument(
        "--unsteady",
        action="store_true",
        help="the policy sees a machine that starts slow and whose pace jumps and drifts",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    params = _params(args)
    found = [curves.find(name) for name in args.cost]
    started = time.monotonic()
    if args.trace:
        result = _replay_files(args, found[0], params)
    elif args.suite:
        result = _suite(args, found, params)
    else:
        raise ConfigError("nothing to simulate; give --suite headline or --trace FILE ...")
    result = {"policy": args.policy, "cost": found[0].name, "wall_s": time.monotonic() - started, **result}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)
    return 0


def _params(args: argparse.Namespace) -> dict[str, Any]:
    if args.policy not in POLICIES:
        raise unknown_key("policy", args.policy, POLICIES)
    try:
        params = json.loads(args.params)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--params is not JSON: {error}") from error
    from_mapping(POLICIES[args.policy].params, params, "policy_params")
    if args.seeds < 1 or args.jobs < 1 or min(args.batch) < 1:
        raise ConfigError("--seeds, --jobs and --batch are counts; expected whole numbers from 1 up")
    return dict(params)


def _suite(args: argparse.Namespace, found: list[curves.Curve], params: dict[str, Any]) -> dict[str, Any]:
    """The first cost at the top level, every other under the first word of its name."""
    pool = workloads.recorded() if args.suite == "headline" else workloads.synthetic()
    chosen = [w for w in workloads.workloads(pool, tuple(args.batch)) if args.only in w.kind or args.only in w.name]
    if not chosen:
        raise ConfigError(f"--only {args.only!r} names no workload; kinds: stationary, {', '.join(workloads.OTHERS)}")
    result: dict[str, Any] = {}
    for curve in found:
        seeds = args.seeds if curve is found[0] else max(1, args.seeds // 5)  # beside the headline, and in its time
        todo = [suite.Task(w, seed, curve, args.policy, params, args.unsteady) for w in chosen for seed in range(seeds)]
        rows = suite.run(todo, pool, args.jobs)
        part = {"cost": curve.name, "seeds": seeds, **suite.summary(rows), "cells": rows}
        if curve is found[0]:
            result = part
        else:
            result[curve.name.partition("-")[0]] = part
    return result


def _replay_files(args: argparse.Namespace, curve: curves.Curve, params: dict[str, Any]) -> dict[str, Any]:
    whole = traces.join([traces.load(path) for path in args.trace])
    lengths = tuple(k for k in suite.LENGTHS if k <= whole.k_max)
    order = np.random.default_rng(0).permutation(whole.requests)  # else the first files would be all that is served
    rows = []
    for batch in args.batch:
        load = Load(whole, tuple(order.tolist()), batch, suite.tokens_of(batch))
        rates = oracle.fixed_rates(load, curve, lengths)
        policy = make_policy(args.policy, from_mapping(POLICIES[args.policy].params, params), lengths)
        got = replay(policy, load, curve, unsteady=args.unsteady)
        best = max(rates.values())
        clairvoyant = max(oracle.o3(load, curve, rates), got.rate)
        rows.append(
            {
                "workload": "trace",
                "name": "+".join(sorted(set(whole.categories))),
                "batch": batch,
                "over_none": got.rate / rates[0],
                "over_o1": got.rate / best,
                "over_o3": got.rate / clairvoyant,
                "over_bound": got.rate / (clairvoyant if batch == 1 else max(oracle.bound(load, curve), clairvoyant)),
                "rule_over_o1": max(oracle.best_rule(load, curve, lengths) / best, 1.0),
                "regret_o1": 1 - got.rate / best,
                "tokens_per_s": got.rate,
                "o1_k": [max(rates, key=lambda k: rates[k])],
                "metrics": policy.metrics(),
            }
        )
    return {"cells": rows}


def _print(result: dict[str, Any]) -> None:
    print(f"{'workload':<12} {'name':<16} {'batch':>5} {'/none':>7} {'/O1':>7} {'/O3':>7} {'/bound':>7}  best fixed K")
    for r in result["cells"]:
        lengths = ",".join(map(str, r["o1_k"]))
        figures = " ".join(
            f"{r[name]:>7.3f}" if name in r else " " * 7 for name in ("over_none", "over_o1", "over_o3", "over_bound")
        )
        print(f"{r['workload']:<12} {r['name'][:16]:<16} {r['batch']:>5} {figures}  {lengths}")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name} {value:.4f}")
    for group in ("warm", "oracles"):
        for name, value in result.get(group, {}).items():
            print(f"{group}.{name} {value:.4f}" if isinstance(value, float) else f"{group}.{name} {value}")
    for part in (value for value in result.values() if isinstance(value, dict) and "cells" in value):
        print(f"\n{part['cost']}, {part['seeds']} seeds:")
        _print(part)
