"""What it is worth to tell the policy the kinds of requests, on traffic of all recorded domains and temperatures.

    python benchmarks/kinds.py --out benchmarks/results/kinds.json

It is told nothing; which requests are greedy and which are sampled, as vLLM's requests show; or their domains, too, as
a user's labels may. Rates over the best fixed length in hindsight, geometric means over seeds, from a cold start and
when the same traffic comes for the last of several times. Half a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nwor_vllm.bench import provenance, record
from nwor_vllm.bench.sim import curves, oracle, suite, workloads
from nwor_vllm.bench.sim.load import Load
from nwor_vllm.bench.sim.replay import replay
from nwor_vllm.bench.traces import Trace
from nwor_vllm.errors import ConfigError, NworError
from nwor_vllm.policy import kind_of, make_policy

TOLD = ("nothing", "temperature", "domain")


def labelled(trace: Trace, domain: str, told: str) -> Trace:
    """`trace` with kinds that say so much of its requests."""
    if told == "nothing":
        return replace(trace, kinds=())
    if told == "temperature":
        return trace
    greedy = kind_of(0.0)
    return replace(trace, kinds=tuple(kind_of(float(kind != greedy), domain) for kind in trace.kinds))


def cell(task: tuple[int, int], tokens: int, passes: int, cost: str) -> dict[str, Any]:
    """One batch and seed: over the best fixed length, the first and the last of `passes`, by what is told."""
    batch, seed = task
    curve, found = curves.find(cost), {}
    for told in TOLD:
        pool = {name: labelled(trace, name.partition("@")[0], told) for name, trace in workloads.recorded().items()}
        load = workloads.load_of(
            workloads.Workload("mixed", "mixed", batch), seed, tokens or suite.tokens_of(batch), pool
        )
        lengths = tuple(k for k in suite.LENGTHS if k <= load.trace.k_max)
        if not found:  # what is told changes no round
            best = max(oracle.fixed_rates(load, curve, lengths).values())
        found[told] = served(load, curve, lengths, passes, seed, best)
    return {"batch": batch, "seed": seed, **found}


def served(
    load: Load, curve: curves.Curve, lengths: Sequence[int], passes: int, seed: int, best: float
) -> dict[str, float]:
    policy = make_policy("goodput", None, lengths)
    rates = [replay(policy, load, curve, seed=100 * number + seed).rate / best for number in range(passes)]
    return {"cold": rates[0], "warm": rates[-1]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What it is worth to tell the policy the kinds of requests.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=5, help="times that the same traffic is served")
    parser.add_argument("--tokens", type=int, default=0, help="of a pass; by default the suite's")
    parser.add_argument("--cost", default="plain", help="cost curve")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if min(args.seeds, args.passes, args.jobs, *args.batches) < 1 or args.tokens < 0:
        raise ConfigError("--seeds, --passes, --jobs and --batches are counts; expected whole numbers from 1 up")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    todo = [(batch, seed) for batch in args.batches for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs) as workers:
        rows = list(workers.map(partial(cell, tokens=args.tokens, passes=args.passes, cost=args.cost), todo))
    table = {
        str(batch): {
            told: {
                when: suite.geomean([r[told][when] for r in rows if r["batch"] == batch]) for when in ("cold", "warm")
            }
            for told in TOLD
        }
        for batch in args.batches
    }
    found = {
        "command": shlex.join(["python", "benchmarks/kinds.py", *(sys.argv[1:] if argv is None else argv)]),
        "code": provenance.code(),
        "versions": provenance.versions(),
        "over_o1": table,
        "cells": rows,
    }
    record.replace_text(args.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NworError as error:
        sys.exit(f"kinds.py: {error}")
