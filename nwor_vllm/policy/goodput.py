"""The default policy: draft as far as the expected tokens pay for the measured time, per request, and never at a
loss.

A step with draft length K yields N + sum over requests and j <= K of S_rj tokens and takes T(N, tokens, K) seconds;
the best K maximises their ratio, lambda. At that price one draft step must bring lambda * c_draft tokens and one
verified slot lambda * c_verify: requests whose survival falls below the slot's price are capped, and the drafter
stops by the same prices on its own calibrated confidence. See docs/policies.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Plan, Step, StopRule
from nwor_vllm.policy.calibration import Calibration
from nwor_vllm.policy.cost import Cost
from nwor_vllm.policy.guard import Guard
from nwor_vllm.policy.requests import Slots
from nwor_vllm.policy.stop import Floats, Ints, evaluate
from nwor_vllm.policy.survival import Survival

MAX_VISIT_WAIT = 128  # steps between visits that only teach the cost, at last
PROBE_K = 2  # draft length of a probe from zero: the first hazards decide whether to come back


@dataclass(frozen=True)
class GoodputParams:
    spread: float = 1.0  # how much requests differ, in log-odds of acceptance (standard deviation of the prior)
    keep: float = 0.98  # how much of a request's own offset survives each round; 1 = requests never change
    memory: float = 150.0  # rounds' worth of evidence behind the shared hazards and calibration before old rounds fade
    per_request: bool = True  # cap requests whose drafts do not pay for their verification
    confidence: bool = True  # give the drafter a stop rule on its calibrated confidence
    guard: bool = True  # fall back to the best fixed length, or none, while the policy is below 0.99 of it
    probe_interval: int = 16  # steps at zero before the first probe; doubles while probes fail
    cost_interval: int = 32  # steps between visits of other draft lengths to learn their cost; grows fourfold

    def __post_init__(self) -> None:
        for name in ("spread", "memory"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"policy_params.{name} is {getattr(self, name)}; expected a positive number")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"policy_params.keep is {self.keep}; expected a number above 0, at most 1")
        for name in ("probe_interval", "cost_interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy_params.{name} is {getattr(self, name)}; expected a whole number from 1 up")


class Goodput:
    name = "goodput"

    def __init__(self, params: GoodputParams, ladder: Sequence[int]) -> None:
        self.params, self.ladder = params, tuple(ladder)
        self.k_max = max(self.ladder)
        self._rungs = np.array(self.ladder, np.int64)
        self._index = np.arange(self.k_max)
        self.slots = Slots()
        self.cost = Cost()
        self.guard = Guard(self.ladder)
        self.survival = Survival(max(1, self.k_max), params.spread, params.keep, params.memory)
        self.calibration = Calibration(max(1, self.k_max), 0.5 * params.spread, params.keep, params.memory)
        self.steps = 0
        self.sees_confidence = False  # the drafter shows it
        self.honoured = 0.0  # how far the drafter really ends when the rule says so
        self.idle, self.idle_wait = 0, params.probe_interval
        self.visit, self.visit_wait, self.visits = 2, params.cost_interval // 4 or 1, 0
        self.rate, self.ratio = 0.0, 1.0  # lambda in tokens per second; achieved over predicted
        self.kept = -1.0  # drafts verified per request under the stop rule, moving average; -1 = none yet
        self._last: Plan = Plan(0)

    # Deciding

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        rows = self._rows(requests)
        n = len(rows)
        if n == 0 or self.k_max == 0:
            self._last = Plan(0)
            return self._last
        survival = np.multiply.accumulate(self.survival.hazards(rows), axis=1)
        k, rate, tokens = self._best(n, survival, context_tokens)
        self.rate = rate * self.ratio
        self._last = self._shaped(requests, rows, survival, k, tokens, context_tokens)
        return self._last

    def _rows(self, requests: Sequence[str]) -> Ints:
        rows, fresh = self.slots.rows(requests)
        if fresh:
            for effects in (self.survival.effects, self.calibration.effects):
                effects.fit(self.slots.size)
                effects.reset(fresh)
        return rows

    def _curves(self, n: int, survival: Floats, price: float, context: int) -> tuple[Floats, Floats]:
        """Expected tokens and seconds of every rung when only slots worth `price` are verified."""
        worth = survival >= price
        gain = np.concatenate([[0.0], np.cumsum((survival * worth).sum(axis=0))])[self._rungs]
        slots = np.concatenate([[0.0], np.cumsum(worth.sum(axis=0))])[self._rungs]
        return n + gain, np.maximum.accumulate(self.cost.predict(n, n + slots, self._rungs.astype(float), context))

    def _best(self, n: int, survival: Floats, context: int) -> tuple[int, float, float]:
        """The best rung, its rate, and the tokens it verifies."""
        tokens, seconds = self._curves(n, survival, 0.0, context)
        rate = float((tokens / seconds).max())
        if self.params.per_request and n > 1:
            middle = n + float(self._rungs[int(np.argmax(tokens / seconds))]) * n
            price = rate * self.cost.verify_slot(n, middle, context)
            tokens, seconds = self._curves(n, survival, price, context)
        best = int(np.argmax(tokens / seconds))
        return self.ladder[best], float(tokens[best] / seconds[best]), float(n * (1 + self.ladder[best]))

    def _shaped(
        self, requests: Sequence[str], rows: Ints, survival: Floats, k: int, tokens: float, context: int
    ) -> Plan:
        forced = self._forced(k)
        if forced is not None:
            return Plan(forced)
        if k == 0:
            return Plan(0)
        n = len(rows)
        if self.kept >= 0 and self.sees_confidence and self.params.confidence:
            tokens = n * (1.0 + self.kept)
        verify = self.rate * self.cost.verify_slot(n, tokens, context)
        stop = None
        if self.params.confidence and self.sees_confidence:
            stop = self._stop_rule(rows, survival, n, verify)
            if self.honoured > 0.5:
                k = self.k_max
        caps: dict[str, int] = {}
        if self.params.per_request:
            price = verify * (0.25 if stop else 1.0)  # confidence sees the good moments of a poor request
            limit = (survival[:, :k] >= price).sum(axis=1)
            caps = {requests[i]: int(limit[i]) for i in np.flatnonzero(limit < k)}
        bias = dict(zip(requests, self.calibration.effects.mean[rows].tolist(), strict=True)) if stop else {}
        return Plan(k, caps, stop, bias)

    def _stop_rule(self, rows: Ints, survival: Floats, n: int, verify: float) -> StopRule:
        total = survival.sum(axis=0)
        hazard = np.clip(np.append(total[:1] / n, total[1:] / np.maximum(total[:-1], 1e-9)), 1e-4, 1 - 1e-4)
        odds = np.log(hazard / (1.0 - hazard)) + self.calibration.following
        return StopRule(
            verify_cost=min(verify, 0.95),
            draft_cost=self.rate * self.cost.draft_step(n),
            calibration=tuple(map(tuple, self.calibration.weights.tolist())),
            hazard=tuple((1.0 / (1.0 + np.exp(-odds))).tolist()),
        )

    def _forced(self, k: int) -> int | None:
        """A draft length that the guard, a probe from zero, or the cost model's curiosity takes instead of `k`."""
        if self.params.guard and self.guard.fallback >= 0:
            return self.guard.fallback
        if k == 0:
            self.idle += 1
            if self.idle >= self.idle_wait:
                return next((r for r in self.ladder if r >= PROBE_K), self.k_max)
            return None
        self.idle, self.idle_wait = 0, self.params.probe_interval
        if self.steps >= self.visit:
            return self._visit(k)
        return None

    def _visit(self, k: int) -> int:
        """None, one rung shorter, one longer, in turn, rarer and rarer: their cost is not believed unseen for ever."""
        here = self.ladder.index(k)
        turns = (0, max(0, here - 1), min(here + 1, len(self.ladder) - 1))
        self.visit = self.steps + self.visit_wait
        self.visits += 1
        if self.visits % len(turns) == 0:
            self.visit_wait = min(2 * self.visit_wait, MAX_VISIT_WAIT)
        return self.ladder[turns[self.visits % len(turns)]]

    # Learning

    def observe(self, step: Step) -> None:
        self.steps += 1
        if not step.prefill_tokens:
            self.cost.observe(step.requests, step.verified_tokens, step.draft_steps, step.context_tokens, step.seconds)
        if not step.rounds or self.k_max == 0:
            return
        rounds = step.rounds
        rows = self.slots.known([r.request_id for r in rounds])
        limit = self.k_max
        numbers = np.array([(r.drafted, r.verified, r.accepted) for r in rounds], np.int64)
        drafted, verified, accepted = np.clip(numbers, 0, limit).T
        accepted = np.minimum(accepted, verified)
        history = self.survival.hazards(rows)
        soft = np.full(len(rows), np.nan)
        if any(r.confidence for r in rounds):
            self.sees_confidence = True
            confidence = self._confidence(step)
            predicted = self.calibration.predict(rows, confidence)
            cut = np.flatnonzero(drafted > verified)
            soft[cut] = predicted[cut, verified[cut]]
            self.calibration.learn_following(history, np.clip(predicted, 1e-6, 1 - 1e-6), drafted, verified)
            self._check_honour(step, rows, confidence)
            self.calibration.observe(rows, verified, accepted, confidence)
        if step.k > 0:
            self.survival.observe(rows, verified, accepted, soft)
            self._after_draft()
        self._compare(step, history, verified, accepted, soft)

    def _confidence(self, step: Step) -> Floats:
        out = np.full((len(step.rounds), self.k_max), np.nan)
        lengths = np.array([min(len(r.confidence), self.k_max) for r in step.rounds])
        flat = np.fromiter(chain.from_iterable(r.confidence[: self.k_max] for r in step.rounds), float)
        out[self._index < lengths[:, None]] = flat
        return out

    def _check_honour(self, step: Step, rows: Ints, confidence: Floats) -> None:
        stop = self._last.stop
        if stop is None or step.k <= 1 or step.k != self._last.k:
            return
        if step.draft_steps < step.k:
            self.honoured += 0.5 * (1.0 - self.honoured)
        elif self.steps % 8 == 0 or self.honoured:
            caps = np.array([self._last.caps.get(r.request_id, step.k) for r in step.rounds], np.int64)
            bias = np.array([self._last.bias.get(r.request_id, 0.0) for r in step.rounds])
            steps, _ = evaluate(stop, step.k, caps, bias, confidence)
            if steps < step.k:
                self.honoured *= 0.8

    def _after_draft(self) -> None:
        if self.idle >= self.idle_wait:  # that was a probe from zero
            self.idle = 0
            self.idle_wait = min(2 * self.idle_wait, 512)

    def _compare(self, step: Step, history: Floats, verified: Ints, accepted: Ints, soft: Floats) -> None:
        """Feed the guard: realised tokens and time of this step against every rung's."""
        n = len(step.rounds)
        if step.prefill_tokens or n != step.requests or not self.cost.known:
            return
        tokens = float(n + accepted.sum())
        rungs = self._rungs.astype(float)
        predicted = np.array([float(step.verified_tokens)]), np.array([float(step.draft_steps)])
        expected = float(self.cost.predict(n, *predicted, step.context_tokens)[0])
        measured = step.seconds if step.seconds > 0 else expected
        seconds = min(max(measured, 0.5 * expected), 2.0 * expected)
        shadow_seconds = self.cost.predict(n, n * (1.0 + rungs), rungs, step.context_tokens)
        # Kept by a fixed length: known up to the first rejection, expected beyond a cut.
        cut = (accepted == verified)[:, None] & (self._index >= verified[:, None])
        chance = np.where(cut, history, 1.0)
        seen = np.flatnonzero(~np.isnan(soft) & (accepted == verified))
        chance[seen, verified[seen]] = soft[seen]  # the confidence that cut the row says what it would have kept
        beyond = np.cumprod(chance, axis=1) * cut
        kept = (self._index < accepted[:, None]) + beyond
        gain = np.concatenate([[0.0], np.cumsum(kept.sum(axis=0))])[self._rungs]
        self.guard.observe(tokens, seconds, n + gain, shadow_seconds)
        if self._last.stop and step.k == self._last.k and self.guard.fallback < 0:
            kept = float(verified.sum()) / n
            self.kept = kept if self.kept < 0 else self.kept + 0.1 * (kept - self.kept)
            achieved = tokens * self.ratio / (seconds * self.rate)
            self.ratio = min(max(self.ratio + 0.02 * (min(achieved, 4.0) - self.ratio), 0.9), 1.15)

    def seed_cost(self, rows: Iterable[Sequence[float]]) -> None:
        """Start with a stored profile's step times (`policy.profile.read(path).rows`) instead of guesses."""
        self.cost.seed(rows)

    def forget(self, request_id: str) -> None:
        self.slots.forget(request_id)

    # State

    def snapshot(self) -> dict[str, Any]:
        scalars = (
            "steps",
            "sees_confidence",
            "honoured",
            "idle",
            "idle_wait",
            "visit",
            "visit_wait",
            "visits",
            "rate",
            "ratio",
            "kept",
        )
        parts = ("slots", "cost", "guard", "survival", "calibration")
        return {name: getattr(self, name) for name in scalars} | {p: getattr(self, p).snapshot() for p in parts}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            part = getattr(self, name)
            if hasattr(part, "restore"):
                part.restore(value)
            else:
                setattr(self, name, type(part)(value))

    def metrics(self) -> dict[str, float]:
        values = {
            "steps": float(self.steps),
            "rate_tokens_per_s": self.rate,
            "cost_error": self.cost.error,
            "calibration_error": self.calibration.error(),
            "calibration_auc": self.calibration.auc(),
            "stop_rule_honoured": self.honoured,
            "guard_trips": float(self.guard.trips),
            "guard_fallback_k": float(self.guard.fallback),
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}  # what is unknown is absent
