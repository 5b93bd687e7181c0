"""What every fixed length, and the plan that history alone makes, would have brought on the rounds that were run.

The rounds of another length start elsewhere in the text, so what this length's rounds kept says little about them: a
draft that ends before a token the drafter misses makes the next one start right behind it. But what the drafter
misses is a property of the text. Tokens that were kept are easy, the one after a rejection is hard, and so every
alternative walks the text by itself: its round ends at a hard token, or when its length and the target's own token
are through. It gets the same tokens for another number of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nwor_vllm.policy.cost import Cost
from nwor_vllm.policy.evidence import Batch, Seen
from nwor_vllm.policy.requests import SCRATCH, START
from nwor_vllm.policy.stop import Floats, Ints


MEMORY = 1000.0  # rounds
PRIOR_ROUNDS = 30.0


class Compared(NamedTuple):
    """Steps as they were, [steps], and under every alternative, [steps, rungs and the plain plan]."""

    tokens: Floats
    seconds: Floats
    shadow_seconds: Floats  # of the same tokens
    whole: Ints  # which of the steps given these are: those of decoding rounds alone


class Walkers:
    """Per request, how many tokens of its current round each alternative has had."""

    def __init__(self, rungs: Ints) -> None:
        self.widths = rungs + 1
        self.at: Ints = np.zeros((START, len(rungs) + 1), np.int64)
        self.owed: Floats = np.zeros(START)  # hard tokens that were likely but not counted yet
        self.part: Floats = np.zeros((START, len(rungs) + 1))  # of that round, as counted
        self.ended: Floats = np.zeros(len(rungs) + 1)  # the rest of the rounds that requests were in at their ends
        self.tokens = self.count = 0.0  # discounted: what was walked, and rounds that walked it
        self.rounds: Floats = np.zeros(len(rungs))  # what every length would have needed
        self.hoped: Floats = np.zeros(len(rungs))  # and what it would have kept of this length's rounds

    def learn(self, tokens: float, count: int, rounds: Floats, hoped: Floats) -> None:
        fade = math.exp(-count / MEMORY)
        self.tokens = fade * self.tokens + tokens
        self.count = fade * self.count + count
        self.rounds = fade * self.rounds + rounds
        self.hoped = fade * self.hoped + hoped

    def gain(self) -> Floats:
        """Tokens a round over what this length's rounds make one expect, for every length."""
        if not self.count or not self.rounds.all():
            return np.ones(len(self.rounds))
        found = (self.tokens / self.rounds) / (self.hoped / self.count)
        return np.asarray(np.minimum(np.maximum(found, 0.25), 4.0) ** (self.count / (self.count + PRIOR_ROUNDS)))

    def fit(self, size: int) -> None:
        grow = size - len(self.at)
        if grow > 0:
            self.at = np.concatenate([self.at, np.zeros((grow, self.at.shape[1]), np.int64)])
            self.part = np.concatenate([self.part, np.zeros((grow, self.at.shape[1]))])
            self.owed = np.concatenate([self.owed, np.zeros(grow)])

    def reset(self, rows: Sequence[int]) -> None:
        self.at[rows] = 0
        self.part[rows] = 0.0
        self.owed[rows] = 0.0

    def end(self, row: int) -> None:
        self.ended += np.ceil(self.part[row]) - self.part[row]

    def walk(self, rows: Ints, easy: Ints, hard: Floats, plain: Ints) -> Floats:
        """Rounds, [rows, alternatives], that each row needed to move on by `easy` tokens and one that is hard with the
        probability `hard`. A round that goes on counts by the tokens it could still have."""
        owed = self.owed[rows] + hard
        ends = (hard >= 1.0) | (owed >= 0.5)
        widths = np.empty((len(rows), len(self.widths) + 1), np.int64)
        widths[:, :-1], widths[:, -1] = self.widths, plain + 1
        done, at = np.divmod(self.at[rows] + easy[:, None], widths)
        at += 1
        last = ends[:, None] | (at >= widths)
        at[last] = 0
        part = at / widths
        walked = np.asarray(done + last + part - self.part[rows])
        self.at[rows], self.part[rows] = at, part
        self.owed[rows] = np.where(hard >= 1.0, self.owed[rows], owed - ends)
        self.reset([SCRATCH])
        return walked

    def snapshot(self) -> dict[str, Any]:
        names = ("at", "part", "owed", "ended", "rounds", "hoped")
        return {name: getattr(self, name).tolist() for name in names} | {"tokens": self.tokens, "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at = np.array(state["at"], np.int64)
        for name in ("part", "owed", "ended", "rounds", "hoped"):
            setattr(self, name, np.array(state[name], float))
        self.tokens, self.count = float(state["tokens"]), float(state["count"])


def rounds_of(walkers: Walkers, rows: Ints, batch: Batch, history: Floats, soft: Floats) -> Floats:
    """Rounds that every alternative would have ended in each step, [steps, alternatives]."""
    verified, accepted = batch.verified, batch.accepted
    beyond = history[batch.every, np.minimum(verified, history.shape[1] - 1)]
    beyond = np.where(np.isnan(soft), beyond, soft)  # the confidence that cut the row says what it would have kept
    hard = np.where(accepted < verified, 1.0, 1.0 - beyond)
    out = np.empty((len(batch.starts) - 1, walkers.at.shape[1]))
    for i, (start, end) in enumerate(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)):
        of = slice(start, end)
        out[i] = walkers.walk(rows[of], accepted[of], hard[of], batch.plain[of]).sum(axis=0)
    out[0] += walkers.ended
    walkers.ended[:] = 0
    index = np.arange(history.shape[1])
    cut = (accepted == verified)[:, None] & (index >= verified[:, None])
    chance = np.where(cut, history, 1.0)
    told = np.flatnonzero(cut.any(axis=1))
    chance[told, verified[told]] = beyond[told]
    kept = (index < accepted[:, None]) + np.multiply.accumulate(chance, axis=1) * cut
    hoped = np.add.accumulate(kept.sum(axis=0))
    lengths = walkers.widths - 1
    total = len(rows) + np.where(lengths > 0, hoped[np.maximum(lengths, 1) - 1], 0.0)
    walkers.learn(float(accepted.sum() + len(rows)), len(rows), out[:, :-1].sum(axis=0), total)
    return out


def compare(seen: Sequence[Seen], batch: Batch, rounds: Floats, rungs: Ints, cost: Cost) -> Compared:
    whole = np.array([not s.step.prefill_tokens and len(s.step.rounds) == s.step.requests for s in seen])
    n = np.diff(batch.starts).astype(float)
    lengths = rungs.astype(float)
    plain = np.add.reduceat(batch.plain, batch.starts[:-1])
    slots = np.column_stack([n[:, None] * lengths, plain])
    longest = np.array([s.plain.k for s in seen], float)
    drafts = np.column_stack([np.broadcast_to(lengths, (len(seen), len(lengths))), longest])
    timed = np.array([s.timed() for s in seen], float)
    context, measured = timed[:, 4], timed[:, 5]
    wide = drafts.shape[1]
    predicted = cost.predict(
        np.append(np.repeat(n, wide), timed[:, 0]),
        np.append((n[:, None] + slots).ravel(), timed[:, 1]),
        np.append(drafts.ravel(), timed[:, 2]),
        np.append(np.repeat(context, wide), context),
        np.append(np.zeros(drafts.size), timed[:, 3]),
    )
    step, expected = predicted[: drafts.size].reshape(drafts.shape), predicted[drafts.size :]
    measured = np.where(measured > 0, measured, expected)  # NaN too
    seconds = np.minimum(np.maximum(measured, 0.5 * expected), 2.0 * expected)
    tokens = n + np.add.reduceat(batch.accepted, batch.starts[:-1])
    shadow = step * rounds / n[:, None]
    return Compared(tokens[whole], seconds[whole], shadow[whole], np.flatnonzero(whole))
