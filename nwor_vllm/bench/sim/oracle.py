"""What could have been had: O1 the best fixed length, O2 the best table by batch size, O3 clairvoyance. See
docs/oracle.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.bench.sim.curves import Curve
from nwor_vllm.bench.sim.replay import Load, Outcome, Running, replay_fixed
from nwor_vllm.bench.traces import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def fixed_rates(load: Load, curve: Curve, lengths: Sequence[int]) -> dict[int, float]:
    """Tokens per second of every fixed draft length."""
    return {k: replay_fixed(load, curve, k).rate for k in lengths}


def exact_single(load: Load, curve: Curve) -> float:
    """O3 at batch 1: the shortest path over output positions, where a round from p with k drafts leads to p + k + 1."""
    trace, times = load.trace, curve.seconds(1, 1 + np.arange(load.trace.k_max + 1), np.arange(load.trace.k_max + 1))
    price = [float(t) for t in times]
    memo: dict[int, float] = {}
    tokens, seconds, i = 0, 0.0, 0
    while tokens < load.tokens:
        request = load.order[i % len(load.order)]
        if request not in memo:
            memo[request] = _shortest(trace, request, price)
        seconds += memo[request]
        tokens += int(trace.starts[request + 1] - trace.starts[request])
        i += 1
    return tokens / seconds


def _shortest(trace: Trace, request: int, price: Sequence[float]) -> float:
    accepted = trace.accepted[trace.starts[request] : trace.starts[request + 1]].tolist()
    end = len(accepted)
    rest = [0.0] * (end + 1)
    for p in range(end - 1, -1, -1):
        rest[p] = min(price[k] + rest[p + k + 1] for k in range(min(accepted[p], end - p - 1) + 1))
    return rest[0]


def rounds_left(trace: Trace, k: int) -> Ints:
    """[positions + 1]: rounds a request still needs from each position when every round verifies k drafts."""
    left = np.zeros(len(trace.accepted) + 1, np.int64)
    for r in range(trace.requests):
        start, end = int(trace.starts[r]), int(trace.starts[r + 1])
        accepted = trace.accepted[start:end].tolist()
        own = [0] * (end - start + k + 2)
        for p in range(end - start - 1, -1, -1):
            own[p] = 1 + own[p + min(accepted[p], k) + 1]
        left[start:end] = own[: end - start]
    return left


def clairvoyant(load: Load, curve: Curve, base: int, rounds: int = 2) -> float:
    """The best draft length and trim of every step, knowing what would be kept, valued by the rounds saved later on.

    The value of a position is the number of rounds the fixed length `base` would still need from there: one exact
    improvement step over that fixed length, so it cannot be worse than it where the cost adds up over requests.
    """
    left = rounds_left(load.trace, base).astype(float)
    work_rate = load.batch / float(curve.seconds(load.batch, load.batch * (1 + base), base))
    best = 0.0
    for _ in range(rounds):
        out, work = _walk(load, curve, left, work_rate)
        best = max(best, out.rate)
        if abs(work / out.seconds - work_rate) < 1e-3 * work_rate:
            break
        work_rate = work / out.seconds
    return best


def _walk(load: Load, curve: Curve, left: Floats, work_rate: float) -> tuple[Outcome, float]:
    run, out, work = Running(load), Outcome(), 0.0
    k_max, depths = load.trace.k_max, np.arange(load.trace.k_max + 1)
    while out.tokens < load.tokens:
        n = len(run.ids)
        kept = np.minimum(load.trace.accepted[run.position], run.end - run.position - 1)
        reach = np.minimum(kept[:, None], depths)  # [n, depth]
        landing = run.position[:, None] + reach + 1
        after = np.where(landing < run.end[:, None], left[np.minimum(landing, len(left) - 1)], 0.0)
        gain = left[run.position][:, None] - after
        value, choice, seconds = _best_step(n, gain, reach, depths, curve, work_rate)
        taken = reach[np.arange(n), choice]
        out.tokens += n + int(taken.sum())
        out.seconds += seconds
        out.steps += 1
        out.draft_steps += int(taken.max()) if k_max else 0
        work += value
        run.advance(taken + 1, load.size(out.tokens))
    return out, work


def _best_step(n: int, gain: Floats, reach: Ints, depths: Ints, curve: Curve, rate: float) -> tuple[float, Ints, float]:
    """Draft depth and per-request lengths that maximise work - rate * seconds; slots at a few prices, as trims go."""
    slot = rate * curve.token
    best: tuple[float, float, Ints, float] | None = None
    for price in (0.0, 0.5 * slot, slot):
        net = gain - price * reach
        peak = np.maximum.accumulate(net, axis=1)
        # the shallowest depth at which each row reaches its best so far
        at = np.maximum.accumulate(np.where(net >= peak, np.where(net > np.roll(peak, 1, 1), depths, 0), 0), axis=1)
        used = np.take_along_axis(reach, at, axis=1)
        seconds = curve.seconds(n, n + used.sum(axis=0), depths)
        value = np.take_along_axis(gain, at, axis=1).sum(axis=0)
        d = int(np.argmax(value - rate * seconds))
        score = float(value[d] - rate * seconds[d])
        if best is None or score > best[0]:
            best = (score, float(value[d]), at[:, d], float(seconds[d]))
    assert best is not None
    return best[1], best[2], best[3]


def o3(load: Load, curve: Curve, rates: dict[int, float]) -> float:
    """The clairvoyant rate: exact at batch 1, else the best improvement over the best fixed lengths (and no less)."""
    if load.batch == 1 and not load.batches:
        return exact_single(load, curve)
    first = sorted(rates, key=lambda k: -rates[k])[:2]
    return max(max(rates.values()), *(clairvoyant(load, curve, k) for k in first))


def o2(load: Load, curve: Curve, lengths: Sequence[int]) -> float:
    """The best table from batch size to draft length: coordinate ascent from the best fixed length."""
    sizes = sorted(set(load.batches) or {load.batch})
    rates = fixed_rates(load, curve, lengths)
    best_k = max(rates, key=lambda k: rates[k])
    table, best = dict.fromkeys(sizes, best_k), rates[best_k]
    for size in sizes if len(sizes) > 1 else ():
        for k in lengths:
            trial = table | {size: k}
            rate = _table_rate(load, curve, trial)
            if rate > best:
                table, best = trial, rate
    return best


def _table_rate(load: Load, curve: Curve, table: dict[int, int]) -> float:
    run, out = Running(load), Outcome()
    sizes = np.array(sorted(table))
    while out.tokens < load.tokens:
        n = len(run.ids)
        k = table[int(sizes[np.argmin(np.abs(sizes - n))])]
        kept = np.minimum(k, run.end - run.position - 1)
        gain = np.minimum(load.trace.accepted[run.position], kept) + 1
        out.tokens += int(gain.sum())
        out.seconds += float(curve.seconds(n, n + int(kept.sum()), k if kept.max() > 0 else 0))
        run.advance(gain, load.size(out.tokens))
    return out.rate
