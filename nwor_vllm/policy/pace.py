"""How fast the machine is just now, from steps that are of the same kind as earlier ones.

A process's first steps are slow, machines drift, neighbours come and go. Taken for the price of the sizes that happened
to run, that would decide draft lengths for a long time. So times are held against those of the same kind: what they all
take longer than before is the machine's pace. Where only new kinds run, they would keep the pace they met for good; so
what a model of the costs says of them counts, but only if that is nearer to the pace at first: else a size that is
dearer than the model believes would be a slow machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nwor_vllm.policy.stop import Floats

WINDOW = 5  # steps whose median counts: a single one says nothing
KNOWN = 3  # steps after which a kind is one to hold others against
FOLLOW = 0.2  # how far each step moves the pace
STEADY = 32  # steps behind what a kind is believed to take
BURST = 0.15  # beyond which it is there at once
FAR = 1.0  # log of a time that is no pace
MOST = 512  # kinds remembered, the latest ones
AGE = 64.0  # steps in which what is known of a kind fades: the machine may have been slow when it was last seen

Kind = tuple[int, int, int, int]


class Pace:
    def __init__(self) -> None:
        self.now = 0.0  # log of how many times slower than at first
        self.steps = 0
        self.kinds: dict[Kind, tuple[float, float, int]] = {}  # mean log of seconds at pace 0, steps, and the last one
        self.last: list[float] = []  # what the last steps of known kinds told
        self.waiting: list[tuple[Kind, float, int]] = []  # those whose kinds have not learnt from them yet

    def observe(self, kinds: Sequence[Kind | None], seconds: Sequence[float], modelled: Sequence[float] = ()) -> Floats:
        """The pace at each of these steps; a kind that is None tells nothing. A single step that is far off is no pace
        for the next one, but one for itself: what it took is nobody's price. `modelled`: the pace of each if a model of
        the costs is right."""
        paces = np.empty(len(kinds))
        for i, (kind, taken) in enumerate(zip(kinds, seconds, strict=True)):
            self.steps += 1
            paces[i] = (
                self.now if kind is None else self._see(kind, math.log(taken), modelled[i] if modelled else math.inf)
            )
        return paces

    def _see(self, kind: Kind, log: float, modelled: float) -> float:
        mean, count = self._known(kind, self.steps)
        just, told = self.now, log - mean
        if count >= KNOWN:
            just = told if abs(told - self.now) > FAR else self._follow(told)
        elif abs(modelled) < abs(self.now):
            self._follow(modelled)
            just = self.now
        self.waiting.append((kind, log, self.steps))
        if len(self.waiting) > WINDOW // 2:  # by then the median knows the pace that it had
            self._learn(*self.waiting.pop(0))
        return just

    def _known(self, kind: Kind, step: int) -> tuple[float, float]:
        mean, count, last = self.kinds.get(kind, (0.0, 0.0, step))
        return mean, count * math.exp((last + 1 - step) / AGE)

    def _learn(self, kind: Kind, log: float, step: int) -> None:
        mean, count = self._known(kind, step)
        if count and abs(log - self.now - mean) > FAR:  # that step was suspended, or those that came first were
            count /= 2
        else:
            count = min(count + 1.0, STEADY)
            mean += (log - self.now - mean) / count
        self.kinds.pop(kind, None)
        self.kinds[kind] = (mean, count, step) if count >= 0.5 else (log - self.now, 1.0, step)
        if len(self.kinds) > MOST:
            del self.kinds[next(iter(self.kinds))]

    def _follow(self, told: float) -> float:
        self.last = [*self.last[1 - WINDOW :], told]
        step = sorted(self.last)[len(self.last) // 2] - self.now
        self.now += step if abs(step) > BURST else FOLLOW * step
        return told if abs(told - self.now) > BURST else self.now

    def snapshot(self) -> dict[str, Any]:
        kinds = [[*kind, *known] for kind, known in self.kinds.items()]
        waiting = [[*kind, *rest] for kind, *rest in self.waiting]
        return {"now": self.now, "last": list(self.last), "steps": self.steps, "kinds": kinds, "waiting": waiting}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.now, self.last = float(state["now"]), [float(x) for x in state["last"]]
        self.steps = int(state["steps"])
        self.kinds = {
            (int(a), int(b), int(c), int(d)): (float(mean), float(count), int(at))
            for a, b, c, d, mean, count, at in state["kinds"]
        }
        self.waiting = [
            ((int(a), int(b), int(c), int(d)), float(log), int(at)) for a, b, c, d, log, at in state["waiting"]
        ]
