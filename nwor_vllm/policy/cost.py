"""What a step takes: learnt online from step times, believed only where it was seen, monotone in what is asked of it.

seconds = w . (1, requests, draft steps, draft steps x requests, any draft at all, context, hinges of the verified
tokens) with w >= 0, so monotone, and convex in the tokens as rooflines are; times a correction per size bucket of the
verified tokens (graph padding and tile sizes make real costs step, not slope). Directions that the traffic does not
excite stay at the prior (one draft length at one batch size cannot tell verification from drafting; a ridge can).
Residuals are clipped, so that a suspended machine is one bounded mistake.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from typing import Any

import numpy as np

from nwor_vllm.policy.stop import Floats

HINGES = np.array([0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0])  # verified tokens from which another slope may add up
# Shares of a step before anything is known: a large target, a drafter of a tenth of it, verification almost free.
PRIOR_SHARES = np.array([1.0, 0.004, 0.08, 0.0005, 0.02, 0.001, 0.003, *[0.0005] * (len(HINGES) - 1)])
SIZE = len(PRIOR_SHARES)
DRAFT, DRAFT_REQUEST, TOKENS = 2, 3, 6  # places in the vectors
PRIOR_STRENGTH = 1.0  # the prior's standard deviation is the weight itself over this
NOISE = 0.05  # expected relative noise of a step time
CLIP = 3.0  # residuals beyond this many noises have no more influence
MEMORY = 2000.0  # steps
EAGER = 64  # solve after every step until this many were seen, then every SOLVE_EVERY
SOLVE_EVERY = 8
ROWS, BUCKETS, FINE = 12, 48, 4.0  # corrections per octave of requests, and per quarter octave of verified tokens
BUCKET_PRIOR = 2.0
SHORTEST = 1e-9  # seconds; no step is predicted to be free
KERNEL = np.exp(-np.abs(np.subtract.outer(np.arange(BUCKETS), np.arange(BUCKETS))) / 0.5)  # neighbours share evidence
PLACES = np.arange(BUCKETS)


def _row(requests: float) -> int:
    return min(ROWS - 1, round(math.log2(max(requests, 1))))


class Cost:
    def __init__(self, memory: float = MEMORY) -> None:
        self.keep = math.exp(-1.0 / memory)
        self.weights: Floats = np.zeros(SIZE)
        self.prior: Floats = np.zeros(SIZE)
        self.moment: Floats = np.zeros((SIZE, SIZE))
        self.target: Floats = np.zeros(SIZE)
        self.bucket: Floats = np.zeros((2, ROWS, BUCKETS))  # sum of log ratios, count
        self.correction: Floats = np.ones((ROWS, BUCKETS))
        self.seen = 0
        self.scales: list[float] = []
        self.error = math.nan  # moving mean of |log(measured / predicted)|

    @property
    def known(self) -> bool:
        return self.seen > 0

    def features(self, requests: float, verified: Floats, steps: Floats, context: float) -> Floats:
        x = np.empty((len(verified), SIZE))
        x[:, 0], x[:, 1], x[:, DRAFT], x[:, DRAFT_REQUEST] = 1.0, requests, steps, steps * requests
        x[:, 4], x[:, 5] = steps > 0, context / 1024.0
        np.maximum(verified[:, None] - HINGES, 0.0, out=x[:, TOKENS:])
        return x

    def predict(self, requests: float, verified: Floats, steps: Floats, context: float = 0.0) -> Floats:
        """Seconds of steps that differ in verified tokens and draft steps; 1 per target-only step while unknown."""
        weights = self.weights if self.seen else PRIOR_SHARES
        base = self.features(requests, verified, steps, context) @ weights
        place = FINE * np.log2(np.maximum(verified, 1.0))
        seconds = base * np.interp(place, PLACES, self.correction[_row(requests)])
        return np.asarray(np.maximum(seconds, SHORTEST))

    def draft_step(self, requests: float) -> float:
        """Seconds of one more draft step."""
        w = self.weights if self.seen else PRIOR_SHARES
        return float(w[DRAFT] + w[DRAFT_REQUEST] * requests)

    def verify_slot(self, requests: float, tokens: float, context: float = 0.0) -> float:
        """Seconds of one more verified draft, around `tokens` of them: the slope over a sixth either way."""
        width = max(1.0, 0.15 * tokens)
        low, high = self.predict(requests, np.array([tokens - width, tokens + width]), np.zeros(2), context)
        return max(0.0, float(high - low)) / (2.0 * width)

    def observe(self, requests: int, verified: int, steps: int, context: int, seconds: float) -> None:
        if not math.isfinite(seconds) or seconds <= 0 or requests <= 0:
            return
        x = self.features(requests, np.array([float(verified)]), np.array([float(steps)]), context)[0]
        if self.seen < EAGER:  # the first steps of a process are slow: the scale is their median, not the first
            self.scales.append(seconds / float(PRIOR_SHARES @ x))
            self.prior = PRIOR_SHARES * statistics.median(self.scales)
        if not self.seen:
            self.weights = self.prior.copy()
        expected = float(self.weights @ x)
        ratio = math.log(max(seconds, 1e-12) / expected)
        place = FINE * math.log2(max(verified, 1))
        corrected = ratio - math.log(float(np.interp(place, PLACES, self.correction[_row(requests)])))
        small = min(abs(corrected), 1.0)
        self.error = small if math.isnan(self.error) else self.error + 0.05 * (small - self.error)
        clipped = expected * math.exp(max(-CLIP * NOISE, min(CLIP * NOISE, ratio))) if self.seen >= EAGER else seconds
        if self.seen < EAGER and self.seen:
            clipped = min(max(seconds, expected / 3), expected * 3)
        scale = 1.0 / (NOISE * expected)
        self.moment = self.keep * self.moment + np.outer(x * scale, x * scale)
        self.target = self.keep * self.target + x * (clipped * scale * scale)
        self.seen += 1
        self._correct(_row(requests), place, max(-0.5, min(0.5, ratio)))
        if self.seen < EAGER or self.seen % SOLVE_EVERY == 0:
            self._solve()

    def _correct(self, row: int, place: float, ratio: float) -> None:
        cell = min(BUCKETS - 1, round(place))
        self.bucket[:, row, cell] *= 0.98
        self.bucket[0, row, cell] += ratio
        self.bucket[1, row, cell] += 1.0
        self._smooth(row)

    def _smooth(self, row: int) -> None:
        total, count = self.bucket[:, row] @ KERNEL
        self.correction[row] = np.exp(total / (count + BUCKET_PRIOR))

    def _solve(self) -> None:
        """Ridge towards the prior, weights not negative: coordinate descent from where it stands."""
        ridge = (PRIOR_STRENGTH / np.maximum(self.prior, 1e-12)) ** 2
        a = (self.moment + np.diag(ridge)).tolist()
        b = (self.target + ridge * self.prior).tolist()
        w = self.weights.tolist()
        for _ in range(6):
            for i, row in enumerate(a):
                rest = sum(map(mul, row, w)) - row[i] * w[i]
                w[i] = max(0.0, (b[i] - rest) / row[i])
        if not any(w):
            w = self.prior.tolist()
        self.weights = np.array(w)

    def seed(self, rows: Iterable[Sequence[float]]) -> None:
        """Start warm: (requests, verified tokens, draft steps, context tokens, seconds) as measured before."""
        for n, verified, steps, context, seconds in rows:
            self.observe(int(n), int(verified), int(steps), int(context), float(seconds))
        for _ in range(50):
            self._solve()

    def snapshot(self) -> dict[str, Any]:
        return {
            "weights": self.weights.tolist(),
            "prior": self.prior.tolist(),
            "moment": self.moment.tolist(),
            "target": self.target.tolist(),
            "bucket": self.bucket.tolist(),
            "seen": self.seen,
            "scales": list(self.scales),
            "error": None if math.isnan(self.error) else self.error,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.weights, self.prior = np.array(state["weights"], float), np.array(state["prior"], float)
        self.moment, self.target = np.array(state["moment"], float), np.array(state["target"], float)
        self.bucket = np.array(state["bucket"], float)
        for row in range(ROWS):
            self._smooth(row)
        self.seen = int(state["seen"])
        self.scales = [float(x) for x in state["scales"]]
        self.error = math.nan if state["error"] is None else float(state["error"])
