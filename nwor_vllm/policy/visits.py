"""When another draft length than the best is drafted: nothing is believed for ever because it is never tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PROBE_K = 2  # draft length of a probe from zero: the first hazards decide whether to come back
MAX_PROBE_WAIT = 512  # steps at zero
MAX_WAIT = 256  # steps between visits, at last
LOOK = 23  # steps between looks for one that may be better than believed
NEAR = 0.6  # zero's rate over the best one's, beyond which it is worth a look
FIELDS = ("idle", "idle_wait", "at", "wait", "number", "twice", "look_at")


class Visits:
    """Probes while the best length is zero, rarer as they fail; else visits of other lengths, for their cost: of its
    neighbours, ever more rarely, and of those that may well be better."""

    def __init__(self, ladder: Sequence[int], probe_interval: int, cost_interval: int) -> None:
        self.ladder, self.probe_interval = tuple(ladder), probe_interval
        self.idle, self.idle_wait = 0, probe_interval
        self.at, self.wait, self.number = 2, cost_interval // 2 or 1, 0  # the next visit's step
        self.twice = False
        self.look_at = LOOK

    def length(self, k: int, step: int, zero: float, promising: Callable[[], int | None]) -> int | None:
        """What step number `step` drafts instead of `k`, if it is one of those. `zero`: its rate over that of `k`;
        `promising` says which length may be better than `k`."""
        if k == 0:
            self.idle += 1
            if self.idle >= self.idle_wait:
                return next((r for r in self.ladder if r >= PROBE_K), self.ladder[-1])
            return None
        self.idle, self.idle_wait = 0, self.probe_interval
        if self.twice:  # the first step without drafts still verified those of the step before
            self.twice = False
            return 0
        if step >= self.at:
            return self._visit(k, step, zero)
        if step < self.look_at:
            return None
        self.look_at = step + LOOK
        return promising()

    def _visit(self, k: int, step: int, zero: float) -> int:
        """None, one rung shorter, one longer, in turn, rarer and rarer. Zero is dear where drafts are good: once seen,
        only where it is near."""
        here = self.ladder.index(k)
        turns = (0, max(0, here - 1), min(here + 1, len(self.ladder) - 1))
        if self.number % len(turns) == 0 < self.number and zero < NEAR:
            self.number += 1
        turn, self.at = self.number % len(turns), step + self.wait
        self.number += 1
        if turn == len(turns) - 1:
            self.wait = min(2 * self.wait, MAX_WAIT)
        length = self.ladder[turns[turn]]
        self.twice = length == 0
        return length

    def done(self, k: int) -> None:
        """A step has drafted `k`."""
        if k > 0 and self.idle >= self.idle_wait:  # that was a probe from zero
            self.idle, self.idle_wait = 0, min(2 * self.idle_wait, MAX_PROBE_WAIT)

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in FIELDS:
            setattr(self, name, type(getattr(self, name))(state[name]))
