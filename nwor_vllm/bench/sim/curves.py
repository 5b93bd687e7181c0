"""Cost curves: the true step time of a simulated machine. Built-in models, or a profile measured on a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from nwor_vllm.errors import ConfigError, unknown_key
from nwor_vllm.policy import profile


@dataclass(frozen=True)
class Curve:
    """seconds = max(weights + request * n, token * padded verified tokens) + draft steps * (draft + draft_request * n)
    + draft_start where anything is drafted."""

    name: str
    weights: float  # reading the target's weights
    request: float  # one more request's KV cache and bookkeeping
    token: float  # one more verified token, once compute-bound
    draft: float  # one draft step
    draft_request: float  # one more request in it
    draft_start: float = 0.0  # what drafting costs before its first step
    pad: int = 1  # verified tokens are padded to multiples of this (graph capture sizes)
    additive: bool = False  # tokens cost from the first one on (CPUs), not only beyond the memory bound

    def seconds(self, n: Any, verified: Any, steps: Any) -> Any:
        tokens = np.ceil(np.asarray(verified) / self.pad) * self.pad if self.pad > 1 else np.asarray(verified)
        memory = self.weights + self.request * n
        target = memory + self.token * tokens if self.additive else np.maximum(memory, self.token * tokens)
        return target + steps * (self.draft + self.draft_request * n) + self.draft_start * (np.asarray(steps) > 0)


CURVES = {
    # A model, not a measurement: Llama-3.1-8B in bf16 on an H200 (4.3 TB/s, 711 TFLOP/s achieved), EAGLE and EAGLE-3.
    "h200-8b-eagle": Curve("h200-8b-eagle", 3.5e-3, 3.1e-5, 2.2e-5, 3.6e-4, 2e-6, pad=8),
    "h200-8b-eagle3": Curve("h200-8b-eagle3", 3.5e-3, 3.1e-5, 2.2e-5, 1.75e-4, 2e-6, pad=8),
}


def fit(rows: Sequence[Sequence[float]], name: str) -> Curve:
    """The additive curve nearest to measured rows in relative error, no part of it negative."""
    if len(rows) < 6:
        raise ConfigError(f"{len(rows)} step times are too few to fit a cost curve; expected at least 6")
    data = np.array(rows, float)
    n, verified, steps, seconds = data[:, 0], data[:, 1], data[:, 2], data[:, 4]
    design = np.stack([np.ones_like(n), n, verified, steps, steps * n, (steps > 0).astype(float)], axis=1)
    solved, _ = optimize.nnls(design / seconds[:, None], np.ones(len(seconds)))
    weights, request, token, draft, draft_request, start = map(float, solved)
    return Curve(name, weights, request, token, draft, draft_request, start, additive=True)


def find(name: str) -> Curve:
    if name in CURVES:
        return CURVES[name]
    if name.endswith(".json"):
        return fit(profile.read(Path(name)).rows, Path(name).stem)
    raise unknown_key("cost curve", name, CURVES)
