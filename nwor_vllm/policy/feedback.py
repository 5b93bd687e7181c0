"""A PID controller that holds the rolling acceptance at a set point by moving the draft length.

It knows neither cost nor value: acceptance at the set point is no aim of a user. Kept for comparison.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Plan, Step


@dataclass(frozen=True)
class FeedbackParams:
    target: float = 0.6  # accepted / verified to hold
    window: int = 16  # steps in the rolling acceptance
    kp: float = 2.0  # draft tokens per unit of error
    ki: float = 0.2  # draft tokens per unit of error and step
    kd: float = 0.5  # draft tokens per unit of change of the error
    initial: float = 5.0  # draft length before any evidence

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ConfigError(f"policy_params.target is {self.target}; expected a number between 0 and 1")
        if self.window < 1:
            raise ConfigError(f"policy_params.window is {self.window}; expected a whole number from 1 up")
        if self.initial < 0:
            raise ConfigError(f"policy_params.initial is {self.initial}; expected a draft length from 0 up")


class Feedback:
    name = "feedback"

    def __init__(self, params: FeedbackParams, ladder: Sequence[int]) -> None:
        self.params = params
        self.ladder = tuple(k for k in ladder if k > 0) or (0,)
        self.integral = min(max(params.initial, self.ladder[0]), self.ladder[-1])
        self.length = self.integral
        self.error = 0.0
        self.recent: deque[tuple[int, int]] = deque(maxlen=params.window)

    def begin(self, request_id: str, kind: str) -> None:
        pass

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        return Plan(min(self.ladder, key=lambda k: (abs(k - self.length), k)), watch=False)

    def observe(self, step: Step) -> None:
        verified = sum(max(r.verified, 0) for r in step.rounds)
        if verified <= 0:
            return
        self.recent.append((sum(min(max(r.accepted, 0), r.verified) for r in step.rounds), verified))
        rolling = sum(a for a, _ in self.recent) / sum(v for _, v in self.recent)
        error = rolling - self.params.target
        low, high = float(self.ladder[0]), float(self.ladder[-1])
        self.integral = min(max(self.integral + self.params.ki * error, low), high)  # clamped: no wind-up
        move = self.params.kp * error + self.params.kd * (error - self.error)
        self.length = min(max(self.integral + move, low), high)
        self.error = error

    def forget(self, request_id: str) -> None:
        pass

    def snapshot(self) -> dict[str, Any]:
        return {
            "integral": self.integral,
            "length": self.length,
            "error": self.error,
            "recent": [list(pair) for pair in self.recent],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.integral, self.length, self.error = (float(state[n]) for n in ("integral", "length", "error"))
        self.recent = deque(((int(a), int(v)) for a, v in state["recent"]), maxlen=self.params.window)

    def metrics(self) -> dict[str, float]:
        return {"length": self.length, "error": self.error}
