"""When another plan than the best has a step: nothing is believed for ever because it is never tried.

Where one length's rounds start, another length's would not, and the text may look better from there. A single step does
not show that, several in a row do; but they only tell something of many requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PROBE_K = 2  # draft length of a probe from zero: the first hazards decide whether to come back
MAX_PROBE_WAIT = 512  # steps at zero
MAX_WAIT = 256  # steps between visits, at last
LOOK = 23  # steps between looks for one that may be better than believed
NEAR = 0.6  # zero's rate over the best one's, beyond which it is worth a look
WORTH = 0.0  # log-odds of a first draft that make a probe's second step worth while
NOTHING = 1  # more steps of a visit to zero: the first one still verifies the drafts of the step before
PROBED = 16  # requests that draft in a probe from zero
MANY, IN_A_ROW = 64, 4  # requests that make visits so many steps long
FIELDS = ("idle", "idle_wait", "again", "awake", "at", "wait", "number", "look_at", "length", "left", "tells")


class Visits:
    """Probes while the best length is zero, rarer as they fail; else visits of other lengths, for what they cost and
    bring: of its neighbours, ever more rarely, and of those that may well be better."""

    def __init__(self, ladder: Sequence[int], probe_interval: int, cost_interval: int) -> None:
        self.ladder, self.probe_interval = tuple(ladder), probe_interval
        self.idle, self.idle_wait = 0, probe_interval
        self.again = False  # a probe goes on
        self.awake = 0  # steps since the best length was zero
        self.at, self.wait, self.number = 2, cost_interval // 2 or 1, 0  # the next visit's step
        self.look_at = LOOK
        self.length, self.left = 0, 0  # of the last visit, and the steps that it still has
        self.probes = False  # this step, if it is forced
        self.cap: int | None = None  # of what is verified in this step, for all requests but one
        self.tells = False  # it was one that says what rounds bring, and is not learnt from yet

    def forced(
        self, k: int, step: int, zero: float, kept: float, promising: Callable[[], int | None], requests: int = 1
    ) -> int | None:
        """What step number `step` drafts instead of `k`, if it is one of those. `zero`: its rate over that of `k`;
        `kept`: log-odds that a first draft is; `promising` says which length may be better than `k`."""
        self.cap, self.probes = None, k == 0
        if k == 0:
            self.idle, self.awake, self.left = self.idle + 1, 0, 0
            self.at, self.look_at = max(self.at, step + LOOK), max(self.look_at, step + LOOK)
            if self.idle < self.idle_wait and not self.again:
                return None
            # The first draft after a pause does not show what drafts cost, but only good ones are worth another.
            self.again = not self.again and kept > WORTH
            return next((r for r in self.ladder if r >= PROBE_K), self.ladder[-1])
        self.idle, self.awake, self.again = 0, self.awake + 1, False
        if self.awake >= self.idle_wait:  # drafts are good again, not just lucky
            self.idle_wait = self.probe_interval
        if self.left:
            self.left -= 1
            return self.length
        if step >= self.at:
            return self._visit(k, step, zero, requests)
        if step < self.look_at:
            return None
        self.look_at = step + LOOK
        length = promising()
        if length == 0:
            self.length, self.left = 0, NOTHING
        return length

    def _visit(self, k: int, step: int, zero: float, requests: int) -> int:
        """None; long drafts of which little is verified, as the slots of equal drafts never show what a slot costs; one
        rung shorter, one longer; in turn, rarer and rarer. Zero is dear where drafts are good: once seen, only where it
        is near."""
        here = self.ladder.index(k)
        shorter, longer = self.ladder[max(0, here - 1)], self.ladder[min(here + 1, len(self.ladder) - 1)]
        none = self.ladder[0]
        turns = [(none, none), (longer, max(1, shorter)), (shorter, shorter), (longer, longer)]
        if requests == 1 or longer <= max(1, shorter):
            del turns[1]
        if self.number % len(turns) == 0 < self.number and zero < NEAR:
            self.number += 1
        turn, self.at = self.number % len(turns), step + self.wait
        self.number += 1
        if turn == len(turns) - 1:
            self.wait = min(2 * self.wait, MAX_WAIT)
        self.length, verified = turns[turn]
        self.cap = verified if verified < self.length else None
        self.tells = self.length > 0 and self.cap is None and requests >= MANY
        self.left = NOTHING if self.length == 0 else IN_A_ROW - 1 if self.tells else 0
        return self.length

    def caps(self, requests: Sequence[str]) -> dict[str, int]:
        """Who drafts less than `forced` said."""
        if self.probes:  # a few tell whether drafts have become good
            stride = -(-len(requests) // PROBED)
            return {r: 0 for i, r in enumerate(requests) if i % stride}
        if self.cap is None:
            return {}
        whole = min(requests)  # somebody drafts to the end
        return {r: self.cap for r in requests if r != whole}

    def done(self, k: int) -> bool:
        """A step has drafted `k`; whether a visit is over that is to be learnt from at once."""
        if k > 0 and self.idle >= self.idle_wait:  # that was a probe from zero
            self.idle, self.idle_wait = 0, min(2 * self.idle_wait, MAX_PROBE_WAIT)
        over = self.tells and not self.left
        self.tells = self.tells and not over
        return over

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in FIELDS:
            setattr(self, name, type(getattr(self, name))(state[name]))
