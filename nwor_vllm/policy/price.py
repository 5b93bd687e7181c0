"""The survival that a judged slot must have to pay for its verification: what thresholds would have done tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nwor_vllm.policy.cost import Cost
from nwor_vllm.policy.evidence import Batch, Seen
from nwor_vllm.policy.stop import Floats

TRIED = np.array([0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
SAMPLE = 64  # rounds that are looked at, or those of the newest step
STEADY = 0.2  # how much of the way to what a lesson finds
LEVEL = 0.01  # rates of one request that differ by less are the same: so much of a cost is noise


class Price:
    def __init__(self) -> None:
        self.known = False
        self.value = 0.0
        self.slot = 0.0  # what a slot costs by the slope of the step times

    def learn(self, seen: Sequence[Seen], batch: Batch, predicted: Floats, cost: Cost, overhead: float) -> None:
        """Move to the threshold that would have served the newest steps best. `predicted`: calibrated confidences;
        `overhead`: steps without a round that come with each token."""
        first = min(int(np.searchsorted(batch.starts, batch.starts[-1] - SAMPLE)), len(seen) - 1)
        cut = np.minimum(batch.starts[first:], batch.starts[first] + SAMPLE)
        shown, begin = batch.shown[cut[0] : cut[-1]], cut[:-1] - cut[0]
        judged = np.flatnonzero(np.maximum.reduceat(shown, begin))
        if not len(judged):
            return
        survival = np.multiply.accumulate(predicted[cut[0] : cut[-1]], axis=1)
        worth = (survival >= TRIED[:, None, None]) & (np.arange(survival.shape[1]) < shown[:, None])
        rounds = np.stack([(survival * worth).sum(axis=2), worth.sum(axis=2)])
        kept, slots = (np.add.reduceat(rounds, begin, axis=2) / np.diff(cut))[:, :, judged]  # [thresholds, steps]
        steps = [seen[first + i].step for i in judged.tolist()]
        n, drafts, context = np.array([(len(s.rounds), s.draft_steps, s.context_tokens) for s in steps], float).T
        tokens = (n * (1.0 + kept)).sum(axis=1)
        seconds = cost.predict(n, n * (1.0 + slots), drafts, context, drafts).sum(axis=1)
        rates = tokens / (seconds * (1.0 + overhead * tokens / n.sum()))
        requests = float(n.mean())
        self._move(TRIED[rates >= rates.max() * (1.0 - LEVEL / requests)], requests)

    def _move(self, good: Floats, requests: float) -> None:
        """No draft's survival lies between the thresholds that are best: a price among them is as good as any. Of few
        requests no draft goes on below the price, and only the slope says that it is too high."""
        near = self.value + (self.slot - self.value) / requests
        best = float(min(max(near, good[0]), good[-1]))
        self.value = self.value + STEADY * (best - self.value) if self.known else best
        self.known = True

    def snapshot(self) -> dict[str, Any]:
        return {"known": self.known, "value": self.value, "slot": self.slot}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.known, self.value, self.slot = bool(state["known"]), float(state["value"]), float(state["slot"])
