"""The replay loop: a policy serves the requests of a trace under a cost curve, as an engine would run its rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.bench.sim.curves import Curve
from nwor_vllm.bench.traces import Trace
from nwor_vllm.policy import Policy, Round, Step, StopRule
from nwor_vllm.policy.stop import evaluate

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """Requests in the order they are served, `batch` at a time, each replaced when it ends, until `tokens` are out."""

    trace: Trace
    order: tuple[int, ...]  # request numbers, cycled
    batch: int
    tokens: int
    batches: tuple[int, ...] = ()  # bursts: the batch size changes to the next of these every `period` steps' worth
    period: int = 0  # tokens between changes

    def size(self, emitted: int) -> int:
        return self.batches[(emitted // self.period) % len(self.batches)] if self.batches else self.batch


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
    """Positions of the running requests; finished ones make room for the next of the order."""

    def __init__(self, load: Load) -> None:
        self.load, self.next = load, 0
        self.position: Ints = np.zeros(0, np.int64)
        self.end: Ints = np.zeros(0, np.int64)
        self.ids: list[str] = []
        self.fill(load.size(0))

    def fill(self, size: int) -> None:
        missing = size - len(self.ids)
        if missing <= 0:
            return
        order, starts = self.load.order, self.load.trace.starts
        chosen = [order[(self.next + i) % len(order)] for i in range(missing)]
        self.ids += [f"{self.next + i}" for i in range(missing)]
        self.next += missing
        self.position = np.concatenate([self.position, starts[chosen]])
        self.end = np.concatenate([self.end, starts[np.array(chosen) + 1]])

    def advance(self, tokens: Ints, size: int) -> list[str]:
        """Move on; return the ids that finished. A shrinking batch only stops refilling."""
        self.position += tokens
        over = self.position >= self.end
        if not over.any():
            self.fill(size)
            return []
        finished = [self.ids[i] for i in np.flatnonzero(over)]
        stay = np.flatnonzero(~over)
        self.position, self.end = self.position[stay], self.end[stay]
        self.ids = [self.ids[i] for i in stay]
        self.fill(size)
        return finished


def replay(policy: Policy, load: Load, curve: Curve, seed: int = 0, noise: float = 0.03) -> Outcome:
    """`noise` is on what the policy sees (log-normal, with rare hiccups); the outcome is timed by the curve itself."""
    rng = np.random.default_rng(seed)
    run, out, k_max = Running(load), Outcome(), load.trace.k_max
    accepts, confidences = load.trace.accepted, load.trace.confidence
    while out.tokens < load.tokens:
        n = len(run.ids)
        plan = policy.plan(run.ids)
        k = min(plan.k, k_max)
        room = np.minimum(run.end - run.position - 1, k)
        caps = room
        if plan.caps:
            caps = np.minimum(room, [plan.caps.get(r, k) for r in run.ids])
        steps, kept, drafted = _draft(plan.stop, plan.bias, run, k, caps, confidences)
        accepted = np.minimum(accepts[run.position], kept)
        verified = n + int(kept.sum())
        seconds = float(curve.seconds(n, verified, steps))
        rounds = _rounds(run, drafted, kept, accepted, confidences)
        out.tokens += n + int(accepted.sum())
        out.seconds += seconds
        out.steps += 1
        out.rounds += n
        out.draft_steps += steps
        out.verified += verified - n
        out.accepted += int(accepted.sum())
        out.lengths[k] = out.lengths.get(k, 0) + 1
        shown = seconds * np.exp(noise * rng.normal()) * (8.0 if rng.random() < 0.002 else 1.0) if noise else seconds
        policy.observe(Step(rounds, plan.k, steps, float(shown), n, verified))
        for request in run.advance(accepted + 1, load.size(out.tokens)):
            policy.forget(request)
    return out


def _draft(
    stop: StopRule | None,
    bias: object,
    run: Running,
    k: int,
    caps: Ints,
    confidences: NDArray[np.float64],
) -> tuple[int, Ints, Ints]:
    """Draft steps run; per row the slots verified, and the slots drafted."""
    n = len(caps)
    if k == 0 or not n or caps.max() <= 0:
        return 0, np.zeros(n, np.int64), np.zeros(n, np.int64)
    if stop is None or not stop.active:
        steps = k
        return steps, caps, np.full(n, steps)
    shift = np.array([bias.get(r, 0.0) for r in run.ids]) if isinstance(bias, dict) and bias else np.zeros(n)
    steps, kept = evaluate(stop, k, caps, shift, confidences[run.position, :k])
    return steps, kept, np.minimum(np.where(kept < caps, kept + 1, kept), steps)


def _rounds(run: Running, drafted: Ints, kept: Ints, accepted: Ints, confidences: NDArray[np.float64]) -> list[Round]:
    most = int(drafted.max()) if len(drafted) else 0
    shown = confidences[run.position, :most].tolist()
    return [
        Round(name, d, v, a, tuple(c[:d]))
        for name, d, v, a, c in zip(run.ids, drafted.tolist(), kept.tolist(), accepted.tolist(), shown, strict=True)
    ]


def replay_fixed(load: Load, curve: Curve, k: int) -> Outcome:
    """A constant draft length, without the bookkeeping of a policy."""
    run, out, accepts = Running(load), Outcome(), load.trace.accepted
    while out.tokens < load.tokens:
        n = len(run.ids)
        kept = np.minimum(k, run.end - run.position - 1)
        gain = np.minimum(accepts[run.position], kept) + 1
        steps = k if kept.max() > 0 else 0
        out.tokens += int(gain.sum())
        out.seconds += float(curve.seconds(n, n + int(kept.sum()), steps))
        out.steps += 1
        out.rounds += n
        run.advance(gain, load.size(out.tokens))
    out.lengths = {k: out.steps}
    return out
