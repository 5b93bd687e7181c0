"""The default policy: draft as far as the expected tokens pay for the measured time, per request, and never at a
loss.

A step with draft length K yields N + sum over requests and j <= K of S_rj tokens and takes T(N, tokens, K) seconds;
the best K maximises their ratio (`choice.py`). At that price, lambda, one draft step must bring lambda * c_draft tokens
and one verified slot lambda * c_verify: requests whose survival falls below the slot's are capped, and the drafter
stops by the same prices on its own calibrated confidence. See docs/policies.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Plan, Step, StopRule
from nwor_vllm.policy.calibration import Calibration
from nwor_vllm.policy.choice import Choice, Chooser
from nwor_vllm.policy.cost import Cost
from nwor_vllm.policy.evidence import Batch, Seen, thinned
from nwor_vllm.policy.guard import POLICY, Guard
from nwor_vllm.policy.judging import Judging
from nwor_vllm.policy.price import Price
from nwor_vllm.policy.requests import Groups, Slots
from nwor_vllm.policy.shadow import Walkers, compare, rounds_of
from nwor_vllm.policy.stop import Floats, Ints, evaluate
from nwor_vllm.policy.survival import Survival
from nwor_vllm.policy.visits import Visits

SURE_STEPS = 16  # after which it is known what the drafter's confidence is worth
NEW = 8  # a lesson waits until one in so many steps is new: it costs more than a small step
LEARN_EVERY = 31  # at most; what a lesson delays must not always be the same kind of step, of which many come each 32
IDLE_EVERY = 127  # at zero: only the price of zero is to be learnt there, and small steps are slower by every lesson
DOUBT, DOUBTFUL = 0.15, 32  # by how much zero must be better for one request at first; steps with drafts that halve it
HOPE = 1.0  # standard deviations by which drafts of one request must be worse than zero
MAYBE = 3.0  # and by which a length may be cheaper than believed
DRIFT = 2  # a decision stands until one in so many requests is another
BOLD, UNSEEN = 2, 8  # no plan has more than twice the most verified tokens yet; what counts as seen at the start
FEW = 48  # requests whose common depth differs from step to step
SCALARS = ("steps", "drafted", "awake", "shown", "sees_confidence", "honoured", "rate", "ratio", "zero", "widest")
PARTS = ("slots", "cost", "guard", "judging", "survival", "calibration", "price", "walkers", "visits")


@dataclass(frozen=True)
class GoodputParams:
    spread: float = 1.0  # how much requests differ at first, in log-odds of acceptance (standard deviation)
    keep: float = 0.98  # how much of a request's own offset survives each round; 1 = requests never change
    memory: float = 150.0  # rounds' worth of evidence behind the shared hazards and calibration before old rounds fade
    per_request: bool = True  # cap requests whose drafts do not pay for their verification
    confidence: bool = True  # give the drafter a stop rule on its calibrated confidence
    guard: bool = True  # fall back to the best fixed length, or none, while the policy is below 0.99 of it
    probe_interval: int = 32  # steps at zero before the first probe; doubles while probes fail
    cost_interval: int = 32  # steps between visits of other draft lengths: half of it at first, then ever more

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
        self.slots = Slots()
        self.cost = Cost()
        self.guard = Guard(self.ladder)
        self.judging = Judging()
        self.visits = Visits(self.ladder, params.probe_interval, params.cost_interval)
        self.walkers = Walkers(self._rungs)
        self.chooser = Chooser(self._rungs, self.cost, self.walkers)
        self.survival = Survival(max(1, self.k_max), params.spread, params.keep, params.memory)
        self.calibration = Calibration(max(1, self.k_max), 0.5 * params.spread, params.keep, params.memory)
        self.steps = 0
        self.awake = 0  # steps since zero was the best length
        self.shown = 0  # steps that have shown what drafts cost
        self.drafted = True  # in the step before those that are still to be learnt from
        self.sees_confidence = False  # the drafter shows it
        self.honoured = 0.6  # how far the drafter really ends when the rule says so: believed once, then judged
        self.rate, self.ratio = 0.0, 1.0  # tokens per second; achieved over predicted
        self.zero = 0.0  # rate of the first rung over the best one's
        self.widest = 0  # verified tokens of a step so far
        self._rates: Floats = np.zeros(len(self.ladder))  # of every length over the best one's, where it was decided
        self._load = (1, 0)  # and for how many requests, of how much context
        self.price = Price()
        self._last = self._plain = Plan(0)
        self._decided: tuple[Plan, Plan] | None = None  # with and without confidence
        self._asked: list[str] = []  # whom a plan was last asked for
        self._where: Ints = np.zeros(0, np.int64)  # their rows
        self._moved = False  # if someone has ended since
        self._others = 0  # who came or went since the decision
        self._pending: list[Seen] = []
        self._over: list[str] = []  # requests that have ended and whose last rounds are still to be learnt from

    # Deciding

    def begin(self, request_id: str, kind: str) -> None:
        if request_id in self._over:
            self._settle()
        self.slots.begin(request_id, kind)

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        if not requests or self.k_max == 0:
            self._last = self._plain = Plan(0, watch=False)
            return self._plain
        if self._moved or requests != self._asked:
            self._meet(requests)
        if self._decided is None or self._others * DRIFT >= len(requests):
            self._decided, self._others = self._decide(self._asked, context_tokens), 0
        judged, self._plain = self._decided
        forced = self._forced(self._plain.k)
        if forced is not None:
            visit = self.params.per_request and self.guard.fallback == POLICY
            self._last = Plan(forced, self.visits.caps(requests) if visit else {}, watch=False)
        else:
            self._last = judged if self.judging.on else self._plain
            if self.steps % (8 if self.steps < 128 else 32) == 0:
                self._last = replace(self._plain, caps={})
        return self._last

    def _meet(self, requests: Sequence[str]) -> None:
        """Others than a plan was last asked for, or in another order."""
        stay = len(set(self._asked).intersection(requests))
        self._others += max(len(self._asked), len(requests)) - stay
        self._asked, self._where, self._moved = list(requests), self._rows(requests), False

    def _decide(self, requests: list[str], context: int) -> tuple[Plan, Plan]:
        """The plan that uses the drafter's confidence, and the one that does without."""
        n = len(rows := self._where)
        survival, found = self._choose(rows, context)
        if not self.ladder[found.best]:  # where nobody looks, bad luck would stay; many requests see more in a step
            survival, found = self._choose(rows, context, HOPE / math.sqrt(n))
        self.rate, k, own = found.rate * self.ratio, self.ladder[found.best], self.ladder[max(found.own, found.best)]
        worth, self.zero = found.worth * self.ratio, found.zero
        self._rates, self._load = found.rates, (n, context)
        if k == 0:
            return Plan(0, watch=False), Plan(0, watch=False)
        plain = Plan(k, self._caps(requests, survival, k, found.price), watch=False)
        if not self.params.confidence or not self.judging.on:  # that only a lesson changes
            return plain, plain
        if not self.sees_confidence:
            return Plan(k, plain.caps), plain
        self.price.slot = found.slot
        price = self.price.value if self.price.known else found.slot
        stop = self._stop_rule(survival, n, price, worth)
        if self.honoured > 0.5:  # the rule ends the step; with many requests their luck averages out
            k = self.k_max if n <= FEW else next((r for r in self.ladder if r > own), own)
        bias = dict(zip(requests, self.calibration.effects.mean[rows].tolist(), strict=True))
        # Confidence sees the good moments of a poor request: history caps it later.
        return Plan(k, self._caps(requests, survival, k, 0.25 * price), stop, bias), plain

    def _choose(self, rows: Ints, context: int, hope: float = 0.0) -> tuple[Floats, Choice]:
        survival = np.multiply.accumulate(self.survival.hazards(rows, hope), axis=1)
        most = BOLD * max(self.widest, 3 * len(rows), UNSEEN)
        trims, advantage = self.params.per_request, self.judging.advantage
        return survival, self.chooser.choose(survival, context, trims, most, self._doubt(len(rows)), advantage)

    def _doubt(self, requests: int) -> float:
        """The way back from zero is long: no first impression of the cost of good drafts leads there."""
        return DOUBT / math.sqrt(requests) * DOUBTFUL / (self.shown + DOUBTFUL)

    def _caps(self, requests: list[str], survival: Floats, k: int, price: float) -> dict[str, int]:
        if not self.params.per_request:
            return {}
        short = np.flatnonzero(survival[:, k - 1] < price)  # survival falls from slot to slot
        limit = (survival[short, :k] >= price).sum(axis=1)
        return dict(zip([requests[i] for i in short.tolist()], limit.tolist(), strict=True))

    def _rows(self, requests: Sequence[str]) -> Ints:
        if self._over and not (self._pending and set(self._over).isdisjoint(requests)):  # or a name is used again
            self._settle()
        rows, fresh = self.slots.rows(requests)
        if fresh:
            self.walkers.begin(self.slots.size, fresh)
            for effects in (self.survival.effects, self.calibration.effects):
                effects.begin(self.slots, fresh)
        return rows

    def _stop_rule(self, survival: Floats, n: int, verify: float, worth: float) -> StopRule:
        total = survival.sum(axis=0)
        hazard = np.append(total[:1] / n, total[1:] / np.maximum(total[:-1], 1e-9))
        hazard = np.minimum(np.maximum(hazard, 1e-4), 1 - 1e-4)
        odds = np.log(hazard / (1.0 - hazard)) + self.calibration.following
        return StopRule(
            verify_cost=min(verify, 0.95),
            draft_cost=worth * self.cost.draft_step(n),
            calibration=tuple(map(tuple, self.calibration.weights.tolist())),
            hazard=tuple((1.0 / (1.0 + np.exp(-odds))).tolist()),
        )

    def _forced(self, k: int) -> int | None:
        """A draft length that the guard, a probe from zero, or the cost model's curiosity takes instead of `k`."""
        if self.params.guard and self.guard.fallback != POLICY:
            return self.guard.fallback
        kept = float(self.survival.base[0])
        return self.visits.forced(k, self.steps, self.zero, kept, self._promising, self._load[0])

    def _promising(self) -> int | None:
        """A length that is the best one if what it costs is believed too high, as well it may be."""
        (n, context), lengths = self._load, self.chooser.lengths
        rivals = self._rates < 1.0
        if n == 1:  # one request is often hard for a while
            rivals &= lengths > 0
        if self.params.confidence and self.sees_confidence and self.judging.on:  # drafts end by the rule
            rivals &= lengths == 0
        if not rivals.any():
            return None
        doubt = self.cost.doubt(n, n * (1.0 + lengths), lengths, context)
        rates = np.where(rivals, self._rates * np.exp(MAYBE * doubt), 0.0)
        best = int(rates.argmax())
        return self.ladder[best] if rates[best] > 1.0 else None

    # Learning

    def observe(self, step: Step) -> None:
        self.steps += 1
        fresh = self.visits.done(step.k)
        self.widest = max(self.widest, step.verified_tokens)
        self.shown += step.draft_steps > 0
        self._pending.append(Seen(step, self._last, self._plain))
        self.awake = self.awake + 1 if self._plain.k else 0  # what brings drafts back may be luck
        soon = min(self.awake // 2, self.judging.due(step.requests)) if step.k else math.inf
        if fresh or len(self._pending) >= min(LEARN_EVERY if self.awake else IDLE_EVERY, self.steps // NEW, soon):
            self._settle()

    def _learn(self) -> None:
        """Everything the pending steps say, at once: numpy costs the same for one row as for fifty."""
        seen, self._pending, self._decided = self._pending, [], None
        self.walkers.prompts += sum([s.step.prompts for s in seen])
        self.walkers.prompt_tokens += sum([s.step.prefill_tokens for s in seen])
        before = [self.drafted, *(s.step.draft_steps > 0 for s in seen)]
        self.drafted = before[-1]
        # The first draft after a pause also feeds the drafter what it missed.
        told = [i for i, s in enumerate(seen) if before[i] or not s.step.draft_steps]
        slow = self.cost.observe([seen[i].timed() for i in told])
        for i, factor in zip(told, slow.tolist(), strict=True):
            seen[i] = seen[i] if factor == 1.0 else seen[i].sped(factor)
        drafting = [s for s in seen if s.step.k > 0 and s.step.rounds]
        self.guard.idle(len(seen) - len(drafting))
        self.judging.wait_on(len(seen))
        if drafting and self.k_max:
            self._learn_rounds(*thinned(drafting, self.slots.row))

    def _learn_rounds(self, seen: Sequence[Seen], stride: int) -> None:
        batch = Batch(seen, self.k_max)
        rows = self.slots.known(batch.ids)
        groups, history = Groups(rows), self.survival.hazards(rows)
        soft = np.full(len(rows), np.nan)
        if batch.watched:
            self.sees_confidence = self.steps >= SURE_STEPS
            predicted = self.calibration.predict(rows, batch.confidence)
            cut = np.flatnonzero((batch.drafted > batch.verified) & (batch.shown > batch.verified))
            soft[cut] = predicted[cut, batch.verified[cut]]
            self.calibration.learn_following(history, predicted, np.minimum(batch.drafted, batch.shown), batch.verified)
            self._check_honour(seen[-1], batch.confidence[batch.starts[-2] :])
            if self.params.per_request:
                self.price.learn(seen, batch, predicted, self.cost, self.walkers.overhead)
            self.calibration.observe(rows, groups, batch.verified, batch.accepted, batch.confidence)
        self.survival.observe(rows, groups, batch.verified, batch.accepted, soft)
        self._compare(seen, batch, rounds_of(self.walkers, rows, batch, history, soft, stride))

    def _check_honour(self, seen: Seen, confidence: Floats) -> None:
        step, last = seen.step, seen.plan
        if last.stop is None or step.k <= 1 or step.k != last.k:
            return
        if step.draft_steps < step.k:
            self.honoured += 0.5 * (1.0 - self.honoured)
        else:
            caps = np.array([last.caps.get(r.request_id, step.k) for r in step.rounds], np.int64)
            bias = np.array([last.bias.get(r.request_id, 0.0) for r in step.rounds])
            steps, _ = evaluate(last.stop, step.k, caps, bias, confidence)
            if steps < step.k:
                self.honoured *= 0.8

    def _compare(self, seen: Sequence[Seen], batch: Batch, share: Floats) -> None:
        """Feed the guard: what these steps took, and what every alternative would have for the same text."""
        if not self.cost.known:
            return
        found = compare(seen, batch, share, self._rungs, self.cost)
        if not len(found.whole):
            return
        self.guard.observe(len(found.whole), float(found.seconds.sum()), found.shadow_seconds[:, :-1].sum(axis=0))
        if self.guard.fallback != POLICY:
            return
        judged = [i for i, step in enumerate(found.whole.tolist()) if seen[step].judged]
        took, plain = float(found.seconds[judged].sum()), float(found.shadow_seconds[judged, -1].sum())
        self.judging.observe(len(judged), took, plain, len(batch.ids) / len(seen))
        for i in judged:
            if not seen[found.whole[i]].step.prefill_tokens:
                achieved = float(found.tokens[i]) * self.ratio / (float(found.seconds[i]) * self.rate)
                self.ratio = min(max(self.ratio + 0.02 * (min(achieved, 4.0) - self.ratio), 0.9), 1.15)

    def seed_cost(self, rows: Iterable[Sequence[float]]) -> None:
        """Start with a stored profile's step times (`policy.profile.read(path).rows`) instead of guesses."""
        self.cost.seed(rows)

    def forget(self, request_id: str) -> None:
        self._over.append(request_id)
        self._moved = True  # its name may come again

    def _settle(self) -> None:
        """Learn what is pending and let go who has ended: all at once, as their order must not count."""
        if self._pending:
            self._learn()
        over, self._over = self._over, []
        if rows := [row for row in map(self.slots.forget, over) if row is not None]:
            for kept in (self.survival.effects, self.calibration.effects, self.walkers):
                kept.end(rows)
        if not self.awake or self.guard.fallback == 0:  # not a visit: they stay there
            self.walkers.pause()

    # State

    def snapshot(self) -> dict[str, Any]:
        self._settle()
        self._decided = None
        return {name: getattr(self, name) for name in SCALARS} | {p: getattr(self, p).snapshot() for p in PARTS}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._pending, self._over, self._decided, self._asked = [], [], None, []
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
