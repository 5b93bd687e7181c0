"""Draft length by thresholds on a moving average of acceptance: the simple rule everybody tries first.

The usual average, accepted over drafted, falls with the draft length itself, so the rule chases its own choice. The
honest one counts only positions that were reached: accepted / (accepted + rejections), the same at every length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Plan, Step


@dataclass(frozen=True)
class AcceptanceParams:
    alpha: float = 0.1  # weight of the newest step in the moving average
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.65, 0.8)  # each one passed moves up the ladder by an equal share
    initial: float = 0.7  # the average before any evidence
    biased: bool = False  # true = accepted / drafted, as the original rule has it

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"policy_params.alpha is {self.alpha}; expected a number above 0, at most 1")
        if list(self.thresholds) != sorted(self.thresholds) or not self.thresholds:
            raise ConfigError(f"policy_params.thresholds is {list(self.thresholds)}; expected ascending numbers")
        for name, value in (("initial", self.initial), *(("thresholds", t) for t in self.thresholds)):
            if not 0 <= value <= 1:
                raise ConfigError(f"policy_params.{name} has {value}; expected a number in 0..1")


class Acceptance:
    name = "acceptance"

    def __init__(self, params: AcceptanceParams, ladder: Sequence[int]) -> None:
        self.params = params
        self.ladder = tuple(k for k in ladder if k > 0) or (0,)  # never zero: then nothing would be learnt
        self.average = params.initial

    def begin(self, request_id: str, kind: str) -> None:
        pass

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        passed = sum(self.average >= t for t in self.params.thresholds)
        rung = round(passed * (len(self.ladder) - 1) / len(self.params.thresholds))
        return Plan(self.ladder[rung], watch=False)

    def observe(self, step: Step) -> None:
        accepted = sum(r.accepted for r in step.rounds)
        if self.params.biased:
            trials = sum(r.drafted for r in step.rounds)
        else:
            trials = sum(min(r.accepted + 1, r.verified) for r in step.rounds)
        if trials > 0:
            ratio = min(max(accepted / trials, 0.0), 1.0)
            self.average += self.params.alpha * (ratio - self.average)

    def forget(self, request_id: str) -> None:
        pass

    def snapshot(self) -> dict[str, Any]:
        return {"average": self.average}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.average = float(state["average"])

    def metrics(self) -> dict[str, float]:
        return {"acceptance_average": self.average}
