"""One drafting on the V1 runner: confidences, who goes on, how long each draft became."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nwor_vllm.kernels import StopState
from nwor_vllm.plugin.judge import DeviceJudge, HostJudge, Judge, Scratch
from nwor_vllm.plugin.messages import NO_ORDERS, DraftReport, Orders


class DraftRound:
    """The rows of a batch while their tokens are drafted, position by position.

    `dead` rows sample nothing in this step; `whole` rows must be drafted to the end, whatever the rule says. `state` is
    what outlives the round: the kernels' buffers, or on a CPU room for its logits.
    """

    def __init__(
        self,
        ids: Sequence[str],
        k: int,
        orders: Orders = NO_ORDERS,
        state: StopState | Scratch | None = None,
        dead: Sequence[bool] = (),
        whole: Sequence[int] = (),
        pads: bool = False,
    ) -> None:
        self.ids, self.k, self.pads = list(ids), k, pads
        self.limits = [max(0, min(orders.caps.get(i, k), k)) for i in self.ids] if orders.caps else [k] * len(self.ids)
        for row in whole:
            self.limits[row] = k
        self.dead = [row for row, d in enumerate(dead) if d]
        for row in self.dead:
            self.limits[row] = 0
        self.watches = k > 0 and state is not None and (orders.stop.active or orders.observe)
        self.may_stop = orders.stop.active or any(n < k for n in self.limits)
        self.tokens: list[torch.Tensor] = []
        self.probs: list[torch.Tensor] = []
        self.rows_written = self.rows_avoided = 0
        self.forwards = 0
        self.on: Sequence[bool] = ()  # rows that want a token after the last one, where anything can stop
        self.judge: Judge | None = None
        if self.watches and state is not None:
            bias = [orders.bias.get(i, 0.0) for i in self.ids]
            whole = [row for row in whole if self.limits[row]]
            rows = orders.stop, k, self.limits, bias, whole
            self.judge = HostJudge(state, *rows) if isinstance(state, Scratch) else DeviceJudge(state, *rows)

    def take(self, tokens: torch.Tensor, probs: torch.Tensor | None) -> bool:
        """The draft tokens of the next position, judged already; whether one more is worth drafting."""
        self.tokens.append(tokens)
        if probs is not None:
            self.probs.append(probs)
        if not self.may_stop:
            return True
        self.on = self.judge.alive() if self.judge is not None else [n > len(self.tokens) for n in self.limits]
        return any(self.on)

    def lengths(self) -> Sequence[int]:
        if self.judge is not None:
            return self.judge.lengths()
        return [min(n, len(self.tokens)) for n in self.limits]

    def drafts(self) -> torch.Tensor:
        """[requests, k]; columns that were not drafted are zero, and no request keeps them."""
        missing = self.k - len(self.tokens)
        return torch.stack(self.tokens + [torch.zeros_like(self.tokens[0])] * missing, dim=1)

    def report(self, lengths: Sequence[int] = ()) -> DraftReport:
        """`lengths` as `lengths()` gave them, where drafts were taken."""
        told: dict[str, int] = {}
        confidence: dict[str, tuple[float, ...]] = {}
        if lengths:
            dead = set(self.dead)
            rows = [(row, i) for row, i in enumerate(self.ids) if row not in dead]
            told = {i: lengths[row] for row, i in rows}
            if self.judge is not None:
                seen = self.judge.confidence()
                confidence = {i: tuple(seen[row]) for row, i in rows}
        return DraftReport(self.k, self.forwards, told, confidence, self.rows_written, self.rows_avoided)


IDLE = DraftRound([], 0)
