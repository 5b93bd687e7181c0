"""Cost curves: the true step time of a simulated machine. Built-in models, or a profile measured on a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from nwor_vllm.errors import ConfigError, unknown_key
from nwor_vllm.policy import profile

Floats = NDArray[np.float64]
STEADY = 4.0  # how many other rows one counts as whose step verified as many drafts as it made
RECORDED = Path(__file__).parent / "recorded"


class Curve(Protocol):
    """A step of n requests verifies `verified` target rows, runs `steps` draft steps and judges `judged` of them."""

    @property
    def name(self) -> str: ...

    def seconds(self, n: Any, verified: Any, steps: Any, judged: Any = 0) -> Any:
        """Arguments are numbers or arrays that broadcast."""
        ...


@dataclass(frozen=True)
class Roofline:
    """seconds = max(weights + request * n, token * padded verified tokens) + draft steps * (draft + draft_request * n)
    + draft_start where anything is drafted + judge * judged draft steps."""

    name: str
    weights: float  # reading the target's weights
    request: float  # one more request's KV cache and bookkeeping
    token: float  # one more verified token, once compute-bound
    draft: float  # one draft step
    draft_request: float  # one more request in it
    draft_start: float = 0.0  # what drafting costs before its first step
    judge: float = 0.0  # reading a draft step's distribution for its confidence
    pad: int = 1  # verified tokens are padded to multiples of this (graph capture sizes)
    additive: bool = False  # tokens cost from the first one on, not only beyond the memory bound

    def seconds(self, n: Any, verified: Any, steps: Any, judged: Any = 0) -> Any:
        tokens = np.ceil(np.asarray(verified) / self.pad) * self.pad if self.pad > 1 else np.asarray(verified)
        memory = self.weights + self.request * n
        target = memory + self.token * tokens if self.additive else np.maximum(memory, self.token * tokens)
        drafting = steps * (self.draft + self.draft_request * n) + self.draft_start * (np.asarray(steps) > 0)
        return target + drafting + self.judge * judged


CURVES: dict[str, Roofline] = {
    # A model, not a measurement: Llama-3.1-8B in bf16 on an H200 (4.3 TB/s, 711 TFLOP/s achieved), EAGLE and EAGLE-3;
    # a pass over 128 k logits judges a draft.
    "h200-8b-eagle": Roofline("h200-8b-eagle", 3.5e-3, 3.1e-5, 2.2e-5, 3.6e-4, 2e-6, judge=1e-5, pad=8),
    "h200-8b-eagle3": Roofline("h200-8b-eagle3", 3.5e-3, 3.1e-5, 2.2e-5, 1.75e-4, 2e-6, judge=1e-5, pad=8),
}


@dataclass(frozen=True)
class Measured:
    """A profile's own shape. For each batch size that was measured, non-negative weights of the features below; between
    sizes, the step of as many tokens a request, interpolated."""

    name: str
    sizes: Floats  # ascending
    knots: Floats  # tokens per request where the verification's slope may change
    weights: Floats  # [sizes, features]

    def seconds(self, n: Any, verified: Any, steps: Any, judged: Any = 0) -> Any:
        n, verified, steps, judged = np.broadcast_arrays(*(np.asarray(x, float) for x in (n, verified, steps, judged)))
        x = _features(verified / np.maximum(n, 1.0), steps, judged, self.knots)
        last = len(self.sizes) - 1
        right = np.clip(np.searchsorted(self.sizes, n), min(1, last), last)
        left = np.maximum(right - 1, 0)
        low, high = (x * self.weights[left]).sum(axis=-1), (x * self.weights[right]).sum(axis=-1)
        return low + (n - self.sizes[left]) / np.maximum(self.sizes[right] - self.sizes[left], 1.0) * (high - low)


def _features(per_request: Floats, steps: Floats, judged: Floats, knots: Floats) -> Floats:
    """Hinges of the tokens a request, 1, any draft to verify at all, any draft at all and the draft prefill's tokens,
    draft steps, judged ones."""
    drafts = steps > 0
    hinges = np.maximum(per_request[..., None] - knots, 0.0)
    rest = [np.ones_like(per_request), per_request > 1.0, drafts, drafts * per_request, steps, judged > 0, judged]
    return np.concatenate([hinges, np.stack(rest, axis=-1)], axis=-1)


def fit(rows: Sequence[Sequence[float]], name: str) -> Measured:
    """Least absolute-ish error in log time per batch size: weighted non-negative least squares, outliers reweighted.

    Monotone by its weights. Context is what the short half of the rows had.
    """
    data = np.array(rows, float)
    if data.ndim != 2 or len(data) < 6:
        raise ConfigError(f"{len(data)} step times are too few to fit a cost curve; expected at least 6")
    sizes = np.unique(data[:, 0])
    knots = np.array([1.0, 3.0, 6.0, 11.0])
    weights = []
    for size in sizes:
        mine = data[data[:, 0] == size]
        mine = mine[mine[:, 4] <= np.median(mine[:, 4])] if len(mine) >= 24 else mine
        x = _features(mine[:, 1] / size, mine[:, 2], mine[:, 3], knots)
        seconds = mine[:, 5]
        # A length that stays what it is is what serving mostly runs, and drawn lengths hardly ever show.
        often = np.where(mine[:, 1] == size * (1.0 + mine[:, 2]), STEADY, 1.0)
        trust = np.ones(len(seconds))
        for _ in range(8):
            weight = np.sqrt(often * trust)
            solved, _ = optimize.nnls(x * (weight / seconds)[:, None], weight)
            error = np.abs(np.log(np.maximum(x @ solved, 1e-12) / seconds))
            trust = np.minimum(1.0, 0.03 / np.maximum(error, 1e-6))
        weights.append(solved)
    return Measured(name, sizes, knots, np.array(weights))


def find(name: str) -> Curve:
    """A built-in curve, a measured profile of the package (`plain` is cost-plain.json), or a profile's file."""
    if name in CURVES:
        return CURVES[name]
    if name.endswith(".json"):
        return fit(profile.read(Path(name)).rows, Path(name).stem)
    shipped = {path.stem.removeprefix("cost-"): path for path in RECORDED.glob("cost-*.json")}
    if name in shipped:
        return fit(profile.read(shipped[name]).rows, name)
    raise unknown_key("cost curve", name, (*CURVES, *shipped))
