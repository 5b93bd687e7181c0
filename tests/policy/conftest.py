from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from nwor_vllm.policy import POLICIES, Plan, Policy, Round, Step, make_policy

LADDER = (0, 1, 2, 3, 5, 8)


def finish(
    policy: Policy,
    ids: Sequence[str],
    hazards: Sequence[Sequence[float]],
    rng: np.random.Generator,
    seconds: float = 1.0,
) -> Plan:
    """One step of an engine whose drafts are accepted with the given per-request hazards; confidence is the hazard."""
    plan = policy.plan(ids)
    rounds = []
    for name, hazard in zip(ids, hazards, strict=True):
        verified = min(plan.k, plan.caps.get(name, plan.k))
        accepted = 0
        while accepted < verified and rng.random() < hazard[accepted]:
            accepted += 1
        rounds.append(Round(name, plan.k, verified, accepted, tuple(hazard[: plan.k])))
    tokens = len(ids) + sum(r.verified for r in rounds)
    time = seconds * (1.0 + 0.1 * plan.k + 0.01 * tokens)
    policy.observe(Step(rounds, plan.k, plan.k, time, len(ids), tokens, judged_steps=plan.k * plan.watch))
    return plan


@pytest.fixture
def step_once() -> Callable[..., Plan]:
    return finish


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param, None, LADDER)
