"""Draft-length policies. Pure Python and numpy; state in, decision out; time and randomness are arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.errors import unknown_key
from nwor_vllm.policy.acceptance import Acceptance, AcceptanceParams
from nwor_vllm.policy.base import Plan, Policy, Round, Step, StopRule, kind_of
from nwor_vllm.policy.feedback import Feedback, FeedbackParams
from nwor_vllm.policy.fixed import Fixed, FixedParams, Off, OffParams
from nwor_vllm.policy.goodput import Goodput, GoodputParams
from nwor_vllm.policy.profile import read
from nwor_vllm.policy.throughput import Throughput, ThroughputParams

__all__ = ["POLICIES", "Plan", "Policy", "Round", "Step", "StopRule", "default_ladder", "kind_of", "make_policy"]


@dataclass(frozen=True)
class PolicyKind:
    params: type[Any]
    build: Callable[[Any, Sequence[int]], Policy]


POLICIES: dict[str, PolicyKind] = {
    "fixed": PolicyKind(FixedParams, Fixed),
    "off": PolicyKind(OffParams, Off),
    "acceptance": PolicyKind(AcceptanceParams, Acceptance),
    "throughput": PolicyKind(ThroughputParams, Throughput),
    "feedback": PolicyKind(FeedbackParams, Feedback),
    "goodput": PolicyKind(GoodputParams, Goodput),
}


def default_ladder(k_max: int) -> tuple[int, ...]:
    """Draft lengths worth a captured CUDA graph each: dense where it matters, ending in the longest allowed."""
    return tuple(sorted({k for k in (0, 1, 2, 3, 5, 8) if k <= k_max} | {k_max}))


def make_policy(name: str, params: Any, ladder: Sequence[int], cost_profile: str = "") -> Policy:
    """`cost_profile` is a file of step times measured before; policies that learn no cost have no use for it."""
    if name not in POLICIES:
        raise unknown_key("policy", name, POLICIES)
    kind = POLICIES[name]
    policy = kind.build(kind.params() if params is None else params, tuple(ladder))
    if cost_profile:
        rows = read(Path(cost_profile)).rows
        if isinstance(policy, Goodput):
            policy.seed_cost(rows)
    return policy
