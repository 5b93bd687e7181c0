"""One drafting on the V1 runner: confidences, who goes on, how long each draft became."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from nwor_vllm import kernels
from nwor_vllm.plugin.messages import NO_ORDERS, DraftReport, Orders


class DraftRound:
    """The rows of a batch while their tokens are drafted, position by position.

    `dead` rows sample nothing in this step; `whole` rows must be drafted to the end, whatever the rule says.
    """

    def __init__(
        self,
        ids: Sequence[str],
        k: int,
        orders: Orders = NO_ORDERS,
        state: kernels.StopState | None = None,
        dead: Sequence[bool] = (),
        whole: Sequence[bool] = (),
        pads: bool = False,
    ) -> None:
        self.ids, self.k, self.orders, self.state, self.pads = list(ids), k, orders, state, pads
        self.limits = [
            0 if d else k if w else max(0, min(orders.caps.get(i, k), k))
            for i, d, w in zip(ids, dead, whole, strict=True)
        ]
        self.drafting = [i for i, d in zip(ids, dead, strict=True) if not d]
        self.whole = torch.tensor([r for r, w in enumerate(whole) if w]) if any(whole) else None
        self.watches = state is not None and k > 0 and (orders.stop.active or orders.observe)
        self.may_stop = orders.stop.active or any(n < k for n in self.limits)
        self.tokens: list[torch.Tensor] = []
        self.probs: list[torch.Tensor] = []
        self.rows_written = self.rows_avoided = 0
        self.forwards = 0
        if self.watches and state is not None:
            n = len(self.ids)
            state.caps[:n] = torch.tensor(self.limits, dtype=torch.int32)
            state.bias[:n] = torch.tensor([orders.bias.get(i, 0.0) for i in self.ids])
            state.set_rule(orders.stop)
            state.reset()

    def score(self, logits: torch.Tensor | None, tokens: torch.Tensor, probs: torch.Tensor | None) -> bool:
        """Take the next draft position of every row; whether one more is worth drafting."""
        position = len(self.tokens)
        self.tokens.append(tokens)
        if probs is not None:
            self.probs.append(probs)
        if logits is not None and self.state is not None:
            kernels.confidence_and_stop(logits, self.state, position)
            if self.whole is not None:
                self.state.alive[self.whole] = position + 1 < self.k
                self.state.lengths[self.whole] = position + 1
        if not self.may_stop:
            return True
        return not bool(self.stopped().all())

    def stopped(self) -> torch.Tensor:
        """Rows that want no draft token after the last one."""
        if self.watches and self.state is not None:
            dead: torch.Tensor = ~self.state.alive[: len(self.ids)]
            return dead
        return torch.tensor(self.limits) <= len(self.tokens)

    def lengths(self) -> list[int]:
        if self.watches and self.state is not None:
            kept: list[int] = self.state.lengths[: len(self.ids)].tolist()
            return kept
        return [min(n, len(self.tokens)) for n in self.limits]

    def drafts(self) -> torch.Tensor:
        """[requests, k]; columns that were not drafted are zero, and no request keeps them."""
        drafted = torch.stack(self.tokens, dim=1)
        return torch.nn.functional.pad(drafted, (0, self.k - drafted.shape[1]))

    def report(self) -> DraftReport:
        report = DraftReport(self.k, self.forwards, rows_written=self.rows_written, rows_avoided=self.rows_avoided)
        if not self.tokens:
            return report
        lengths = dict(zip(self.ids, self.lengths(), strict=True))
        confidence = {}
        if self.watches and self.state is not None:
            table = self.state.confidence[: len(self.ids)].tolist()
            scores = dict(zip(self.ids, table, strict=True))
            confidence = {i: tuple(c for c in scores[i] if not math.isnan(c)) for i in self.drafting}
        return replace(report, lengths={i: lengths[i] for i in self.drafting}, confidence=confidence)


IDLE = DraftRound([], 0)
