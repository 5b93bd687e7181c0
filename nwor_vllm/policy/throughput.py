"""The best measured rate among candidate lengths: moving averages of tokens and time per candidate, with hysteresis.

score(K) = tau(K) / cycle(K). A candidate takes over when it beats the current one by a margin often enough in a row;
after a switch nothing moves for a while; other candidates are probed now and then; low acceptance falls back to the
shortest. The published form of this rule has defects that are absent here: its warm-up can end with candidates never
tried, an unscored current candidate compares as NaN and is never left, and a probe resets the count of low
acceptances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Plan, Step


@dataclass(frozen=True)
class ThroughputParams:
    candidates: tuple[int, ...] = ()  # draft lengths to choose from; empty = the ladder without 0
    warmup_cycles: int = 2  # steps each candidate is tried before scores count
    ewma_alpha: float = 0.10  # weight of the newest step
    switch_margin: float = 0.05  # how much better a candidate must score
    required_streak: int = 2  # steps in a row it must
    cooldown_cycles: int = 2  # steps without a switch after one
    probe_interval: int = 12  # steps between probes of another candidate; 0 = none
    low_accept_threshold: float = 0.35  # accepted / verified below this is low
    low_accept_streak: int = 2  # low steps in a row that fall back to the shortest candidate

    def __post_init__(self) -> None:
        if not 0 < self.ewma_alpha <= 1:
            raise ConfigError(f"policy_params.ewma_alpha is {self.ewma_alpha}; expected a number above 0, at most 1")
        for name in ("warmup_cycles", "required_streak", "low_accept_streak"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy_params.{name} is {getattr(self, name)}; expected a whole number from 1 up")
        for name in ("cooldown_cycles", "probe_interval", "switch_margin"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy_params.{name} is {getattr(self, name)}; expected a number from 0 up")
        if not 0 <= self.low_accept_threshold <= 1:
            raise ConfigError(
                f"policy_params.low_accept_threshold is {self.low_accept_threshold}; expected a number in 0..1"
            )


class Throughput:
    name = "throughput"

    def __init__(self, params: ThroughputParams, ladder: Sequence[int]) -> None:
        self.params = params
        self.candidates = tuple(sorted(params.candidates)) or tuple(k for k in ladder if k > 0) or (0,)
        if missing := [k for k in self.candidates if k not in ladder]:
            raise ConfigError(
                f"policy_params.candidates has {missing[0]}; the ladder has {', '.join(map(str, ladder))}"
            )
        self.tau = dict.fromkeys(self.candidates, math.nan)
        self.cycle = dict.fromkeys(self.candidates, math.nan)
        self.tries = dict.fromkeys(self.candidates, 0)
        self.current = self.candidates[-1]
        self.streak = self.low = self.cooldown = self.since_probe = self.next_probe = 0
        self.challenger = self.current
        self.probing = False

    def begin(self, request_id: str, kind: str) -> None:
        pass

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        self.probing = False
        untried = [k for k in self.candidates if self.tries[k] < self.params.warmup_cycles]
        if untried:
            return Plan(max(untried), watch=False)
        others = [k for k in self.candidates if k != self.current]
        if others and self.params.probe_interval and self.since_probe >= self.params.probe_interval:
            self.probing = True
            return Plan(others[self.next_probe % len(others)], watch=False)
        return Plan(self.current, watch=False)

    def score(self, k: int) -> float:
        """Tokens per request and second; -inf while unknown, so that anything known beats it."""
        value = self.tau[k] / self.cycle[k]
        return value if math.isfinite(value) else -math.inf

    def observe(self, step: Step) -> None:
        k = step.k
        if k not in self.tries or not step.rounds or step.prefill_tokens:
            return
        warm = self._warm()
        self.tries[k] += 1
        self._average(k, step)
        if not warm:
            if self._warm():
                self.current = max(self.candidates, key=self.score)
            return
        if self.probing:
            self.since_probe, self.next_probe, self.probing = 0, self.next_probe + 1, False
            return
        self.since_probe += 1
        self._fall_back(step)
        self._switch()

    def _warm(self) -> bool:
        return min(self.tries.values()) >= self.params.warmup_cycles

    def _average(self, k: int, step: Step) -> None:
        alpha = self.params.ewma_alpha
        tau = 1.0 + sum(max(r.accepted, 0) for r in step.rounds) / len(step.rounds)
        self.tau[k] = tau if math.isnan(self.tau[k]) else self.tau[k] + alpha * (tau - self.tau[k])
        if math.isfinite(step.seconds) and step.seconds > 0:
            old = self.cycle[k]
            self.cycle[k] = step.seconds if math.isnan(old) else old + alpha * (step.seconds - old)

    def _fall_back(self, step: Step) -> None:
        verified = sum(r.verified for r in step.rounds)
        if verified <= 0:
            return
        low = sum(r.accepted for r in step.rounds) / verified < self.params.low_accept_threshold
        self.low = self.low + 1 if low else 0
        if self.low >= self.params.low_accept_streak and self.current != self.candidates[0]:
            self._move(self.candidates[0])

    def _switch(self) -> None:
        if self.cooldown > 0:
            self.cooldown -= 1
            return
        best = max(self.candidates, key=self.score)
        here = self.score(self.current)
        better = best != self.current and (
            here == -math.inf or self.score(best) > here * (1 + self.params.switch_margin)
        )
        self.streak = (self.streak + 1 if best == self.challenger else 1) if better else 0
        self.challenger = best
        if self.streak >= self.params.required_streak:
            self._move(best)

    def _move(self, k: int) -> None:
        self.current, self.cooldown = k, self.params.cooldown_cycles
        self.streak = self.low = 0

    def forget(self, request_id: str) -> None:
        pass

    _SCALARS = ("current", "streak", "low", "cooldown", "since_probe", "next_probe", "challenger")

    def snapshot(self) -> dict[str, Any]:
        rows = [
            [k, self.tries[k], *(None if math.isnan(x) else x for x in (self.tau[k], self.cycle[k]))]
            for k in self.candidates
        ]
        return {name: getattr(self, name) for name in self._SCALARS} | {"rows": rows, "probing": self.probing}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self._SCALARS:
            setattr(self, name, int(state[name]))
        self.probing = bool(state["probing"])
        for k, tries, tau, cycle in state["rows"]:
            self.tries[k] = int(tries)
            self.tau[k] = math.nan if tau is None else float(tau)
            self.cycle[k] = math.nan if cycle is None else float(cycle)

    def metrics(self) -> dict[str, float]:
        scores = {f"score_k{k}": self.score(k) for k in self.candidates}
        return {"k": float(self.current)} | {n: s for n, s in scores.items() if math.isfinite(s)}
