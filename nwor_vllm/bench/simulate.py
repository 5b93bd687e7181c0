"""`nwor simulate`: replay acceptance traces under a cost curve and compare policies with the oracles."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from nwor_vllm.bench import traces
from nwor_vllm.bench.sim import curves, oracle, suite
from nwor_vllm.bench.sim.replay import Load, replay
from nwor_vllm.config import from_mapping
from nwor_vllm.errors import ConfigError, unknown_key
from nwor_vllm.policy import POLICIES, make_policy


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=("headline",), help="all workloads and batches of the headline")
    parser.add_argument("--trace", nargs="+", type=Path, help="replay these recorded traces instead")
    parser.add_argument("--policy", default="goodput", help=f"one of {', '.join(POLICIES)}")
    parser.add_argument("--params", default="{}", help="the policy's parameters, as JSON")
    parser.add_argument("--cost", default="h200-8b-eagle", help="a built-in cost curve or a profile's .json")
    parser.add_argument("--batch", type=int, nargs="+", default=list(suite.BATCHES), help="concurrency")
    parser.add_argument("--seeds", type=int, default=suite.SEEDS, help="repetitions")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    params = _params(args)
    curve = curves.find(args.cost)
    started = time.monotonic()
    if args.trace:
        result = _replay_files(args, curve, params)
    elif args.suite:
        todo = suite.cells(curve, args.policy, params, args.batch)
        rows = suite.run(todo, range(args.seeds), args.jobs)
        result = {**suite.summary(rows), "cells": rows}
    else:
        raise ConfigError("nothing to simulate; give --suite headline or --trace FILE ...")
    about = {"policy": args.policy, "cost": curve.name, "seeds": args.seeds, "wall_s": time.monotonic() - started}
    result = {**about, **result}
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


def _replay_files(args: argparse.Namespace, curve: curves.Curve, params: dict[str, Any]) -> dict[str, Any]:
    whole = traces.join([traces.load(path) for path in args.trace])
    lengths = tuple(k for k in suite.LENGTHS if k <= whole.k_max)
    rows = []
    for batch in args.batch:
        load = Load(whole, tuple(range(whole.requests)), batch, max(4000, batch * 1000))
        rates = oracle.fixed_rates(load, curve, lengths)
        policy = make_policy(args.policy, from_mapping(POLICIES[args.policy].params, params), lengths)
        got = replay(policy, load, curve)
        best = max(rates.values())
        rows.append(
            {
                "workload": "trace",
                "name": "+".join(sorted(set(whole.categories))),
                "batch": batch,
                "over_none": got.rate / rates[0],
                "over_o1": got.rate / best,
                "over_o3": got.rate / max(oracle.o3(load, curve, rates), got.rate),
                "o1_k": [max(rates, key=lambda k: rates[k])],
                "metrics": policy.metrics(),
            }
        )
    return {"cells": rows}


def _print(result: dict[str, Any]) -> None:
    print(f"{'workload':<12} {'name':<12} {'batch':>5} {'/none':>7} {'/O1':>7} {'/O3':>7}  best fixed K")
    for r in result["cells"]:
        lengths = ",".join(map(str, r["o1_k"]))
        figures = f"{r['over_none']:>7.3f} {r['over_o1']:>7.3f} {r['over_o3']:>7.3f}"
        print(f"{r['workload']:<12} {r['name'][:12]:<12} {r['batch']:>5} {figures}  {lengths}")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name} {value:.4f}")
