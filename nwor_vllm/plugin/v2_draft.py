"""What one V2 speculator knows about the round it drafts: confidences, who goes on, how long each draft became.

Device buffers are static, because CUDA graphs that contain `score` read and write them at every replay. Host fields are
valid from `begin` to the next `begin`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nwor_vllm.policy.base import StopRule

NO_RULE = StopRule()


class DraftStopped(Exception):
    """Every request of the batch has stopped: leave the draft loop."""


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One `propose`: what ran, what each request kept, what was not written."""

    k: int
    forwards: int  # draft forwards really run, the draft prefill included
    lengths: Mapping[str, int] = field(default_factory=dict)  # draft tokens kept, by request
    confidence: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of the kept tokens and the one cut
    rows_written: int = 0  # draft-layer KV rows, per layer
    rows_avoided: int = 0


class Drafts:
    def __init__(self, max_requests: int, max_k: int, device: torch.device) -> None:
        self.confidence = torch.zeros(max_requests, max_k, dtype=torch.float32, device=device)
        self.survival = torch.ones(max_requests, dtype=torch.float32, device=device)
        self.alive = torch.zeros(max_requests, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self.caps = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self.rejected = torch.zeros(max_requests, dtype=torch.int32, device=device)
        # Values, not constants: a captured graph must follow a rule that changes between steps.
        self.floors = torch.zeros(2, dtype=torch.float32, device=device)
        self.calibration = torch.tensor([(0.0, 1.0)] * max_k, dtype=torch.float32, device=device)
        self.rule = NO_RULE
        self.live = False  # inside `propose`: the host may look at device values; graph capture must not
        self.ids: list[str] = []
        self.k = self.forwards = 0

    def begin(
        self,
        ids: Sequence[str],
        k: int,
        rule: StopRule,
        caps: Mapping[str, int],
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
    ) -> None:
        self.ids, self.k, self.forwards = list(ids), k, 0
        n = len(self.ids)
        self._set_rule(rule)
        limits = torch.tensor([min(caps.get(i, k), k) for i in self.ids], dtype=torch.int32)
        self.caps[:n].copy_(limits, non_blocking=True)
        self.survival.fill_(1.0)
        self.lengths.zero_()
        self.alive.zero_()
        # A prompt that is not finished samples nothing, and its draft is thrown away: dead from the start.
        torch.logical_and(num_sampled[:n] > 0, self.caps[:n] > 0, out=self.alive[:n])
        self.rejected[:n].copy_(num_rejected[:n])
        self.live = True

    def _set_rule(self, rule: StopRule) -> None:
        if rule == self.rule:
            return
        self.rule = rule
        floors = (rule.threshold, max(rule.min_survival, rule.verify_cost))
        self.floors.copy_(torch.tensor(floors, dtype=torch.float32), non_blocking=True)
        table = rule.calibration or ((0.0, 1.0),)
        rows = [table[min(j, len(table) - 1)] for j in range(self.confidence.shape[1])]
        self.calibration.copy_(torch.tensor(rows, dtype=torch.float32), non_blocking=True)

    def score(self, logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Judge draft position `step` (a device scalar) of every row; returns who drafts on. Graph-safe: no host value.

        The slot is judged by its draft distribution, never by the token drawn from it: that keeps trimming lossless.
        """
        n = logits.shape[0]
        confidence = torch.softmax(logits.float(), dim=-1).amax(dim=-1)
        column = step.view(1)
        self.confidence[:n].index_copy_(1, column, confidence[:, None])
        intercept, slope = self.calibration.index_select(0, column)[0].unbind()
        survival = self.survival[:n] * torch.sigmoid(intercept + slope * torch.logit(confidence, eps=1e-6))
        self.survival[:n] = survival
        alive = self.alive[:n]
        alive &= (confidence >= self.floors[0]) & (survival >= self.floors[1])
        self.lengths[:n] += alive
        alive &= self.caps[:n] > step + 1
        return alive

    def exhausted(self) -> bool:
        """Whether one more draft step would pay for nobody. Waits for the device."""
        return not bool(self.alive[: len(self.ids)].any())

    def report(self, *, steps_run: int, prefill_rows: int, stops: bool, pads: bool) -> DraftReport:
        """The round as it went. Waits for the device, once."""
        n, k = len(self.ids), self.k
        table = torch.cat((self.lengths[:n, None], self.rejected[:n, None], self.confidence[:n]), dim=1).tolist()
        lengths: dict[str, int] = {}
        confidence: dict[str, tuple[float, ...]] = {}
        written, due = prefill_rows, prefill_rows + n * max(k - 1, 0)
        for request_id, (length, rejected, *scores) in zip(self.ids, table, strict=True):
            kept = min(int(length), k) if stops else k
            lengths[request_id] = kept
            confidence[request_id] = tuple(scores[: min(kept + 1, steps_run)]) if stops else ()
            written -= int(rejected) if pads else 0
            # Draft step j writes the row of draft token j - 1, so a request that kept L tokens needs min(L, steps) rows.
            written += min(kept, steps_run - 1) if pads and stops else max(steps_run - 1, 0)
        return DraftReport(k, steps_run, lengths, confidence, rows_written=written, rows_avoided=due - written)
