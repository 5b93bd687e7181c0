"""Does reading the drafter's confidence pay? The plan that uses it, against the one that history alone makes.

Both are good plans, so the better one has the steps, without waiting for certainty. What judged steps took is held
against what the plain plan would have for the same text. While it loses, the plain plan has the steps for a wait that
doubles; then as many judged steps as at first say whether that still holds, with the evidence of before at a quarter of
its weight: early steps were judged by a confidence that was not calibrated yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MEMORY = 400.0  # judged steps
TRIAL = 12  # judged steps before a verdict, the first and after every wait
SEVERAL, MOST = 4, 1.5  # requests of which so many steps are evidence enough; no step is more than so many of them
FIRST_WAIT, MAX_WAIT = 64, 1024  # steps
SIGMAS = 2.0
MARGIN = 0.02  # in log rate; what a step without judging takes is guessed, among judged ones, and guessed too high
FIELDS = ("tried", "left", "wait", "mine", "plain", "weight", "scatter")


def _worth(requests: float) -> float:
    """How much evidence a step is: luck averages out over its requests, the luck of its time does not."""
    share = max(requests, 1.0) / SEVERAL
    return share if share < 1.0 else min(math.sqrt(share), MOST)


class Judging:
    def __init__(self) -> None:
        self.tried = 0.0  # judged steps since they have had the steps
        self.left, self.wait = 0, FIRST_WAIT  # steps until judging is tried again, if it is not now
        self.mine = self.plain = self.weight = 0.0  # discounted: seconds of judged steps, of the plain plan's, steps
        self.scatter = 0.0  # discounted squares of the difference of both's log rates

    @property
    def on(self) -> bool:
        return self.left <= 0

    def due(self, requests: int) -> float:
        """Judged steps of so many requests until a trial has its verdict."""
        return (TRIAL - self.tried) / _worth(requests) if self.on and self.tried < TRIAL else math.inf

    @property
    def advantage(self) -> float:
        """How many times as fast as the plain plan judged steps are, as far as that is known; at least 1."""
        return max(1.0, self.plain / self.mine) if self.on and self.weight >= TRIAL else 1.0

    def wait_on(self, n: int) -> None:
        """Steps have gone by."""
        if self.on:
            return
        self.left -= n
        if self.on:
            self.tried = 0.0
            self._fade(0.25)

    def observe(self, n: int, seconds: float, plain: float, requests: float = SEVERAL) -> None:
        """What `n` judged steps of so many requests each took, and what the plain plan would have."""
        if not n:
            return
        self._fade((1.0 - 1.0 / MEMORY) ** n)
        self.tried += n * _worth(requests)
        self.weight += n
        self.mine += seconds
        self.plain += plain
        self.scatter += (self.weight * (plain / self.plain - seconds / self.mine)) ** 2
        if self.tried >= TRIAL:
            self._judge()

    def _judge(self) -> None:
        worth = math.log(self.plain / self.mine)
        if worth + SIGMAS * math.sqrt(self.scatter) / self.weight < MARGIN:
            self.left, self.wait = self.wait, min(2 * self.wait, MAX_WAIT)
        elif worth > MARGIN:
            self.wait = FIRST_WAIT

    def _fade(self, k: float) -> None:
        self.mine, self.plain, self.weight, self.scatter = (
            k * x for x in (self.mine, self.plain, self.weight, self.scatter)
        )

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in FIELDS:
            setattr(self, name, type(getattr(self, name))(state[name]))
