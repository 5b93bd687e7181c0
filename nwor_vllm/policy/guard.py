"""No regret: is the policy at least as good as not speculating, and as the best fixed draft length?

Every alternative is shadowed on the same text: the rounds it would have needed for it, and their time under the same
cost model. The pairing removes the luck of the text from the comparison. Below 0.99 of a shadow, by more than its
noise, the guard hands the steps to that alternative for a hold that doubles with each trip and halves only after four
holds' worth of good steps: trips in N steps grow slower than N over the hold, so it cannot oscillate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nwor_vllm.policy.stop import Floats

FLOOR = 0.99
MEMORY = 400.0  # steps
MIN_STEPS = 12
SIGMAS, SIGMAS_ZERO = 3.0, 1.0  # to leave for a length, and for none: nothing is risked there
FIRST_HOLD = 32
MAX_HOLD = 8192
POLICY = -1  # who has the steps, if not a fixed length


class Guard:
    def __init__(self, ladder: Sequence[int]) -> None:
        self.ladder = tuple(ladder)
        self.sigmas = np.array([SIGMAS if k else SIGMAS_ZERO for k in self.ladder])
        self.hold = FIRST_HOLD
        self.left = 0  # steps until the policy is tried again
        self.fallback = POLICY  # the draft length that has the steps
        self.trips = 0
        self._clear()

    def _clear(self) -> None:
        alternatives = len(self.ladder)
        self.steps = self.since = 0
        self.mine = 0.0  # discounted seconds
        self.shadow: Floats = np.zeros(alternatives)  # the same of every rung
        self.scatter: Floats = np.zeros(alternatives)  # discounted squares of the difference of log rates
        self.weight = 0.0

    def observe(self, n: int, seconds: float, shadow: Floats) -> None:
        """What `n` steps took, and what the same text would have taken with every fixed length."""
        k = (1.0 - 1.0 / MEMORY) ** n
        self.shadow = k * self.shadow + shadow
        if self.fallback != POLICY:
            self._hold(n)
            return
        self.steps += n
        self.weight = k * self.weight + n
        self.mine = k * self.mine + seconds
        difference = self.weight * (shadow / self.shadow - seconds / self.mine)
        self.scatter = k * self.scatter + difference * difference
        if self.steps >= MIN_STEPS:
            self._judge()
            self._relax(n)

    def idle(self, n: int) -> None:
        """Steps that drafted nothing: they compare nothing, but a hold ends."""
        if n and self.fallback != POLICY:
            self._ended(n)

    def _relax(self, n: int) -> None:
        self.since += n
        if self.since >= 4 * self.hold:
            self.hold, self.since = max(FIRST_HOLD, self.hold // 2), 0

    def _ended(self, n: int) -> bool:
        self.left -= n
        if self.left > 0:
            return False
        self.fallback = POLICY
        self._clear()
        return True

    def _hold(self, n: int) -> None:
        """Steps with a fixed length teach about the others, too."""
        if self._ended(n):
            return
        best = int(np.argmin(self.shadow))
        if self.shadow[best] < FLOOR * self.shadow[self.ladder.index(self.fallback)]:
            self.fallback = self.ladder[best]

    def ratios(self) -> Floats:
        """The rate of who has the steps over each alternative's; ones before any step."""
        if not self.steps:
            return np.ones(len(self.ladder))
        return np.asarray(self.shadow / self.mine)

    def _judge(self) -> None:
        ratios = np.log(self.ratios())
        upper = ratios + self.sigmas * np.sqrt(self.scatter) / self.weight
        worst = int(np.argmin(upper))
        if upper[worst] < np.log(FLOOR):
            self.trips += 1
            self.fallback = self.ladder[worst]
            self.left, self.hold = self.hold, min(2 * self.hold, MAX_HOLD)

    def snapshot(self) -> dict[str, Any]:
        return {
            "hold": self.hold,
            "left": self.left,
            "fallback": self.fallback,
            "trips": self.trips,
            "steps": self.steps,
            "since": self.since,
            "mine": self.mine,
            "shadow": self.shadow.tolist(),
            "scatter": self.scatter.tolist(),
            "weight": self.weight,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in ("hold", "left", "fallback", "trips", "steps", "since"):
            setattr(self, name, int(state[name]))
        self.mine, self.weight = float(state["mine"]), float(state["weight"])
        self.shadow, self.scatter = np.array(state["shadow"], float), np.array(state["scatter"], float)
