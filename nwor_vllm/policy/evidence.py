"""What several steps showed, as arrays: their rounds are learnt from in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from nwor_vllm.policy.base import Plan, Round, Step
from nwor_vllm.policy.cost import Timed
from nwor_vllm.policy.stop import Floats, Ints

MOST_ROUNDS = 256  # of whole steps learnt from in one go


class Seen(NamedTuple):
    """A step, the plan it ran under, and what history alone would have planned."""

    step: Step
    plan: Plan
    plain: Plan
    pace: float = 1.0  # how many times as long as at first steps took just then

    @property
    def judged(self) -> bool:
        """It ran as planned, by the drafter's confidence."""
        return self.plan.stop is not None and self.step.k == self.plan.k

    def sped(self, factor: float) -> Seen:
        """As it would have been on a machine so many times as fast."""
        return self._replace(pace=self.pace * factor)

    def timed(self) -> Timed:
        s, seconds = self.step, self.step.seconds / self.pace
        return Timed(
            s.requests, s.verified_tokens, s.draft_steps, s.judged_steps, s.context_tokens, seconds, s.prefill_tokens
        )


def thinned(seen: Sequence[Seen], row: Mapping[str, int]) -> tuple[Sequence[Seen], int]:
    """The newest steps whole, and of older ones those requests whose row is a multiple of the stride: a sample says as
    much as all of them, but what follows a request from round to round must not miss one."""
    total = sum([len(s.step.rounds) for s in seen])
    stride = -(-total // MOST_ROUNDS)
    kept: list[Seen] = []
    for s in reversed(seen):
        rounds = s.step.rounds
        if stride > 1 and kept and sum([len(k.step.rounds) for k in kept]) + len(rounds) > MOST_ROUNDS:
            rounds = [r for r in rounds if row.get(r.request_id, 0) % stride == 0]
            s = s._replace(step=replace(s.step, rounds=rounds))
        if rounds:
            kept.append(s)
    return kept[::-1], stride


class Batch:
    """The rounds of several steps, one row each."""

    def __init__(self, seen: Sequence[Seen], limit: int) -> None:
        rounds: list[Round] = [r for s in seen for r in s.step.rounds]
        self.ids = [r.request_id for r in rounds]
        self.every = np.arange(len(rounds))
        self.starts = np.array([0, *accumulate(len(s.step.rounds) for s in seen)])
        numbers = np.array([(r.drafted, r.verified, r.accepted, len(r.confidence)) for r in rounds], np.int64)
        self.drafted, self.verified, accepted, self.shown = np.minimum(np.maximum(numbers, 0), limit).T
        self.accepted: Ints = np.minimum(accepted, self.verified)
        self.plain = np.array([s.plain.caps.get(r.request_id, s.plain.k) for s in seen for r in s.step.rounds])
        self.watched = bool(self.shown.any())
        self.confidence: Floats = np.full((len(rounds), limit), np.nan)
        if self.watched:
            flat = np.fromiter(chain.from_iterable(r.confidence[:limit] for r in rounds), float)
            self.confidence[np.arange(limit) < self.shown[:, None]] = flat
