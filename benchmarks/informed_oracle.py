"""What can be known at all: the best early-exit rule when a network, fitted in hindsight, rates the drafts.

    python benchmarks/informed_oracle.py --out benchmarks/results/informed_oracle.json

A clairvoyant schedule (O3) knows every coin that sampling throws. This oracle is told all that a drafter shows and a
server remembers: the confidences of the draft so far, which drafts of the text before were right (as if one had been
made at every position), where in its text a request is, and which domain and temperature it has. A network learns from
that, load by load, how likely each draft is kept: once for requests that it has not seen (held out, five folds), and
once for the very rounds that it was fitted to (in sample, which is more than anybody can know). The best threshold and
cap are then chosen in hindsight, too, as the rule oracle of `nwor simulate` does. 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nwor_vllm.bench import provenance, record
from nwor_vllm.bench.sim import curves, oracle, suite, workloads
from nwor_vllm.bench.traces import Trace
from nwor_vllm.errors import ConfigError, NworError

Floats = NDArray[np.float64]
FOLDS = 5
EPOCHS, BATCH, WIDTH, RATE = 40, 1024, 64, 4e-3
BACK = range(1, 12)  # positions back whose drafts are remembered
ODDS = np.linspace(-4.0, 4.0, 17)  # log-odds of a confidence between which the network may bend freely
PLACES = np.arange(0.0, 100.0, 4.0)  # positions of a text, the same
THRESHOLDS = (0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
SHARES = ("o1", "rule", "held_out", "in_sample", "policy", "warm")


def known(trace: Trace) -> Floats:
    """[positions, k_max, features]: what may be known of each draft before it is verified."""
    positions, k_max = trace.confidence.shape
    at = np.arange(positions)
    owner = np.repeat(np.arange(trace.requests), np.diff(trace.starts))
    begin = trace.starts[owner]
    history = [(at - begin) / 50.0]
    for back in BACK:  # of the draft made there the text shows `back` tokens by now
        there = np.maximum(at - back, 0)
        inside = at - back >= begin
        right = np.minimum(trace.accepted[there], back)
        history += [inside, inside * right / back, inside & (right == 0), inside & (right < back)]
    first = np.concatenate([[0], np.cumsum(trace.accepted > 0)])
    history.append((first[at] - first[begin] + 1) / (at - begin + 2))
    odds = np.log(trace.confidence) - np.log1p(-trace.confidence)
    shown = [odds, np.minimum.accumulate(odds, axis=1), np.cumsum(np.log(trace.confidence), axis=1)]
    before = np.concatenate([odds[:, :1], odds[:, :-1]], axis=1)
    parts = [
        np.stack(shown, axis=2) / 4.0,
        _hats(odds, ODDS),
        _hats(before, ODDS),
        np.broadcast_to(np.eye(k_max), (positions, k_max, k_max)),
    ]
    of_round = np.concatenate([np.stack(history, axis=1), _hats(at - begin, PLACES)], axis=1)
    parts.append(np.broadcast_to(of_round[:, None], (positions, k_max, of_round.shape[1])))
    return np.concatenate(parts, axis=2)


def _hats(x: NDArray[Any], knots: Floats) -> Floats:
    """Weights of the two knots around each value: straight lines between knots become weights."""
    return np.stack([np.interp(x, knots, row) for row in np.eye(len(knots))], axis=-1)


def chances(trace: Trace, folds: int) -> Floats:
    """[positions, k_max]: that a draft is kept if the ones before it are. `folds` of 1: in sample."""
    k_max = trace.k_max
    owner = np.repeat(np.arange(trace.requests), np.diff(trace.starts))
    room = trace.starts[owner + 1] - np.arange(len(owner)) - 1
    depth = np.arange(k_max)
    seen = torch.from_numpy((depth <= trace.accepted[:, None]) & (depth < room[:, None]))
    kept = torch.from_numpy(depth < trace.accepted[:, None]).float()
    x = torch.from_numpy(known(trace)).float()
    fold = torch.from_numpy(np.random.default_rng(0).permutation(trace.requests)[owner] % folds)
    out = torch.empty(kept.shape)
    for held in range(folds):
        mine = fold == held
        learn = seen & ~mine[:, None] if folds > 1 else seen
        net = fitted(x[learn], kept[learn])
        with torch.no_grad():
            out[mine] = torch.sigmoid(net(x[mine])[..., 0])
    return np.asarray(out.double().clamp(1e-6, 1 - 1e-6).numpy())


def fitted(x: torch.Tensor, kept: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(x.shape[1], WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    turns = -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * turns)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x[rows])[:, 0], kept[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net


def told(item: tuple[str, Trace], folds: int) -> Trace:
    """The trace with chances for confidences."""
    torch.set_num_threads(1)
    _, trace = item
    return replace(trace, confidence=chances(trace, folds))


Pools = Mapping[str, workloads.Pool]
_pools: dict[str, workloads.Pool] = {}  # of a worker process


def _start(pools: Pools) -> None:
    _pools.update(pools)


def cell(work: workloads.Workload, cost: str) -> dict[str, Any]:
    """Rates over O3's. The loads of all pools are the same requests in the same order."""
    curve, tokens = curves.find(cost), suite.tokens_of(work.batch)
    found = suite.measure(suite.Task(work, 0, curve, "goodput", {}), _pools["shown"])
    load = workloads.load_of(work, 0, tokens, _pools["shown"])
    lengths = tuple(k for k in suite.LENGTHS if k <= load.trace.k_max)
    rates = {"o1": found["o1"], "policy": found["rate"], "warm": found["warm"]}
    for name, pool in (("rule", "shown"), ("held_out", "held_out"), ("in_sample", "in_sample")):
        load = workloads.load_of(work, 0, tokens, _pools[pool])
        rates[name] = max(oracle.best_rule(load, curve, lengths, THRESHOLDS), found["o1"])
    row = {"workload": work.kind, "name": work.name, "batch": work.batch}
    return row | {name: rates[name] / found["o3"] for name in SHARES} | {"o3_over_o1": found["o3"] / found["o1"]}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means of the shares of O3 on stationary loads, and on the others each one's rate over O1."""
    steady = [r for r in rows if r["workload"] == "stationary"]
    batches = sorted({r["batch"] for r in rows})
    groups = {"all": steady} | {f"batch {b}": [r for r in steady if r["batch"] == b] for b in batches}
    shares = {
        name: {share: suite.geomean([r[share] for r in group]) for share in SHARES} for name, group in groups.items()
    }
    moving = [r for r in rows if r["workload"] != "stationary"]
    over = {f"{r['name']} {r['batch']}": {s: r[s] / r["o1"] for s in SHARES} for r in moving}
    worst = {share: min(r[share] for r in steady) for share in SHARES}
    return {"share_of_o3": shares, "worst_share_of_o3": worst, "over_o1": over}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--names", nargs="+", default=[], help="of recorded loads, such as code@0.7; all where left out"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=list(suite.BATCHES))
    parser.add_argument("--cost", default="plain")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/informed_oracle.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    whole = workloads.recorded()
    unknown = sorted(set(args.names) - set(whole))
    if unknown:
        raise ConfigError(f"no recorded load is named {unknown[0]!r}; expected some of {', '.join(whole)}")
    pool = {name: whole[name] for name in args.names or whole}
    with ProcessPoolExecutor(args.jobs) as workers:
        pools: dict[str, workloads.Pool] = {"shown": pool}
        for name, folds in (("held_out", FOLDS), ("in_sample", 1)):
            pools[name] = dict(zip(pool, workers.map(partial(told, folds=folds), pool.items()), strict=True))
    kinds = ["mixed", *(["switch"] if {workloads.EASY, workloads.HARD} <= set(pool) else [])]
    todo = [
        workloads.Workload(*names, batch)
        for batch in args.batches
        for names in [("stationary", name) for name in pool] + [(kind, kind) for kind in kinds]
    ]
    with ProcessPoolExecutor(args.jobs, initializer=_start, initargs=(pools,)) as workers:
        rows = list(workers.map(partial(cell, cost=args.cost), todo))
    found = {
        "command": shlex.join(["python", "benchmarks/informed_oracle.py", *(sys.argv[1:] if argv is None else argv)]),
        "code": provenance.code(),
        "versions": provenance.versions(),
        "summary": summary(rows),
        "cells": rows,
    }
    record.replace_text(args.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["summary"], indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NworError as error:
        sys.exit(f"informed_oracle.py: {error}")
