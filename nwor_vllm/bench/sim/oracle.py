"""What could have been had: O1 the best fixed length, the best rule on confidence, O2 the best table by batch size, O3
clairvoyance, and a bound that no schedule can pass. Proofs: docs/oracle.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.bench.sim.curves import Curve
from nwor_vllm.bench.sim.load import Ints, Lanes, Load
from nwor_vllm.bench.sim.replay import replay_tables
from nwor_vllm.bench.traces import Trace

Floats = NDArray[np.float64]
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of early exit
SHARES = (0.1, 0.25)  # of a draft step, that a round pays for each draft of its own; from .05 to .35 hardly matters


def fixed_rates(load: Load, curve: Curve, lengths: Sequence[int]) -> dict[int, float]:
    """Tokens per second of every fixed draft length. Without drafts every step of a constant batch is the same."""
    plain = (
        {0: load.batch / float(curve.seconds(load.batch, load.batch, 0))} if 0 in lengths and not load.batches else {}
    )
    rest = [k for k in lengths if k not in plain]
    found = replay_tables(load, curve, [{load.batch: k} for k in rest])
    return plain | {k: out.rate for k, out in zip(rest, found, strict=True)}


def o2(load: Load, curve: Curve, lengths: Sequence[int], rates: Mapping[int, float]) -> float:
    """The best table from batch size to draft length: coordinate ascent from the best fixed length."""
    best_k = max(rates, key=lambda k: rates[k])
    sizes = sorted(set(load.batches) or {load.batch})
    table, best = dict.fromkeys(sizes, best_k), rates[best_k]
    for size in sizes if len(sizes) > 1 else ():
        trials = [table | {size: k} for k in lengths]
        found = [out.rate for out in replay_tables(load, curve, trials)]
        if max(found) > best:
            best = max(found)
            table = trials[found.index(best)]
    return best


def best_rule(load: Load, curve: Curve, lengths: Sequence[int], thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Tokens per second of the best rule of early exit, in hindsight: a draft goes on, and is verified, while the
    product of its confidences is at least a threshold, up to a cap. All caps and thresholds are served side by side."""
    lanes, n, trace = Lanes(load), load.batch, load.trace
    survival = np.multiply.accumulate(trace.confidence, axis=1)
    sure = np.stack([(survival >= threshold).sum(axis=1) for threshold in thresholds])
    caps = np.array([k for k in lengths if k > 1])[:, None, None]
    kept = np.minimum(sure, caps).reshape(-1, sure.shape[1])  # [rules, positions of the trace]
    drafted = np.minimum(sure + 1, caps).reshape(kept.shape)  # the one that fell short was drafted too
    at = np.tile(lanes.start, (len(kept), 1))
    time = times(curve, n, trace.k_max, True)
    tokens, seconds = np.zeros((2, len(kept)))
    every = np.arange(len(kept))
    while len(every):
        here = at[every]
        place = every[:, None], lanes.position[here]
        verified, steps = kept[place], drafted[place].max(axis=1)
        gain = np.minimum(lanes.kept[here], verified) + 1
        seconds[every] += time[verified.sum(axis=1), steps]
        tokens[every] += gain.sum(axis=1)
        here = here + gain
        at[every] = np.where(here >= lanes.last, lanes.first, here)
        every = every[tokens[every] < load.tokens]
    return float((tokens / seconds).max())


def least_time(trace: Trace, price: Floats) -> Floats:
    """[positions + 1]: the least time from each position to the end of its request, when a round of k drafts takes
    price[k] whatever else goes on: the shortest path, as every round leads forward."""
    lengths = np.diff(trace.starts)
    longest, k_max = int(lengths.max()), len(price) - 1
    # Requests side by side, their ends aligned: column j is j tokens from the end.
    at = trace.starts[1:, None] - np.arange(longest + 1)
    inside = np.arange(longest + 1) <= lengths[:, None]
    at = np.where(inside, at, 0)
    rest = np.full((len(lengths), longest + 1 + k_max), np.inf)  # columns shifted by k_max: past the end is infinite
    rest[:, k_max] = 0.0
    accepted = trace.accepted
    back = np.arange(k_max + 1)
    for j in range(1, longest + 1):
        kept = accepted[np.minimum(at[:, j], len(accepted) - 1)]
        options = rest[:, j - 1 + k_max - back] + price
        rest[:, j + k_max] = np.where(back <= kept[:, None], options, np.inf).min(axis=1)
    out = np.zeros(len(accepted) + 1)
    rows, columns = np.nonzero(inside & (np.arange(longest + 1) > 0))
    out[at[rows, columns]] = rest[rows, columns + k_max]
    return out


def times(curve: Curve, n: int, k_max: int, judged: bool) -> Floats:
    """[drafts verified, draft steps]: what every step of n requests can take."""
    steps = np.arange(k_max + 1)
    return np.asarray(curve.seconds(n, n + np.arange(n * k_max + 1)[:, None], steps, steps * judged), float)


def prices(curve: Curve, n: int, k_max: int) -> Floats:
    """A step of n requests that all draft and verify k, for k = 0 .. k_max."""
    k = np.arange(k_max + 1)
    return np.asarray(curve.seconds(n, n * (1 + k), k), float)


def served(load: Load, least: Floats) -> float:
    """Tokens per second of all requests of the load, when request r takes least[start of r]."""
    order = np.array(load.order)
    starts, ends = load.trace.starts[order], load.trace.starts[order + 1]
    return float((ends - starts).sum() / least[starts].sum())


def exact_single(load: Load, curve: Curve) -> float:
    """O3 at batch 1: the shortest path over output positions, where a round from p with k drafts leads to p + k + 1."""
    return served(load, least_time(load.trace, prices(curve, 1, load.trace.k_max)))


def bound(load: Load, curve: Curve) -> float:
    """A rate that no schedule can pass, clairvoyant or not.

    A step that verifies V drafts runs at least V / n draft steps. Any line under its least time, as a function of V,
    splits over requests: each round pays its n-th of the step and its own drafts. Every line is a bound; the best of
    those along the lower hull is returned.
    """
    n, k_max = load.batch, load.trace.k_max
    drafts = np.arange(n * k_max + 1)
    seconds = np.asarray(curve.seconds(n, n + drafts, -(-drafts // n)), float)
    best = np.inf
    k = np.arange(k_max + 1)
    for a, b in pairwise(_lower_hull(drafts, seconds)):
        slope = (seconds[b] - seconds[a]) / (b - a)
        base = seconds[a] - slope * a
        if base > 0:
            best = min(best, served(load, least_time(load.trace, np.asarray(base / n + slope * k, float))))
    return best


def _lower_hull(x: Ints, y: Floats) -> list[int]:
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def clairvoyant(load: Load, curve: Curve) -> float:
    """The best schedule found that knows what would be kept: in every step the draft depth and each request's own
    length that bring most, valued by the time saved later on. Several valuations walk side by side; the best counts.
    """
    n, k_max = load.batch, load.trace.k_max
    flat = prices(curve, n, k_max)
    k = np.arange(k_max + 1.0)
    draft = float(curve.seconds(n, n, 1) - curve.seconds(n, n, 0))
    verify = [float(curve.seconds(n, n * (1 + x), 0) - curve.seconds(n, n, 0)) / (n * x) for x in (1, k_max)]
    base = float(curve.seconds(n, n, 0)) / n
    valuations, slots = [], []
    for slot in sorted(set(verify)):
        for share in SHARES:
            valuations.append(least_time(load.trace, np.asarray(base + (slot + share * draft) * k, np.float64)))
            slots.append(slot)
    valuations.append(least_time(load.trace, flat / n))
    slots.append(verify[1])
    left, price = np.array(valuations), np.array(slots)
    _, worth = _walk(load, curve, left, price, np.ones(len(slots)), load.tokens // 4)
    reached, _ = _walk(load, curve, left, price, worth, load.tokens)
    return float(reached.max())


def _walk(load: Load, curve: Curve, left: Floats, slots: Floats, worth: Floats, most: int) -> tuple[Floats, Floats]:
    """Rates reached, and work done per second, by valuation, in `most` tokens: each step maximises work - worth *
    seconds."""
    trace, lanes, n = load.trace, Lanes(load), load.batch
    depths = np.arange(trace.k_max + 1)
    end = np.repeat(trace.starts[1:], np.diff(trace.starts))
    here = np.arange(len(end))
    reach = np.minimum(np.minimum(trace.accepted, end - here - 1)[:, None], depths)
    landing = here[:, None] + reach + 1
    later = np.where(landing < end[:, None], left[:, np.minimum(landing, len(end))], 0.0)
    gain = (left[:, :-1, None] - later).astype(np.float32)
    net = gain - (worth * slots)[:, None, None].astype(np.float32) * reach
    # For each depth allowed, the length that brings most: its first occurrence among the running maxima.
    peak = np.maximum.accumulate(net, axis=2)
    fresh = np.concatenate([np.ones_like(peak[:, :, :1], bool), peak[:, :, 1:] > peak[:, :, :-1]], axis=2)
    choice = np.maximum.accumulate(np.where(fresh, depths, 0), axis=2)
    used = np.take_along_axis(np.broadcast_to(reach, net.shape), choice, axis=2).astype(np.int16)
    gain = np.take_along_axis(gain, choice, axis=2)
    table = times(curve, n, trace.k_max, False)
    count, every = len(left), np.arange(len(left))
    at = np.tile(lanes.start, (count, 1))
    tokens, seconds, work = np.zeros((3, count))
    while len(every):
        position = lanes.position[at[every]]
        verified, value = used[every[:, None], position], gain[every[:, None], position]
        total = verified.sum(axis=1, dtype=np.int64)
        time = table[total, depths]
        value = value.sum(axis=1)
        best = np.argmax(value - worth[every, None] * time, axis=1)
        rows = np.arange(len(every))
        taken = verified[rows, :, best].astype(np.int64) + 1
        tokens[every] += taken.sum(axis=1)
        seconds[every] += time[rows, best]
        work[every] += value[rows, best]
        moved = at[every] + taken
        at[every] = np.where(moved >= lanes.last, lanes.first, moved)
        every = every[tokens[every] < most]
    return tokens / seconds, work / seconds


def o3(load: Load, curve: Curve, rates: Mapping[int, float]) -> float:
    """The clairvoyant rate: exact at batch 1, else the best schedule found, and no less than O1."""
    if load.batch == 1 and not load.batches:
        return max(exact_single(load, curve), *rates.values())
    return max(clairvoyant(load, curve), *rates.values())
