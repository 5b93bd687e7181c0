"""What steps of one size take beyond the cost model's straight lines: graph padding and tile sizes make costs step.

A factor by requests and verified tokens, learnt from what is left of step times, which forgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nwor_vllm.policy.stop import Floats

ROWS, BUCKETS, FINE = 12, 48, 4.0  # corrections per octave of requests, and per quarter octave of verified tokens
PRIOR = 2.0  # steps of a size that say it is as any other
KNOWN = 3.0  # steps after which a size's residuals are clipped
WIDTH, FIRST_WIDTH = 0.15, 0.5  # to so much from what is believed; and before
AGE = 50.0  # steps of a size after which newer ones weigh more; a size that is rarely seen is not forgotten for it
KERNEL = np.exp(-np.abs(np.subtract.outer(np.arange(BUCKETS), np.arange(BUCKETS))) / 0.5)  # neighbours share evidence
PLACES = np.arange(BUCKETS)

Place = tuple[int, int]


def places(requests: Floats, verified: Floats) -> list[Place]:
    """The size of each step: row and bucket."""
    rows = np.minimum(np.rint(np.log2(np.maximum(requests, 1.0))), ROWS - 1).astype(int)
    buckets = np.minimum(np.rint(FINE * np.log2(np.maximum(verified, 1.0))), BUCKETS - 1).astype(int)
    return list(zip(rows.tolist(), buckets.tolist(), strict=True))


class Sizes:
    def __init__(self) -> None:
        self.told: Floats = np.zeros((2, ROWS, BUCKETS))  # sum of log ratios, count
        self.factor: Floats = np.ones((ROWS, BUCKETS))

    def along(self, requests: float, verified: Floats) -> Floats:
        """The factors of steps of so many requests."""
        row = min(ROWS - 1, round(math.log2(max(requests, 1))))
        return np.asarray(np.interp(FINE * np.log2(np.maximum(verified, 1.0)), PLACES, self.factor[row]))

    def factors(self, requests: Floats, verified: Floats) -> Floats:
        """Those of steps, each of its requests."""
        rows = np.minimum(np.rint(np.log2(np.maximum(requests, 1.0))), ROWS - 1).astype(np.int64)
        place = np.minimum(FINE * np.log2(np.maximum(verified, 1.0)), BUCKETS - 1.001)
        left = place.astype(np.int64)
        part = place - left
        return np.asarray((1.0 - part) * self.factor[rows, left] + part * self.factor[rows, left + 1])

    def learn(self, where: Sequence[Place], ratio: Floats, trust: Floats | None, scatter: float) -> None:
        """From steps whose times were so far, in logs, from what the lines say; `scatter`: how many times the least
        noise they have."""
        found: dict[Place, list[float]] = {}  # sum, count, and what was believed
        fade, trusts = math.exp(-1.0 / AGE), [1.0] * len(ratio) if trust is None else trust.tolist()
        for place, log, weight in zip(where, ratio.tolist(), trusts, strict=True):
            kept = found.get(place)
            if kept is None:
                kept = found[place] = [*self.told[:, *place].tolist(), math.log(self.factor[place])]
            now = kept[2]
            width = WIDTH if kept[1] >= KNOWN else FIRST_WIDTH
            kept[0] = fade * kept[0] + weight * max(now - width, min(now + width, log))
            kept[1] = fade * kept[1] + weight
        for place, (total, count, _) in found.items():
            self.told[:, *place] = total, count
        for row in {row for row, _ in found}:
            self._smooth(row, scatter)

    def doubt(self, scatter: float) -> None:
        """What is known was another machine's, or another day's."""
        self.told *= np.minimum(1.0, KNOWN / np.maximum(self.told[1], KNOWN))
        for row in range(ROWS):
            self._smooth(row, scatter)

    def clear(self) -> None:
        self.told[:] = 0.0

    def _smooth(self, row: int, scatter: float) -> None:
        """The more steps scatter, the more of them it takes to believe that a size is special."""
        total, count = self.told[:, row] @ KERNEL
        self.factor[row] = np.exp(total / (count + PRIOR * scatter**2))

    def snapshot(self) -> dict[str, Any]:
        return {"told": self.told.tolist(), "factor": self.factor.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.told, self.factor = np.array(state["told"], float), np.array(state["factor"], float)
