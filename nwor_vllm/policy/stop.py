"""The stop rule of `StopRule` evaluated on recorded confidences: the twin of what the drafters and the kernels do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.policy.base import StopRule

LOG_ODDS_LIMIT = 12.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def log_odds(confidence: Floats) -> Floats:
    """Clipped log-odds; NaN counts as confidence 0."""
    c = np.minimum(np.fmax(confidence, 1e-12), 1.0 - 1e-12)  # fmax: NaN becomes the least
    return np.asarray(np.minimum(np.maximum(np.log(c / (1.0 - c)), -LOG_ODDS_LIMIT), LOG_ODDS_LIMIT))


def sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def padded(values: Sequence[float], k: int, default: float) -> Floats:
    """`values` for positions 1..k: the last one repeats, `default` where there is none."""
    if not len(values):
        return np.full(k, default)
    out = np.empty(k)
    n = min(k, len(values))
    out[:n] = values[:n]
    out[n:] = values[n - 1]
    return out


def evaluate(stop: StopRule, k: int, caps: Ints, bias: Floats, confidence: Floats) -> tuple[int, Ints]:
    """Draft steps run, and slots kept per row, when the rows' draft confidences are `confidence` [rows, >= k]."""
    rows = len(caps)
    if k <= 0 or rows == 0:
        return 0, np.zeros(rows, np.int64)
    c = confidence[:, :k]
    a = padded([x for x, _ in stop.calibration], k, 0.0)
    b = padded([y for _, y in stop.calibration], k, 1.0)
    p = sigmoid(a + b * log_odds(c) + bias[:, None])
    survival = np.cumprod(p, axis=1)
    keep = survival >= stop.verify_cost
    if stop.threshold > 0:
        keep &= c >= stop.threshold  # False for NaN
    if stop.min_survival > 0:
        keep &= np.cumprod(np.where(np.isnan(c), 0.0, c), axis=1) >= stop.min_survival
    kept = np.minimum(np.where(keep.all(axis=1), k, np.argmin(keep, axis=1)), caps)
    alive = (np.arange(1, k + 1) <= kept[:, None]) & (np.arange(1, k + 1) < caps[:, None])
    go_on = alive.any(axis=0)
    if stop.draft_cost > 0 and k > 1:
        following = padded(stop.hazard, k, 0.0)[1:] if stop.hazard else p[:, :-1]
        gain = np.maximum(0.0, survival[:, :-1] * following - stop.verify_cost) * alive[:, :-1]
        go_on[:-1] &= gain.sum(axis=0) > stop.draft_cost
    steps = k if go_on[:-1].all() else int(np.argmin(go_on[:-1])) + 1
    return steps, np.minimum(kept, steps)
