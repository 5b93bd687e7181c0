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

MEMORY = 1000.0  # rounds behind `gain`
PRIOR_ROUNDS = 10.0  # at which half of it is believed
NUMBERS = ("begun", "prompts", "prompt_tokens", "over", "tokens", "count", "waits")


class Compared(NamedTuple):
    """Steps as they were, [steps], and under every alternative, [steps, rungs and the plain plan]."""

    tokens: Floats
    seconds: Floats
    shadow_seconds: Floats  # of the same tokens
    whole: Ints  # which of the steps given these are: those in which everybody who decoded had a round


class Walkers:
    """Per request, how many tokens each alternative's current round has had: the rungs, then the plain plan.

    `gain`: tokens a round of every length over what rounds that start where this length's do would have.
    """

    def __init__(self, rungs: Ints) -> None:
        self.widths = rungs + 1  # a round's tokens at most
        self.at: Ints = np.zeros((START, len(rungs) + 1), np.int64)
        self.part: Floats = np.zeros((START, len(rungs) + 1))  # of that round, as counted
        self.owed: Floats = np.zeros(START)  # hard tokens that were likely but not counted yet
        self.ended: Floats = np.zeros(len(rungs) + 1)  # the rest of the rounds that requests were in at their ends
        self.begun = self.prompts = 0  # requests, and the steps that they spent in their prompts
        self.prompt_tokens = 0  # that these steps computed
        self.over = 0  # requests that have ended since the last walk
        self.tokens = self.count = 0.0  # discounted: what was walked, and the rounds that did
        self.waits = 0.0  # and the steps that those who ended had spent in their prompts
        self.rounds: Floats = np.zeros(len(rungs))  # what every length would have needed for it
        self.kept: Floats = np.zeros(len(rungs))  # and what it would have had in rounds that start where these did
        self.gain: Floats = np.ones(len(rungs))

    def begin(self, size: int, rows: Sequence[int]) -> None:
        grow = size - len(self.at)
        if grow > 0:
            self.at = np.concatenate([self.at, np.zeros((grow, self.at.shape[1]), np.int64)])
            self.part = np.concatenate([self.part, np.zeros((grow, self.at.shape[1]))])
            self.owed = np.concatenate([self.owed, np.zeros(grow)])
        self.begun += len(rows)
        self.reset(rows)

    def reset(self, rows: Sequence[int]) -> None:
        for row in rows:  # one, mostly
            self.at[row], self.part[row], self.owed[row] = 0, 0.0, 0.0

    def end(self, rows: Sequence[int]) -> None:
        """The requests of `rows` are over: so are the rounds they were in."""
        part = self.part[rows]
        self.ended += (np.ceil(part) - part).sum(axis=0)
        self.over += len(rows)

    def pause(self) -> None:
        """Tokens come that nobody follows: the rounds that requests are in are as good as they were until here."""
        for kept in (self.at, self.part, self.owed):
            kept[:] = 0
        self.over = 0

    @property
    def overhead(self) -> float:
        """Steps without a round that come with each token: the more a round brings, the more of the time they are."""
        return self.waits / self.tokens if self.tokens else 0.0

    @property
    def fed(self) -> float:
        """Prompt tokens that come with each token."""
        return self.overhead * self.prompt_tokens / self.prompts if self.prompts else 0.0

    def waited(self, stride: int) -> float:
        """Steps in their prompts of those requests, of which one in `stride` is walked, that have ended."""
        over, self.over = self.over, 0
        return over * self.prompts / max(self.begun, 1) / stride

    def walk(self, rows: Ints, tokens: Ints, hard: Floats, plain: Ints) -> Floats:
        """Rounds that every alternative needs where `rows`, several times if need be, move on by `tokens` each, the
        last of which is hard with the probability `hard`. A round that goes on counts by the tokens it could have."""
        order = np.argsort(rows, kind="stable")
        rows, tokens, hard, plain = rows[order], tokens[order], hard[order], plain[order]
        fresh = np.append(True, rows[1:] != rows[:-1])
        first, which = np.flatnonzero(fresh), np.add.accumulate(fresh) - 1
        last = np.append(first[1:], len(rows)) - 1
        mine = rows[first]
        # What is not known to be hard or easy is hard as often as it is likely to be.
        sure = hard >= 1.0
        maybe = np.where(sure, 0.0, hard)
        before = np.add.accumulate(maybe) - maybe
        before += (self.owed[mine] - before[first])[which]
        owed = before + maybe
        ends = sure | (np.floor(owed + 0.5) > np.floor(before + 0.5))
        self.owed[mine] = owed[last] - np.floor(owed[last] + 0.5)
        # From one hard token to the next, all are easy.
        stops = ends.copy()
        stops[last] = True
        start = np.append(0, np.flatnonzero(stops)[:-1] + 1)
        stretch = np.add.reduceat(tokens, start)[:, None] + np.where(fresh[start][:, None], self.at[rows[start]], 0)
        widths = np.empty((len(start), len(self.widths) + 1), np.int64)
        widths[:, :-1], widths[:, -1] = self.widths, plain[start] + 1
        closed = ends[stops][:, None]
        done, at = np.divmod(stretch, widths)
        done += closed & (at > 0)
        at = np.where(closed, 0, at)[np.add.accumulate(stops)[last] - 1]
        part = at / np.append(np.broadcast_to(self.widths, at[:, :-1].shape), plain[last][:, None] + 1, axis=1)
        counted = np.minimum(self.part[mine], self.at[mine] / widths[fresh[start]])  # a longer plan counts anew
        rounds = done.sum(axis=0) + (part - counted).sum(axis=0) + self.ended
        self.at[mine], self.part[mine] = at, part
        self.ended = np.zeros_like(self.ended)
        self.reset([SCRATCH])
        return np.asarray(rounds)

    def learn(self, tokens: float, count: int, rounds: Floats, kept: Floats, waits: float) -> None:
        fade = math.exp(-count / MEMORY)
        self.waits = fade * self.waits + waits
        self.tokens = fade * self.tokens + tokens
        self.count = fade * self.count + count
        self.rounds = fade * self.rounds + rounds
        self.kept = fade * self.kept + kept
        self._gain()

    def _gain(self) -> None:
        if self.count and self.rounds.all():
            found = (self.tokens * self.count) / (self.rounds * self.kept)
            self.gain = np.minimum(np.maximum(found, 0.25), 4.0) ** (self.count / (self.count + PRIOR_ROUNDS))

    def snapshot(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("at", "part", "owed", "ended", "rounds", "kept")}
        return arrays | {name: getattr(self, name) for name in NUMBERS}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at = np.array(state["at"], np.int64)
        for name in ("part", "owed", "ended", "rounds", "kept"):
            setattr(self, name, np.array(state[name], float))
        for name in NUMBERS:
            setattr(self, name, type(getattr(self, name))(state[name]))
        self.gain = np.ones(len(self.rounds))
        self._gain()


def rounds_of(walkers: Walkers, rows: Ints, batch: Batch, history: Floats, soft: Floats, stride: int = 1) -> Floats:
    """Steps of every alternative for each one that was run, of requests whose row is a multiple of `stride`: rounds,
    and those in prompts, which all have. `soft` is the calibrated confidence of what cut a row."""
    verified, accepted, index = batch.verified, batch.accepted, np.arange(history.shape[1])
    beyond = history[batch.every, np.minimum(verified, len(index) - 1)]
    beyond = np.where(np.isnan(soft), beyond, soft)
    hard = np.where(accepted < verified, 1.0, np.minimum(1.0 - beyond, 0.999))
    plain = batch.plain
    if stride > 1:
        mine = np.flatnonzero(rows % stride == 0)
        if not len(mine):
            return np.ones(walkers.at.shape[1])
        rows, accepted, verified, hard, plain = rows[mine], accepted[mine], verified[mine], hard[mine], plain[mine]
        history, beyond = history[mine], beyond[mine]
    rounds = walkers.walk(rows, accepted + 1, hard, plain)
    # Known up to the first rejection, expected beyond a cut.
    cut = (accepted == verified)[:, None] & (index >= verified[:, None])
    chance = np.where(cut, history, 1.0)
    told = np.flatnonzero(cut.any(axis=1))
    chance[told, verified[told]] = beyond[told]
    kept = (index < accepted[:, None]) + np.multiply.accumulate(chance, axis=1) * cut
    total = np.append(0.0, np.add.accumulate(kept.sum(axis=0)))[walkers.widths - 1]
    waits = walkers.waited(stride)
    walkers.learn(float(accepted.sum() + len(rows)), len(rows), rounds[:-1], len(rows) + total, waits)
    return np.asarray((rounds + waits) / (len(rows) + waits))


def compare(seen: Sequence[Seen], batch: Batch, share: Floats, rungs: Ints, cost: Cost) -> Compared:
    """`share`: rounds of every alternative for one that was run."""
    whole = np.array([len(s.step.rounds) == s.step.requests for s in seen])
    n = np.diff(batch.starts).astype(float)
    timed = np.array([s.timed() for s in seen], float)
    context, measured = timed[:, 4], timed[:, 5]
    # A column for every rung, one for the plain plan, one for what was run.
    requests, verified, drafts, judged = np.zeros((4, len(seen), len(rungs) + 2))
    requests[:, :-1], requests[:, -1] = n[:, None], timed[:, 0]
    drafts[:, :-2], drafts[:, -2], drafts[:, -1] = rungs, [s.plain.k for s in seen], timed[:, 2]
    verified[:, :-2] = n[:, None] + n[:, None] * rungs
    verified[:, -2] = n + np.add.reduceat(batch.plain, batch.starts[:-1])
    verified[:, -1], judged[:, -1] = timed[:, 1], timed[:, 3]
    predicted = cost.predict(requests, verified, drafts, context[:, None], judged)
    beside = cost.prefill(timed[:, 6:], drafts > 0)
    step, expected = predicted[:, :-1], predicted[:, -1] + beside[:, -1]
    measured = np.where(measured > 0, measured, expected)  # NaN too
    seconds = np.minimum(np.maximum(measured, 0.5 * expected), 2.0 * expected)
    tokens = n + np.add.reduceat(batch.accepted, batch.starts[:-1])
    return Compared(tokens[whole], seconds[whole], (step * share + beside[:, :-1])[whole], np.flatnonzero(whole))
