"""One drafting on the V1 runner: confidences, who goes on, how long each draft became."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nwor_vllm.plugin.messages import NO_ORDERS, DraftReport, Orders
from nwor_vllm.policy import StopRule


def max_probability(logits: torch.Tensor) -> torch.Tensor:
    """The confidence of a slot: a statistic of its draft distribution, never of the token drawn from it."""
    return torch.exp(logits.amax(dim=-1).float() - torch.logsumexp(logits.float(), dim=-1))


def expected(rule: StopRule, position: int, confidence: torch.Tensor) -> torch.Tensor:
    """The probability that the draft at `position` is accepted, given that it is reached."""
    if not rule.calibration:
        return confidence
    intercept, slope = rule.calibration[min(position, len(rule.calibration) - 1)]
    return torch.sigmoid(intercept + slope * torch.logit(confidence, eps=1e-6))


class DraftRound:
    """The rows of a batch while their tokens are drafted, position by position."""

    def __init__(
        self, ids: Sequence[str], k: int, orders: Orders, dead: Sequence[bool], whole: Sequence[bool], pads: bool
    ) -> None:
        """`dead`: rows that sample nothing in this step; `whole`: rows that must be drafted to the end."""
        self.ids, self.k, self.orders, self.pads = list(ids), k, orders, pads
        limits = [
            0 if d else k if w else min(orders.caps.get(i, k), k) for i, d, w in zip(ids, dead, whole, strict=True)
        ]
        self.limits = torch.tensor(limits)
        self.whole = torch.tensor(list(whole)) if any(whole) else None
        self.alive = self.limits > 0
        self.survival = torch.ones(len(limits))
        self.lengths = torch.zeros(len(limits), dtype=torch.int64)
        self.confidences: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.probs: list[torch.Tensor] = []
        self.rows_written = self.rows_avoided = 0
        self.forwards = 0

    @property
    def watches(self) -> bool:
        """Whether anyone wants the confidences."""
        return self.orders.stop.active or self.orders.observe

    @property
    def may_stop(self) -> bool:
        return self.orders.stop.active or bool((self.limits < self.k).any())

    def score(self, logits: torch.Tensor | None, tokens: torch.Tensor, probs: torch.Tensor | None) -> bool:
        """Take draft position `len(self.tokens)` of every row; whether one more is worth drafting."""
        position = len(self.tokens)
        self.tokens.append(tokens)
        if probs is not None:
            self.probs.append(probs)
        go_on = torch.ones_like(self.alive)
        gain = None
        if logits is not None:
            confidence = max_probability(logits).to("cpu")
            self.confidences.append(confidence)
            go_on, gain = self._judge(position, confidence)
        self.alive &= go_on
        self.lengths += self.alive
        self.alive &= self.limits > position + 1
        if not self.may_stop:
            return True
        rows = self.alive
        if gain is not None and self.orders.stop.draft_cost and bool(rows.any()) and self.whole is None:
            return float(gain[rows].sum()) > self.orders.stop.draft_cost
        return bool(rows.any())

    def _judge(self, position: int, confidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Who keeps this slot, and what one more draft step would bring each row. A NaN keeps nothing."""
        rule = self.orders.stop
        chance = expected(rule, position, confidence)
        self.survival = self.survival * chance
        floor = max(rule.min_survival, rule.verify_cost)
        keeps = (confidence >= rule.threshold) & (self.survival >= floor)
        if self.whole is not None:
            keeps |= self.whole
        return keeps, torch.clamp(self.survival * chance - rule.verify_cost, min=0.0)

    def drafts(self) -> torch.Tensor:
        """[requests, k]; columns that were not drafted are zero, and no request keeps them."""
        drafted = torch.stack(self.tokens, dim=1)
        return torch.nn.functional.pad(drafted, (0, self.k - drafted.shape[1]))

    def report(self) -> DraftReport:
        kept = [min(n, self.k) for n in self.lengths.tolist()]
        scores = torch.stack(self.confidences, dim=1).tolist() if self.confidences else []
        confidence = {}
        if scores:
            confidence = {
                i: tuple(row[: min(n + 1, limit)])
                for i, row, n, limit in zip(self.ids, scores, kept, self.limits.tolist(), strict=True)
            }
        lengths = dict(zip(self.ids, kept, strict=True))
        return DraftReport(
            self.k, self.forwards, lengths, confidence, rows_written=self.rows_written, rows_avoided=self.rows_avoided
        )


IDLE = DraftRound([], 0, NO_ORDERS, [], [], pads=False)
