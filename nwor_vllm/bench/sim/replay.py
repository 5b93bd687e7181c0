"""The replay loop: a policy serves a load under a cost curve, as an engine would run its rounds."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.bench.sim.curves import Curve
from nwor_vllm.bench.sim.load import Ints, Lanes, Load
from nwor_vllm.policy import Plan, Policy, Round, Step
from nwor_vllm.policy.stop import evaluate
from nwor_vllm.policy.stopping import Stopping

FEW = 6  # rows up to which plain Python judges drafts faster than numpy
HICCUP, HICCUP_TIMES = 0.002, 8.0
SLOW_START, SLOW_STEPS = 0.35, 70  # by how much a start is slower, and until when
UNSTEADY = 0.08  # noise of a step on a machine that others use, too
LEVEL, LEVEL_STEPS = 0.12, 45  # its pace jumps to another level after so many steps
DRIFT = 0.9, 0.05  # and drifts around it: what a step keeps, and adds


@dataclass
class Outcome:
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    rounds: int = 0
    draft_steps: int = 0
    verified: int = 0
    accepted: int = 0
    lengths: dict[int, int] = field(default_factory=dict)  # planned draft length -> steps

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Running:
    """Where every client is, and the name of its request, whose kind is told to `begin`."""

    def __init__(self, load: Load, lanes: Lanes, begin: Callable[[str, str], None]) -> None:
        self.load, self.lanes, self.begin = load, lanes, begin
        self.at: Ints = lanes.start.copy()
        self.made = 0
        self.ids: list[str] = []
        self.active: Ints = np.arange(0)
        self.open(load.size(0))

    def open(self, size: int) -> None:
        """Clients up to `size` take part; one beyond it leaves when its request ends."""
        fresh = np.setdiff1d(np.arange(size), self.active)
        self.active = np.concatenate([self.active, fresh])
        self.ids += map(self._begin, fresh.tolist())

    def _begin(self, client: int) -> str:
        self.made += 1
        if kinds := self.load.trace.kinds:
            self.begin(str(self.made), kinds[self.lanes.request[self.at[client]]])
        return str(self.made)

    def advance(self, tokens: Ints, emitted: int) -> list[str]:
        """Move on; return the names that ended."""
        at = self.at[self.active]
        over = np.flatnonzero(tokens > self.lanes.room[at])
        self.at[self.active] = at + tokens
        size = self.load.size(emitted)
        ended = []
        if len(over):
            clients = self.active[over]
            self.at[clients] = np.where(
                self.at[clients] >= self.lanes.last[clients], self.lanes.first[clients], self.at[clients]
            )
            ended = [self.ids[i] for i in over.tolist()]
            goes_on = clients < size
            for i in over[goes_on].tolist():
                self.ids[i] = self._begin(self.active[i])
            if not goes_on.all():
                stay = np.setdiff1d(np.arange(len(self.active)), over[~goes_on])
                self.active, self.ids = self.active[stay], [self.ids[i] for i in stay]
        if size > len(self.active):
            self.open(size)
        return ended


def replay(
    policy: Policy, load: Load, curve: Curve, seed: int = 0, noise: float = 0.03, unsteady: bool = False
) -> Outcome:
    """`noise` is on what the policy sees (log-normal, with rare hiccups), and so is the pace of an `unsteady` machine:
    slow for a start, then jumping and drifting. The outcome is timed by the curve itself."""
    rng = np.random.default_rng(seed)
    lanes = Lanes(load)
    run, out, k_max = Running(load, lanes, policy.begin), Outcome(), load.trace.k_max
    confidences = load.trace.confidence
    price = functools.lru_cache(maxsize=1 << 16)(lambda *step: float(curve.seconds(*step)))
    blur = _noise(rng, max(noise, UNSTEADY) if unsteady else noise)
    pace = _pace(rng) if unsteady else itertools.repeat(1.0)
    while out.tokens < load.tokens:
        at = run.at[run.active]
        n = len(at)
        plan = policy.plan(run.ids)
        k = min(plan.k, k_max)
        watched = k > 0 and (plan.watch or (plan.stop is not None and plan.stop.active))
        shown = confidences[lanes.position[at], :k] if watched else None
        steps, kept, drafted = _draft(plan, k, run.ids, shown)
        accepted = np.minimum(lanes.kept[at], kept)
        verified = n + int(kept.sum())
        judged = steps if watched else 0
        seconds = price(n, verified, steps, judged)
        kept_tokens = int(accepted.sum())
        out.tokens += n + kept_tokens
        out.seconds += seconds
        out.steps += 1
        out.rounds += n
        out.draft_steps += steps
        out.verified += verified - n
        out.accepted += kept_tokens
        out.lengths[k] = out.lengths.get(k, 0) + 1
        room = lanes.room[at]  # what lies beyond a text is neither kept nor rejected
        rounds = _rounds(run.ids, drafted, np.minimum(kept, room), accepted, shown)
        policy.observe(Step(rounds, plan.k, steps, seconds * next(blur) * next(pace), n, verified, judged_steps=judged))
        for request in run.advance(accepted + 1, out.tokens):
            policy.forget(request)
    for request in run.ids:
        policy.forget(request)
    return out


def _noise(rng: np.random.Generator, noise: float) -> Any:
    while True:
        factors = np.exp(noise * rng.normal(size=1024))
        factors[rng.random(1024) < HICCUP] *= HICCUP_TIMES if noise else 1.0
        yield from factors.tolist()


def _pace(rng: np.random.Generator) -> Iterator[float]:
    """How many times longer steps take: as measured on a shared CPU, a slow first second, levels that come and go."""
    level = drift = 0.0
    for step in itertools.count():
        level = LEVEL * rng.normal() if step % LEVEL_STEPS == 0 else level
        drift = DRIFT[0] * drift + DRIFT[1] * rng.normal()
        yield (1.0 + SLOW_START * min(max((SLOW_STEPS - step) / 20.0, 0.0), 1.0)) * math.exp(level + drift)


def _draft(plan: Plan, k: int, ids: Sequence[str], shown: NDArray[np.float64] | None) -> tuple[int, Ints, Ints]:
    """Draft steps run; per row the slots verified, and the slots drafted."""
    n = len(ids)
    caps = np.array([min(plan.caps.get(r, k), k) for r in ids]) if plan.caps else np.full(n, k)
    if k == 0 or caps.max() <= 0:
        return 0, np.zeros(n, np.int64), np.zeros(n, np.int64)
    stop = plan.stop
    if stop is None or not stop.active or shown is None:
        steps = int(caps.max())
        return steps, caps, caps
    bias = plan.bias if isinstance(plan.bias, Mapping) else {}
    if n <= FEW:
        round_ = Stopping(stop, k, caps.tolist(), [bias.get(r, 0.0) for r in ids])
        rows = shown.tolist()
        while round_.going:
            position = round_.drafted
            round_.take([rows[r][position] for r in round_.going])
        steps, kept = round_.drafted, np.array(round_.kept)
        return steps, kept, np.array([len(row) for row in round_.seen])
    shift = np.array([bias.get(r, 0.0) for r in ids]) if bias else np.zeros(n)
    steps, kept = evaluate(stop, k, caps, shift, shown)
    return steps, kept, np.minimum(np.where(kept < caps, kept + 1, kept), steps)


def _rounds(
    ids: Sequence[str], drafted: Ints, kept: Ints, accepted: Ints, shown: NDArray[np.float64] | None
) -> list[Round]:
    columns = ids, drafted.tolist(), kept.tolist(), accepted.tolist()
    if shown is None:
        return list(map(Round, *columns))
    rows = shown[:, : int(drafted.max(initial=0))].tolist()
    return list(map(Round, *columns, [tuple(c[:d]) for c, d in zip(rows, columns[1], strict=True)]))


def replay_tables(load: Load, curve: Curve, tables: Sequence[Mapping[int, int]]) -> list[Outcome]:
    """Draft lengths by batch size (the nearest one named), without confidence: every table at once, side by side."""
    lanes = Lanes(load)
    count, n = len(tables), load.clients
    sizes = np.array(sorted(tables[0]))
    table = np.array([[t[int(s)] for s in sizes] for t in tables])
    sizes_in = np.arange(1, n + 1)  # requests that may be running
    lengths = table[:, np.abs(sizes_in[:, None] - sizes).argmin(axis=1)]
    price = np.asarray(curve.seconds(sizes_in, sizes_in * (1 + lengths), lengths), float)
    at = np.tile(lanes.start, (count, 1))
    active = np.tile(np.arange(n) < load.size(0), (count, 1))
    tokens, steps, rounds = np.zeros((3, count), np.int64)
    seconds = np.zeros(count)
    every = np.arange(count)
    while len(every):
        here, on = at[every], active[every]
        running = on.sum(axis=1)
        k = lengths[every, running - 1]
        gain = (np.minimum(lanes.kept[here], k[:, None]) + 1) * on
        seconds[every] += price[every, running - 1]
        tokens[every] += gain.sum(axis=1)
        steps[every] += 1
        rounds[every] += running
        over = gain > lanes.room[here]
        here = here + gain
        at[every] = np.where(here >= lanes.last, lanes.first, here)
        if load.batches:
            target = np.array([load.size(int(x)) for x in tokens[every]])[:, None]
            active[every] = (on & ~(over & (np.arange(n) >= target))) | (np.arange(n) < target)
        every = every[tokens[every] < load.tokens]
    return [
        Outcome(int(t), float(s), int(x), int(r)) for t, s, x, r in zip(tokens, seconds, steps, rounds, strict=True)
    ]


def replay_fixed(load: Load, curve: Curve, k: int) -> Outcome:
    return replay_tables(load, curve, [{load.batch: k}])[0]
