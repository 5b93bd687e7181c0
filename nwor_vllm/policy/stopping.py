"""The stop rule of `StopRule` while a round runs: one draft position of a whole batch at a time, in plain Python.

Numpy's calls cost more than the arithmetic of the few rows that a small machine drafts for. `stop.evaluate` says the
same of a recorded round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nwor_vllm.policy.base import StopRule
from nwor_vllm.policy.stop import LOG_ODDS_LIMIT

LEAST = 1.0 / (1.0 + math.exp(LOG_ODDS_LIMIT))  # confidences beyond which their log-odds are at the limit
MOST = 1.0 / (1.0 + math.exp(-LOG_ODDS_LIMIT))


class Stopping:
    """Who drafts on, and what is kept so far. `whole` rows are drafted to the end, whatever the rule says."""

    def __init__(
        self, rule: StopRule, k: int, caps: Sequence[int], bias: Sequence[float], whole: Sequence[int] = ()
    ) -> None:
        rows = len(caps)
        self.rule, self.k, self.caps, self.bias, self.whole = rule, k, caps, bias, whole
        self.drafted = 0
        self.going = [r for r in range(rows) if min(caps[r], k) > 0]  # rows that want the next draft token
        self.kept = [0] * rows
        self.seen: list[list[float]] = [[] for _ in range(rows)]  # confidences of each row while it drafted
        self._judges = rule.active
        self._survival = [1.0] * rows
        self._product = [1.0] * rows

    def take(self, confidence: Sequence[float]) -> None:
        """The confidences of the next position, of the rows that are `going`, in their order; NaN counts as 0."""
        for r, c in zip(self.going, confidence, strict=True):
            self.seen[r].append(c if c == c else 0.0)
        on = self._judged() if self._judges else self._capped()
        self.drafted += 1
        if self.drafted < self.k:
            self.going = sorted({*on, *self.whole}) if self.whole else on
        else:
            self.going = []
        for r in self.whole:
            self.kept[r] = self.drafted

    def _capped(self) -> list[int]:
        position = self.drafted
        for r in self.going:
            self.kept[r] = position + 1
        return [r for r in self.going if self.caps[r] > position + 1]

    def _judged(self) -> list[int]:
        rule, position, verify = self.rule, self.drafted, self.rule.verify_cost
        a, b = _last(rule.calibration, position) if rule.calibration else (0.0, 1.0)
        hazard = _last(rule.hazard, position + 1) if rule.hazard else None
        on, gain = [], 0.0
        for r in self.going:
            c = self.seen[r][-1]
            self._survival[r] = survival = self._survival[r] * (accept := _accept(a, b, c, self.bias[r]))
            self._product[r] = product = self._product[r] * c
            if c >= rule.threshold and product >= rule.min_survival and survival >= verify:
                self.kept[r] = position + 1
                if self.caps[r] > position + 1:
                    on.append(r)
                    worth = survival * (accept if hazard is None else hazard) - verify
                    if worth > 0.0:
                        gain += worth
        return on if rule.draft_cost <= 0 or gain > rule.draft_cost else []


def _accept(a: float, b: float, c: float, bias: float) -> float:
    """sigmoid(a + b * log_odds(c) + bias); comparisons, as calls of min and max cost more than the rest."""
    if c <= LEAST:
        odds = -LOG_ODDS_LIMIT
    elif c >= MOST:
        odds = LOG_ODDS_LIMIT
    else:
        odds = math.log(c / (1.0 - c))
    x = a + b * odds + bias
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def _last(values: Sequence[Any], index: int) -> Any:
    """The last one stands for all after it."""
    return values[index] if index < len(values) else values[-1]
