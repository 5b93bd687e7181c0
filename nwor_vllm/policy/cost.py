"""What a step takes: learnt online from step times, believed only where it was seen, monotone in what is asked of it.

seconds = w . (1, requests, draft steps, draft steps x requests, any draft at all, context, judged draft steps, judged
x requests, any draft to verify, any prefill, its tokens, those that a drafter reads too, hinges of the verified tokens)
with w >= 0, so monotone, and convex in the tokens as rooflines are; times, where nothing is prefilled, a correction per
size bucket of the verified tokens (`sizes.py`).
Directions that the traffic does not excite stay at the prior (one draft length at one batch size cannot tell
verification from drafting; a ridge can). What was learnt walks at random from then on: it is doubted more with every
step, believed until something newer says otherwise, and then soon replaced. Residuals are clipped, so that a suspended
machine is one bounded mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nwor_vllm.policy.pace import WINDOW, Pace
from nwor_vllm.policy.sizes import Sizes, places
from nwor_vllm.policy.stop import Floats

HINGES = np.array([0.0, 16.0, 32.0, 48.0, 64.0, 96.0, 128.0, 160.0, 192.0, 256.0, 320.0, 384.0, 512.0])
# Shares of a step before anything is known: a large target, a drafter of a tenth of it, verification almost free.
PRIOR_SHARES = np.full(12 + len(HINGES), 0.0001)
PRIOR_SHARES[:13] = 1.0, 0.004, 0.08, 0.001, 0.02, 0.001, 0.002, 0.0001, 0.02, 0.02, 0.005, 0.0005, 0.0005
SIZE = len(PRIOR_SHARES)
DRAFT, DRAFT_REQUEST, ANY, CONTEXT, JUDGED, JUDGED_REQUEST, VERIFY = range(2, 9)
PREFILL, PREFILL_TOKENS, PREFILL_DRAFT, TOKENS = range(9, 13)
# The prior's standard deviation over the weight: judging and tokens cost next to nothing on a GPU, much on a CPU.
PRIOR_WIDTH = np.array([1.0] * JUDGED + [10.0] * (SIZE - JUDGED))
PRIOR_WIDTH[ANY] = 10.0  # steps without any draft take another path, on some engines a much shorter one
PRIOR_WIDTH[PREFILL_DRAFT] = 30.0  # where all steps draft, a tenth of what prompts cost is taken for the drafter's
RIDGE = 1.0 / PRIOR_WIDTH**2
NOISE = 0.05  # least relative noise of a step time
EARLY = 0.25  # of the first step of a large batch; steps of one request are many, and soon outvote a bad first one
CLIP = 3.0  # residuals beyond this many noises have no more influence
ABSURD = 8.0  # times as long, or as short, as a rough guess: a clock that was set, a machine that was suspended
FAST = 0.5  # below which they have none: no accident makes a step fast
WALK = 0.005  # of its value, by how much each weight may have moved in a step (standard deviation)
EAGER, FITS = 64, 4  # until this many steps were seen all are fitted anew, so many times; then every SOLVE_EVERY steps
SOLVE_EVERY = 16
SEEDED, STEADY = 256.0, 4.0  # steps that a profile counts as; weight of its steady rows
SHORTEST = 1e-9  # seconds; no step is predicted to be free
KNOTS = np.append(HINGES, 65536.0)  # between which what verified tokens cost is straight
BENDS = np.maximum(KNOTS[:, None] - HINGES, 0.0)


class Timed(NamedTuple):
    """One step as the model sees it."""

    requests: int
    verified: int
    steps: int  # draft forwards
    judged: int  # those after which the draft was judged
    context: int
    seconds: float
    prefill: int = 0


def features(
    requests: Any, verified: Floats, steps: Any, context: Any = 0.0, judged: Any = 0.0, prefill: Any = 0.0
) -> Floats:
    x = np.empty((len(verified), SIZE))
    x[:, 0], x[:, 1], x[:, DRAFT], x[:, DRAFT_REQUEST] = 1.0, requests, steps, steps * requests
    x[:, ANY], x[:, CONTEXT] = steps > 0, context / 1024.0
    x[:, JUDGED], x[:, JUDGED_REQUEST], x[:, VERIFY] = judged, judged * requests, verified > requests
    x[:, PREFILL], x[:, PREFILL_TOKENS], x[:, PREFILL_DRAFT] = prefill > 0, prefill, prefill * (steps > 0)
    np.maximum(verified[:, None] - HINGES, 0.0, out=x[:, TOKENS:])
    return x


class Cost:
    def __init__(self) -> None:
        self._believe(PRIOR_SHARES)
        self.prior: Floats = np.zeros(SIZE)
        self.moment: Floats = np.zeros((SIZE, SIZE))
        self.target: Floats = np.zeros(SIZE)
        self.sizes = Sizes()
        self.seen = 0
        self.solve_at = 0
        self.early: list[list[float]] = []  # the first EAGER steps, at pace 0
        self.pace = Pace()
        self.profiled = False  # and fewer live steps were seen than tell the pace of today
        self.first: list[float] = []  # residuals of those
        self.error = math.nan  # moving mean of |log(measured / predicted)|

    @property
    def known(self) -> bool:
        return self.seen > 0

    @property
    def _noise(self) -> float:
        return NOISE if math.isnan(self.error) else max(NOISE, 1.25 * self.error)  # a Gaussian's deviation

    @property
    def _scatter(self) -> float:
        """How many times the least noise there is."""
        return self._noise / NOISE

    @property
    def _scale(self) -> Floats:
        return np.maximum(self.prior, 1e-12)

    def predict(self, requests: Any, verified: Floats, steps: Floats, context: Any = 0.0, judged: Any = 0.0) -> Floats:
        """Seconds of steps; 1 per target-only step while unknown. Any argument may be an array, a value per step."""
        w = self._terms  # the same as features(...) @ weights, in fewer operations
        base = np.interp(verified, KNOTS, self._heights)
        base += w[0] + w[1] * requests + w[CONTEXT] / 1024.0 * context
        base += (w[DRAFT] + w[DRAFT_REQUEST] * requests) * steps + w[ANY] * (steps > 0)
        base += (w[JUDGED] + w[JUDGED_REQUEST] * requests) * judged + w[VERIFY] * (verified > requests)
        several = isinstance(requests, np.ndarray)
        base *= self.sizes.factors(requests, verified) if several else self.sizes.along(requests, verified)
        return np.asarray(np.maximum(base, SHORTEST))

    def _believe(self, weights: Floats) -> None:
        self.weights, self._terms = weights, weights.tolist()
        self._heights = BENDS @ weights[TOKENS:]

    def prefill(self, tokens: Floats, drafting: Any) -> Floats:
        """Seconds that prompts take beside the rounds of their steps; where these draft, the drafter reads them too."""
        w = self._terms
        return np.asarray(w[PREFILL] * (tokens > 0) + (w[PREFILL_TOKENS] + w[PREFILL_DRAFT] * drafting) * tokens)

    @property
    def prompt_token(self) -> float:
        """Seconds in which the drafter reads one."""
        return float(self._terms[PREFILL_DRAFT])

    def draft_step(self, requests: float) -> float:
        """Seconds of one more draft step, judged."""
        w = self._terms
        return float(w[DRAFT] + w[JUDGED] + (w[DRAFT_REQUEST] + w[JUDGED_REQUEST]) * requests)

    def lengths(self, requests: float, drafts: Floats, context: float = 0.0) -> tuple[Floats, Floats]:
        """Seconds of steps that draft so many tokens for every request; and what each of the last quarter of a step's
        verified tokens adds: what trimming saves."""
        tokens = requests * (1.0 + drafts)
        fewer = np.maximum(0.75 * tokens, requests + 0.5)  # some draft is verified in any case
        nothing = np.zeros(len(drafts))
        sizes, steps = np.concatenate([tokens, tokens, fewer]), np.concatenate([drafts, nothing, nothing])
        seconds, high, low = self.predict(requests, sizes, steps, context).reshape(3, -1)
        return seconds, np.maximum(high - low, 0.0) / (tokens - fewer)

    def _precision(self) -> Floats:
        """Of the weights over the prior's: what the steps tell, and the ridge."""
        a = self.moment * np.outer(self._scale, self._scale) + np.diag(RIDGE)
        a[np.diag_indices(SIZE)] *= 1.0 + 1e-9  # absurd step times leave a matrix that rounding makes singular
        return a

    def doubt(self, requests: float, verified: Floats, steps: Floats, context: float) -> Floats:
        """Standard deviation of what `predict` says, over it."""
        covariance = np.linalg.inv(self._precision())
        x = features(requests, verified, steps, context) * self._scale
        variance = np.maximum(((x @ covariance) * x).sum(axis=1), 0.0)
        return np.asarray(np.sqrt(variance) / self.predict(requests, verified, steps, context))

    def observe(self, steps: Sequence[Timed]) -> Floats:
        """Learn from them; return how many times slower than at first the machine was at each."""
        good = [math.isfinite(s.seconds) and s.seconds > 0 and s.requests > 0 for s in steps]
        slow = np.full(len(steps), math.exp(self.pace.now))
        if any(good):
            slow[good] = np.exp(self._learn(np.array(steps, float)[good].T))
        return slow

    def _learn(self, data: Floats) -> Floats:
        requests, verified, steps, judged, context, seconds, prefill = data
        x, alone = features(requests, verified, steps, context, judged, prefill), prefill == 0
        if not self.seen:
            self._begin(x, seconds, alone)
        expected = np.maximum(x @ self.weights, SHORTEST)
        ratio = np.log(np.maximum(seconds, 1e-12) / expected)
        residuals = ratio - np.log(self.sizes.factors(requests, verified))
        if self.profiled:
            self._compare_pace(residuals)
            return np.full(len(residuals), self.pace.now)
        pace = self._pace(data, alone, residuals)
        for wrong in np.minimum(np.abs(residuals - pace), 1.0)[alone].tolist():
            self.error = wrong if math.isnan(self.error) else self.error + 0.05 * (wrong - self.error)
        if self.seen < EAGER:
            self.early += np.column_stack([data[:5].T, seconds * np.exp(-pace), prefill]).tolist()
            self.seen += len(x)
            self._learn_early()
            return pace
        ratio -= pace
        clipped = expected * np.exp(np.minimum(np.maximum(ratio, -FAST), CLIP * NOISE))
        scale = 1.0 / (self._noise * expected)
        scaled = x * scale[:, None]
        self._age(len(x))
        self.moment += scaled.T @ scaled
        self.target += (clipped * scale) @ scaled
        self.seen += len(x)
        self._correct(requests[alone], verified[alone], ratio[alone])
        if self.seen >= self.solve_at:
            self._solve()
            self.solve_at = self.seen + SOLVE_EVERY
        return pace

    def _begin(self, x: Floats, seconds: Floats, alone: Any) -> None:
        """The scale is the median of the first steps: some of a process's are slow."""
        scales = (seconds / (x @ PRIOR_SHARES))[alone if alone.any() else ~alone]
        self.prior = PRIOR_SHARES * float(np.median(scales))
        self._believe(self.prior)

    def _learn_early(self) -> None:
        """All of the first steps, anew with every one: no order of them makes a slow one decide what others cost."""
        requests, verified, steps, judged, context, seconds, prefill = np.array(self.early).T
        x, alone = features(requests, verified, steps, context, judged, prefill), prefill == 0
        self._begin(x, seconds, alone)
        rough = x @ self.prior
        seconds = np.minimum(np.maximum(seconds, rough / ABSURD), rough * ABSURD)
        first = EARLY * (1.0 - 1.0 / np.maximum(requests, 1.0)) / np.sqrt(np.arange(len(x)) + 1.0)
        trust, expected = self._fit(x, seconds, np.maximum(self._noise, first) ** -2.0, rough)
        self.sizes.clear()
        self._correct(requests[alone], verified[alone], np.log(seconds / expected)[alone], trust[alone])
        self.solve_at = self.seen + SOLVE_EVERY
        self.early = self.early if self.seen < EAGER else []

    def _fit(self, x: Floats, seconds: Floats, information: Floats, expected: Floats) -> tuple[Floats, Floats]:
        """Steps at once, outliers with less weight each time: how far they are trusted, and the seconds expected."""
        trust = np.ones(len(x))
        for _ in range(FITS):
            scale = np.sqrt(information * trust) / np.maximum(seconds, expected)  # so neither slow nor fast ones lead
            scaled = x * scale[:, None]
            self.moment, self.target = scaled.T @ scaled, (seconds * scale) @ scaled
            self._solve()
            expected = np.maximum(x @ self.weights, SHORTEST)
            trust = np.minimum(1.0, NOISE / np.maximum(np.abs(np.log(seconds / expected)), 1e-6))
        return trust, expected

    def _age(self, steps: int) -> None:
        """A random walk of the weights: what much is known of is known no better than it may have moved, the rest stays
        as known as it was. In terms of covariances: add the walk's."""
        walk = math.sqrt(steps) * WALK * (self.weights + self.prior)
        moment = self.moment * np.outer(walk, walk)
        a = np.eye(SIZE) + moment
        a[np.diag_indices(SIZE)] *= 1.0 + 1e-9  # as in `_precision`
        less = np.linalg.solve(a, np.column_stack([moment, self.target * walk]))
        self.moment = 0.5 * (less[:, :-1] + less[:, :-1].T) / np.outer(walk, walk)
        self.target = less[:, -1] / walk

    def _pace(self, data: Floats, alone: Any, residuals: Floats) -> Floats:
        requests, verified, steps, judged, _, seconds, _ = data
        drafts, watched, clear = steps.astype(int).tolist(), (judged > 0).tolist(), alone.tolist()
        kinds = zip(places(requests, verified), drafts, watched, clear, strict=True)
        told = [(*place, drafted, int(shown)) if one else None for place, drafted, shown, one in kinds]
        return self.pace.observe(told, seconds.tolist(), residuals.tolist() if self.seen >= EAGER else ())

    def _correct(self, requests: Floats, verified: Floats, ratio: Floats, trust: Floats | None = None) -> None:
        self.sizes.learn(places(requests, verified), ratio, trust, self._scatter)

    def _solve(self) -> None:
        """Ridge towards the prior, weights not negative: what comes out negative is held at zero, and solved again."""
        scale = self._scale
        a = self._precision()
        b = self.target * scale + RIDGE
        free = np.ones(SIZE, bool)
        w = np.zeros(SIZE)
        while free.any():
            w[free] = np.linalg.solve(a[np.ix_(free, free)], b[free])
            negative = free & (w < 0.0)
            if not negative.any():
                break
            w[negative], free = 0.0, free & ~negative
        self._believe(scale * w if w.any() else self.prior)

    def seed(self, rows: Iterable[Sequence[float]]) -> None:
        """Start warm: (requests, verified tokens, draft steps, judged, context tokens, seconds) as measured before. It
        tells the shape of the costs and counts as a few steps; the first live ones set the pace."""
        if not (rows := [*rows]):
            return
        requests, verified, steps, judged, context, seconds = np.array(rows, float).T
        x = features(requests, verified, steps, context, judged)
        self.prior = PRIOR_SHARES * float(np.median(seconds / (x @ PRIOR_SHARES)))
        # A length that stays what it is is what serving mostly runs.
        often = np.where(verified == requests * (1.0 + steps), STEADY, 1.0)
        _, expected = self._fit(x, seconds, often * (SEEDED / often.sum() / NOISE**2), seconds)
        self.seen = self.solve_at = EAGER
        self._correct(requests, verified, np.log(seconds / expected))
        self.sizes.doubt(self._scatter)
        self.profiled = True

    def _compare_pace(self, residuals: Floats) -> None:
        """The first live steps behind a profile: what they all take longer is not the price of the sizes they are."""
        self.first += residuals.tolist()
        if len(self.first) >= WINDOW:
            self.pace.now = float(np.median(self.first))
            self.first, self.profiled = [], False

    def snapshot(self) -> dict[str, Any]:
        return {
            "weights": self.weights.tolist(),
            "prior": self.prior.tolist(),
            "moment": self.moment.tolist(),
            "target": self.target.tolist(),
            "sizes": self.sizes.snapshot(),
            "seen": self.seen,
            "solve_at": self.solve_at,
            "early": [list(row) for row in self.early],
            "pace": self.pace.snapshot(),
            "profiled": self.profiled,
            "first": list(self.first),
            "error": None if math.isnan(self.error) else self.error,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._believe(np.array(state["weights"], float))
        self.prior = np.array(state["prior"], float)
        self.moment, self.target = np.array(state["moment"], float), np.array(state["target"], float)
        self.sizes.restore(state["sizes"])
        self.seen, self.solve_at = int(state["seen"]), int(state["solve_at"])
        self.early = [[float(x) for x in row] for row in state["early"]]
        self.pace.restore(state["pace"])
        self.profiled, self.first = bool(state["profiled"]), [float(x) for x in state["first"]]
        self.error = math.nan if state["error"] is None else float(state["error"])
