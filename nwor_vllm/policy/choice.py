"""Which draft length pays: the tokens that every rung is expected to bring, over the time that they take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nwor_vllm.policy.cost import Cost
from nwor_vllm.policy.shadow import Walkers
from nwor_vllm.policy.stop import Floats, Ints

SAMPLE = 64  # rows that say which is best
TRIMS = np.array([0.0, 0.5, 1.0, 2.0])  # prices of a verified slot that are tried, over the slope of the cost there


class Choice(NamedTuple):
    best: int  # place of the best length, among the rungs
    own: int  # of the best one of rounds that start where the policy's do
    rate: float  # tokens per second
    worth: float  # lambda: tokens that one second more must bring
    zero: float  # rate of the first rung over that
    rates: Floats  # of every length, over that: what may be taken
    slot: float = 0.0  # price of a verified slot by the slope of the cost there
    price: float = 0.0  # survival that a verified slot must have, where nothing is judged


class Chooser:
    def __init__(self, rungs: Ints, cost: Cost, walkers: Walkers) -> None:
        self.rungs, self.lengths = rungs, rungs.astype(float)
        self.cost, self.walkers = cost, walkers

    def choose(
        self, survival: Floats, context: int, trims: bool, most: float, doubt: float, advantage: float
    ) -> Choice:
        """`most`: verified tokens at most; `doubt`: by how much zero must be better where all tokens are drafts;
        `advantage`: how many times as fast drafts are with what is not weighed here."""
        n, lengths = len(survival), self.lengths
        sums = np.zeros(survival.shape[1] + 1)
        np.add.accumulate(survival.sum(axis=0), out=sums[1:])
        full = sums[self.rungs]
        zero = (1.0 - doubt * float(full[-1]) / (n + float(full[-1]))) / advantage
        trust = np.where(self.rungs == 0, zero, n * (1.0 + lengths) <= most)
        seconds, slots = self.cost.lengths(n, lengths, context)
        found = self._pick(n, n + full, np.maximum.accumulate(seconds), trust)
        k, slot = lengths[found.best], found.worth * float(slots[found.best])
        found = found._replace(slot=slot)
        if not trims or n == 1 or k == 0:
            return found
        # Trimming must pay as a whole: where verification is free up to a size, a slope across its end says nothing.
        prices = slot * TRIMS
        some = survival[:: max(1, n // SAMPLE)]
        worth = (some >= prices[:, None, None]).astype(float)
        sums = np.zeros((2, len(TRIMS), survival.shape[1] + 1))
        np.einsum("rj,prj->pj", some, worth, out=sums[0, :, 1:])
        np.einsum("prj->pj", worth, out=sums[1, :, 1:])
        kept, verified = np.add.accumulate(sums, axis=2)[:, :, self.rungs] * (n / len(some))
        seconds = self.cost.predict(n, n + verified, lengths, context)
        found = self._pick(n, n + kept, np.maximum.accumulate(seconds, axis=1), trust)
        trim, best = divmod(found.best, len(lengths))
        return found._replace(best=best, own=found.own % len(lengths), slot=slot, price=float(prices[trim]))

    def _pick(self, n: int, tokens: Floats, seconds: Floats, trust: Floats) -> Choice:
        """The best of these. Prompts take steps of their own, as long as those with rounds: where a text is few rounds
        long, long steps cost more than their tokens per second say. And a drafter that drafts must read them."""
        overhead, reading = self.walkers.overhead / n, self.walkers.fed * self.cost.prompt_token * (self.lengths > 0)
        own = int((tokens / (seconds * (1.0 + overhead * tokens) + reading * tokens)).argmax())
        tokens = tokens * self.walkers.gain
        rates, burden = tokens / seconds, 1.0 + overhead * tokens
        taken = trust * rates / (burden + reading * rates)
        best = int(taken.argmax())
        rate, zero = float(rates.flat[best]), float(rates.flat[0])
        zero *= 1.0 + float(reading[best % len(reading)]) * rate
        taken = taken.reshape(-1, len(self.lengths)).max(axis=0) / taken.flat[best]
        return Choice(best, own, rate, rate * float(burden.flat[best]), zero / rate, taken)
