"""No regret: is the policy at least as good as not speculating, and as the best fixed draft length?

Each fixed length is shadowed on the same rounds: what it would have kept (known up to the first rejection; where a
round was cut short of it, the expected rest) and what the step would have cost under the same cost model. The pairing
removes the luck of the text from the comparison. Below 0.99 of a shadow, by more than its noise, the guard hands the
steps to that fixed length for a hold that doubles each time: trips in N steps grow as log N, so it cannot oscillate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nwor_vllm.policy.stop import Floats

FLOOR = 0.99
MEMORY = 400.0  # steps
MIN_STEPS = 6
SIGMAS = 2.0
FIRST_HOLD = 32
MAX_HOLD = 8192


class Guard:
    def __init__(self, ladder: Sequence[int]) -> None:
        self.ladder = tuple(ladder)
        self.keep = 1.0 - 1.0 / MEMORY
        self.hold = FIRST_HOLD
        self.left = 0  # steps until the policy is tried again
        self.fallback = -1  # the draft length that has the steps, -1 = the policy has them
        self.trips = 0
        self._clear()

    def _clear(self) -> None:
        rungs = len(self.ladder)
        self.steps = 0
        self.mine: Floats = np.zeros(2)  # discounted tokens, seconds
        self.shadow: Floats = np.zeros((2, rungs))
        self.scatter: Floats = np.zeros(rungs)  # discounted squares of the per-step difference of log rates
        self.weight = 0.0

    def observe(self, tokens: float, seconds: float, shadow_tokens: Floats, shadow_seconds: Floats) -> None:
        """One step of the policy, and what every fixed length would have made of it."""
        k = self.keep
        self.shadow = k * self.shadow + np.stack([shadow_tokens, shadow_seconds])
        if self.fallback >= 0:
            self._hold()
            return
        self.steps += 1
        self.weight = k * self.weight + 1.0
        self.mine = k * self.mine + (tokens, seconds)
        mine, shadow = self.mine / self.weight, self.shadow / self.weight
        difference = tokens / mine[0] - seconds / mine[1] - shadow_tokens / shadow[0] + shadow_seconds / shadow[1]
        self.scatter = k * self.scatter + difference * difference
        if self.steps >= MIN_STEPS:
            self._judge()
            if self.steps % (8 * FIRST_HOLD) == 0 and self.steps > 4 * self.hold:
                self.hold = max(FIRST_HOLD, self.hold // 2)

    def _hold(self) -> None:
        """Steps with the fallback still teach about shorter lengths: move down, never up, until the hold ends."""
        self.left -= 1
        if self.left <= 0:
            self.fallback = -1
            self._clear()
            return
        rates = self.shadow[0] / self.shadow[1]
        here = self.ladder.index(self.fallback)
        best = int(np.argmax(rates[: here + 1]))
        if rates[best] > rates[here] / FLOOR:
            self.fallback = self.ladder[best]

    def ratios(self) -> Floats:
        """The policy's rate over each fixed length's; ones before any step."""
        if not self.steps:
            return np.ones(len(self.ladder))
        return np.asarray((self.mine[0] / self.mine[1]) / (self.shadow[0] / self.shadow[1]))

    def _judge(self) -> None:
        error = np.sqrt(self.scatter) / self.weight
        upper = np.log(self.ratios()) + SIGMAS * error
        worst = int(np.argmin(upper))
        if upper[worst] < np.log(FLOOR):
            self.trips += 1
            self.fallback, self.left = self.ladder[worst], self.hold
            self.hold = min(2 * self.hold, MAX_HOLD)

    def snapshot(self) -> dict[str, Any]:
        return {
            "hold": self.hold,
            "left": self.left,
            "fallback": self.fallback,
            "trips": self.trips,
            "steps": self.steps,
            "mine": self.mine.tolist(),
            "shadow": self.shadow.tolist(),
            "scatter": self.scatter.tolist(),
            "weight": self.weight,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in ("hold", "left", "fallback", "trips", "steps"):
            setattr(self, name, int(state[name]))
        self.mine, self.shadow = np.array(state["mine"], float), np.array(state["shadow"], float)
        self.scatter, self.weight = np.array(state["scatter"], float), float(state["weight"])
