"""A constant draft length: the baseline every other policy is measured against. `off` is fixed at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Plan, Step


@dataclass(frozen=True)
class FixedParams:
    k: int = -1  # the draft length; -1 = the longest of the ladder
    watch: bool = False  # have the drafter's confidences reported with the rounds

    def __post_init__(self) -> None:
        if self.k < -1:
            raise ConfigError(f"policy_params.k is {self.k}; expected -1 (the longest) or a draft length from 0 up")


@dataclass(frozen=True)
class OffParams:
    pass


class Fixed:
    name = "fixed"

    def __init__(self, params: FixedParams, ladder: Sequence[int]) -> None:
        self.k, self.watch = max(ladder) if params.k < 0 else params.k, params.watch
        if self.k not in ladder:
            raise ConfigError(f"policy_params.k is {self.k}; the ladder has {', '.join(map(str, ladder))}")

    def begin(self, request_id: str, kind: str) -> None:
        pass

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        return Plan(self.k, watch=self.watch)

    def observe(self, step: Step) -> None:
        pass

    def forget(self, request_id: str) -> None:
        pass

    def snapshot(self) -> dict[str, Any]:
        return {"k": self.k}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.k = int(state["k"])

    def metrics(self) -> dict[str, float]:
        return {"k": float(self.k)}


class Off(Fixed):
    name = "off"

    def __init__(self, params: OffParams, ladder: Sequence[int]) -> None:
        self.k, self.watch = 0, False
