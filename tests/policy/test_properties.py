"""What holds for every policy, whatever it is told."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.policy import POLICIES, Plan, Policy, Round, Step, make_policy

LADDER = (0, 1, 2, 3, 5, 8)
IDS = ("a", "b", "c")
KINDS = ("greedy", "sampled", "")

seconds = st.one_of(
    st.floats(1e-4, 1.0),
    st.sampled_from([0.0, -1.0, math.nan, math.inf, 600.0, 1e-12, 1e9]),  # clock trouble, suspended machines
)
confidence = st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=9).map(tuple)
rounds = st.builds(
    Round,
    request_id=st.sampled_from([*IDS, "never planned"]),
    drafted=st.integers(0, 9),
    verified=st.integers(0, 9),
    accepted=st.integers(0, 9),
    confidence=confidence,
)
steps = st.builds(
    Step,
    rounds=st.lists(rounds, max_size=3),
    k=st.sampled_from(LADDER),
    draft_steps=st.integers(0, 8),
    seconds=seconds,
    requests=st.integers(0, 3),
    verified_tokens=st.integers(0, 30),
    context_tokens=st.integers(0, 10**7),
    prefill_tokens=st.sampled_from([0, 0, 100]),
)


def sane(plan: Plan) -> None:
    assert plan.k in LADDER
    assert all(0 <= cap < plan.k for cap in plan.caps.values())
    assert all(math.isfinite(b) for b in plan.bias.values())
    if plan.stop is not None:
        numbers = [plan.stop.verify_cost, plan.stop.draft_cost, *plan.stop.hazard, *sum(plan.stop.calibration, ())]
        assert all(math.isfinite(x) for x in numbers)
        assert all(slope >= 0 for _, slope in plan.stop.calibration)


def drive(policy: Policy, stream: list[Step]) -> list[Plan]:
    plans = []
    for number, step in enumerate(stream):
        if number % 3 == 0:
            ends = IDS[number // 3 % 3]
            policy.forget(ends)
            policy.begin(ends, KINDS[number // 6 % 3])
        plans.append(policy.plan(IDS))
        policy.observe(step)
    return plans


def same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40, deadline=None)
@given(stream=st.lists(steps, max_size=12))
def test_any_stream_keeps_plans_sane(name: str, stream: list[Step]) -> None:
    policy = make_policy(name, None, LADDER)
    for plan in drive(policy, stream):
        sane(plan)
    sane(policy.plan(IDS))
    assert all(math.isfinite(v) for v in policy.metrics().values())
    policy.forget("a")
    policy.forget("unknown")
    sane(policy.plan(IDS))


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=25, deadline=None)
@given(before=st.lists(steps, max_size=8), after=st.lists(steps, min_size=1, max_size=6))
def test_restore_continues_exactly(name: str, before: list[Step], after: list[Step]) -> None:
    first, second = make_policy(name, None, LADDER), make_policy(name, None, LADDER)
    drive(first, before)
    text = json.dumps(first.snapshot(), allow_nan=False)
    second.restore(json.loads(text))
    assert same(second.snapshot(), json.loads(text))
    assert drive(first, after) == drive(second, after)
    assert same(first.snapshot(), second.snapshot())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_order_of_requests_changes_nothing(name: str) -> None:
    rng = np.random.default_rng(5)
    first, second = make_policy(name, None, LADDER), make_policy(name, None, LADDER)
    ids = [f"r{i}" for i in range(7)]
    for number in range(60):
        order = rng.permutation(7)
        if number % 15 == 0:
            kinds = [(ids[i], KINDS[i % 3]) for i in range(4)]
            for policy, coming in ((first, kinds), (second, kinds[::-1])):
                for request, _ in coming:
                    policy.forget(request)
                for request, kind in coming:
                    policy.begin(request, kind)
        a, b = first.plan(ids), second.plan([ids[i] for i in order])
        assert a.k == b.k
        assert a.caps == b.caps
        assert a.bias == pytest.approx(b.bias)
        took = rng.integers(0, a.k + 1, 7) if a.k else np.zeros(7, int)
        rounds = [
            Round(r, a.k, a.caps.get(r, a.k), min(int(t), a.caps.get(r, a.k)), tuple(rng.random(a.k)))
            for r, t in zip(ids, took, strict=True)
        ]
        tokens = 7 + sum(r.verified for r in rounds)
        time = 1.0 + 0.1 * a.k
        first.observe(Step(rounds, a.k, a.k, time, 7, tokens))
        second.observe(Step([rounds[i] for i in order], a.k, a.k, time, 7, tokens))


@pytest.mark.parametrize("name", ["acceptance", "feedback", "goodput"])
@settings(max_examples=30, deadline=None)
@given(kept=st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_more_acceptance_never_shortens_drafts(name: str, kept: list[int]) -> None:
    """The same rounds, with one more draft kept in each: the next draft is at least as long."""

    def run(extra: int) -> int:
        policy = make_policy(name, {"goodput": POLICIES["goodput"].params(guard=False)}.get(name), LADDER)
        for a in kept:
            policy.plan(["a"])
            policy.observe(Step([Round("a", 3, 3, a + extra)], 3, 3, 1.3, 1, 4))
        if name == "goodput":
            policy.visits.at = 10**9  # type: ignore[attr-defined]  # no step spent only on learning the cost
        return policy.plan(["a"]).k

    assert run(1) >= run(0)
