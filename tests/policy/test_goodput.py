from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from nwor_vllm.policy import Plan, Round, Step, goodput, make_policy
from nwor_vllm.policy.goodput import Goodput, GoodputParams

LADDER = (0, 1, 2, 3, 5, 8)
Once = Callable[..., Plan]


def build(**params: object) -> Goodput:
    policy = make_policy("goodput", GoodputParams(**params), LADDER)  # type: ignore[arg-type]
    assert isinstance(policy, Goodput)
    return policy


def lengths(step_once: Once, hazard: float, steps: int = 200, **params: object) -> list[int]:
    rng, policy = np.random.default_rng(0), build(confidence=False, **params)
    return [step_once(policy, ["a", "b"], [[hazard] * 8] * 2, rng).k for _ in range(steps)]


def test_drafts_deep_on_predictable_text_shallow_on_hard_and_not_at_all_on_hopeless(step_once: Once) -> None:
    deep, shallow, none = (np.median(lengths(step_once, h)[100:]) for h in (0.95, 0.5, 0.02))
    assert deep >= 5
    assert 1 <= shallow <= 3
    assert none == 0


def test_zero_is_probed_ever_more_rarely_and_left_when_drafts_become_good(step_once: Once) -> None:
    rng, policy = np.random.default_rng(0), build()
    for _ in range(400):
        step_once(policy, ["a", "b"], [[0.02] * 8] * 2, rng)
    late = [step_once(policy, ["a", "b"], [[0.02] * 8] * 2, rng).k for _ in range(400)]
    assert 0 < np.count_nonzero(late) < 20
    back = [step_once(policy, ["a", "b"], [[0.95] * 8] * 2, rng).k for _ in range(1500)]
    assert np.median(back[-100:]) >= 3


def test_a_hopeless_request_in_a_good_batch_is_capped(step_once: Once) -> None:
    rng, policy = np.random.default_rng(0), build(confidence=False, guard=False)
    ids = [f"good{i}" for i in range(7)] + ["poor"]
    hazards = [[0.95] * 8] * 7 + [[0.02] * 8]
    for _ in range(150):
        plan = step_once(policy, ids, hazards, rng)
    policy.visits.at, policy.judging.left, policy._decided = 10**9, 0, None
    plan = policy.plan(ids)
    assert plan.k >= 3
    assert plan.caps.get("poor", plan.k) <= 1
    assert all(plan.caps.get(i, plan.k) == plan.k for i in ids[:7])


def test_with_confidence_it_gives_the_drafter_a_stop_rule_and_uses_it_only_if_obeyed(step_once: Once) -> None:
    rng, policy = np.random.default_rng(0), build(guard=False)
    for _ in range(121):  # an engine that always drafts to the end; the next step is no visit
        plan = step_once(policy, ["a"], [[0.9, 0.9, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1]], rng)
    assert policy.honoured < 0.5
    policy.visits.at, policy.judging.left, policy._decided = 10**9, 0, None
    plan = policy.plan(["a"])
    assert plan.stop is not None
    assert plan.stop.draft_cost > 0
    assert plan.k < 8  # it must choose the length itself
    policy.honoured = 1.0
    assert policy.plan(["a", "b"]).k == 8  # the drafter stops by itself


def test_worthless_drafts_cost_less_than_one_percent_after_the_start(step_once: Once) -> None:
    rng, policy = np.random.default_rng(0), build()
    ids, hazards = ["a", "b", "c", "d"], [[0.01] * 8] * 4
    for _ in range(200):
        step_once(policy, ids, hazards, rng)
    taken = [step_once(policy, ids, hazards, rng).k for _ in range(1000)]
    extra = sum(0.1 * k + 0.04 * k for k in taken) / (1000 * 1.04)
    assert extra < 0.01


def test_forgotten_requests_leave_nothing_behind() -> None:
    policy = build()
    for i in range(500):
        policy.plan([f"r{i}", f"r{i + 1}"])
        policy.observe(Step([Round(f"r{i}", 2, 2, 1)], 2, 2, 1.0, 1, 3))
        policy.forget(f"r{i}")
    assert policy.slots.size == 64
    policy.snapshot()  # learns what is left
    assert set(policy.slots.row) == {"r500"}


def test_a_name_used_again_is_a_new_request() -> None:
    policy = build(confidence=False)
    for _ in range(100):
        policy.plan(["a", "b"])
        policy.observe(Step([Round("a", 2, 2, 0), Round("b", 2, 2, 2)], 2, 2, 1.0, 2, 6))
    assert policy.survival.effects.mean[policy.slots.row["a"]] < -0.3
    policy.forget("a")
    policy.plan(["a", "b"])
    assert policy.survival.effects.mean[policy.slots.row["a"]] == 0.0


def test_in_a_probe_from_zero_sixteen_of_many_requests_draft(step_once: Once) -> None:
    rng, policy = np.random.default_rng(0), build()
    ids, hopeless = [f"r{i}" for i in range(64)], [[0.01] * 8] * 64
    plans = [step_once(policy, ids, hopeless, rng) for _ in range(400)]
    probes = [plan for plan in plans[100:] if plan.k]
    assert 1 <= len(probes) <= 4
    for plan in probes:
        assert plan.k == 2
        assert sum(plan.caps.get(i, plan.k) > 0 for i in ids) == 16


def lengths_after_a_slow_start(slow: int) -> list[int]:
    """As on a server: the first steps are slow, and the first draft after a pause feeds the drafter what it missed."""
    rng, policy = np.random.default_rng(0), build(confidence=False)
    ids, missed, lengths = [f"r{i}" for i in range(8)], 0, []
    for step in range(1500):
        plan = policy.plan(ids)
        kept = [int(np.argmin(np.append(rng.random(plan.k) < 0.85, False))) for _ in ids]
        seconds = 1.0 + 0.1 * plan.k + 0.01 * 8 * (1 + plan.k)
        if plan.k:
            seconds = seconds * (5.0 if step < slow else 1.0) + 0.1 * missed
        missed = 0 if plan.k else missed + 1
        rounds = [Round(i, plan.k, plan.k, a) for i, a in zip(ids, kept, strict=True)] if plan.k else []
        policy.observe(Step(rounds, plan.k, plan.k, seconds, 8, 8 * (1 + plan.k)))
        lengths.append(plan.k)
    return lengths


def test_a_slow_start_is_soon_forgotten() -> None:
    lengths = lengths_after_a_slow_start(20)
    assert lengths[:100].count(0) < 50
    assert np.median(lengths[50:150]) >= 3


def test_a_long_slow_start_and_dear_probes_do_not_keep_it_at_zero() -> None:
    lengths = lengths_after_a_slow_start(30)
    assert lengths[:100].count(0) > 25
    assert np.median(lengths[500:]) >= 3  # a few probes are enough, as they show what drafts really cost


def test_one_very_slow_first_step_is_no_price() -> None:
    """Ten times too slow, as where something is compiled; the lengths that it did not run cost what they cost."""
    rng, policy = np.random.default_rng(0), build(confidence=False)
    for step in range(24):
        plan = policy.plan(["a"])
        kept = int(np.argmin(np.append(rng.random(plan.k) < 0.85, False)))
        seconds = (1.0 + 0.1 * plan.k) * (10.0 if step == 0 else 1.0) * np.exp(0.03 * rng.normal())
        policy.observe(Step([Round("a", plan.k, plan.k, kept)], plan.k, plan.k, seconds, 1, 1 + plan.k))
    found = policy.cost.lengths(1, np.array([0.0, 3.0, 8.0]))[0]
    assert np.abs(np.log(found / [1.0, 1.3, 1.8])).max() < 0.15


def test_a_name_that_comes_again_is_another_request() -> None:
    policy = build()
    policy.plan(["a", "b"])
    policy.survival.effects.mean[policy.slots.row["b"]] = 2.0
    policy.forget("b")
    policy.plan(["a", "b"])
    assert policy._where.tolist() == [policy.slots.row["a"], policy.slots.row["b"]]
    assert policy.survival.effects.mean[policy.slots.row["b"]] == 0.0


def test_zero_must_be_much_better_at_first_as_the_way_back_is_long() -> None:
    policy = build()
    doubts = [policy._doubt(1) for policy.shown in (0, 32, 3200)]
    assert doubts == pytest.approx([0.15, 0.075, 0.0015], abs=1e-4)
    assert policy._doubt(16) == policy._doubt(1) / 4  # many see more in a step


def test_no_plan_leaps_beyond_twice_what_was_verified_so_far() -> None:
    policy = build()
    ids = [f"r{i}" for i in range(32)]
    most = 0
    for _ in range(12):
        plan = policy.plan(ids)
        wanted = len(ids) * (1 + plan.k)
        assert wanted <= 2 * max(most, 3 * len(ids))
        rounds = [Round(i, plan.k, plan.k, plan.k) for i in ids]
        policy.observe(Step(rounds, plan.k, plan.k, 1e-2 * (1 + 0.01 * plan.k), len(ids), wanted))
        most = max(most, wanted)
    assert most >= 32 * 9  # and it does get there


def test_a_lucky_probe_from_zero_is_learnt_from_at_once() -> None:
    policy = build()
    for _ in range(400):
        policy._plain = Plan(0)
        policy.observe(Step([Round("a", 0, 0, 0)], 0, 0, 1e-2, 1, 1))
    policy.observe(Step([Round("a", 2, 2, 2)], 2, 2, 1e-2, 1, 3))
    assert not policy._pending


def test_a_plan_stands_until_half_of_the_requests_are_others(step_once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, policy = np.random.default_rng(0), build(confidence=False)
    ids = [f"r{i}" for i in range(16)]
    for _ in range(300):
        step_once(policy, ids, [[0.6] * 8] * 16, rng)
    policy._learn()
    policy.plan(ids)
    made: list[list[str]] = []
    decide = policy._decide
    monkeypatch.setattr(policy, "_decide", lambda ids, context: made.append(ids) or decide(ids, context))
    for i in range(9):
        policy.forget(ids[i])
        ids[i] = f"new{i}"
        policy.plan(ids)
        assert policy.slots.row.keys() >= set(ids)
        assert len(made) == (i >= 7)
    policy.forget(ids[15])  # a batch that only shrinks, too
    for i in range(14, 7, -1):
        policy.forget(ids[i])
        policy.plan(ids[:i])
    assert len(made) > 1


def test_lessons_are_rare_at_zero_but_for_what_a_probe_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, lessons = build(), list[int]()
    learn = policy._learn
    monkeypatch.setattr(policy, "_learn", lambda: lessons.append(len(policy._pending)) or learn())
    for _ in range(3000):
        policy._plain = Plan(0)
        policy.observe(Step([Round("a", 0, 0, 0)], 0, 0, 1e-2, 1, 1))
    assert lessons[-1] == goodput.IDLE_EVERY
    policy._plain = Plan(0)
    policy.observe(Step([Round("a", 2, 2, 2)], 2, 2, 1e-2, 1, 3))
    assert lessons[-1] < goodput.IDLE_EVERY and not policy._pending


def test_no_kind_of_step_always_waits_for_a_lesson() -> None:
    """Plain steps and visits come in powers of two."""
    for every in (goodput.LEARN_EVERY, goodput.IDLE_EVERY):
        assert math.gcd(every, 64) == math.gcd(every, GoodputParams().cost_interval) == 1


def test_a_ladder_without_zero_is_kept_to(step_once: Once) -> None:
    rng, policy = np.random.default_rng(0), make_policy("goodput", None, (1, 3, 5))
    assert {step_once(policy, ["a"], [[0.5] * 5], rng).k for _ in range(200)} <= {1, 3, 5}


def test_steps_without_drafts_do_not_show_what_drafts_cost() -> None:
    policy = build()
    for k in [3] * 20 + [0] * 20:
        policy.observe(Step([Round("a", k, k, 0)], k, k, 1.3e-2, 1, 1 + k))
    assert policy.shown == 20


def test_where_texts_are_a_few_rounds_long_drafts_are_shorter() -> None:
    """Every prompt takes its request a step: with texts of 16 tokens nearly a third of all, with long ones none."""
    chosen = {}
    for tokens in (16, 1024):
        policy = build(confidence=False, guard=False)
        rng = np.random.default_rng(0)
        name, left, lengths = 0, 0, []
        for _ in range(3000):
            if left <= 0:
                policy.forget(str(name))
                name, left = name + 1, tokens
                k = policy.plan([str(name)]).k
                policy.observe(Step([], k, k, 0.01 + 0.0014 * k, 0, 0, prefill_tokens=50, prompts=1))
            k = policy.plan([str(name)]).k
            kept = min(int(rng.geometric(0.13)) - 1, k, left - 1)
            policy.observe(Step([Round(str(name), k, min(k, left - 1), kept)], k, k, 0.01 + 0.0014 * k, 1, 1 + k))
            left -= kept + 1
            lengths.append(k)
        chosen[tokens] = float(np.mean(lengths[1000:]))
    assert chosen[16] < 0.8 * chosen[1024]


def without_rivals(step_once: Once) -> tuple[Goodput, list[str], int]:
    """Sixteen requests, known well; the place of the best length, to which all others are believed half as good."""
    rng, policy = np.random.default_rng(0), build(confidence=False, guard=False)
    ids, good = [f"r{i}" for i in range(16)], [[0.9] * 8] * 16
    for _ in range(300):
        step_once(policy, ids, good, rng)
    policy.visits.at = 10**9
    policy.plan(ids)
    best = int(policy._rates.argmax())
    policy._rates = np.where(np.arange(len(policy.ladder)) == best, 1.0, 0.5)
    assert best and policy._promising() is None
    return policy, ids, best


def test_judged_drafts_of_many_requests_have_room_for_one_rung_more_than_without_judging(
    step_once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another length, or none, looks better from where these rounds start."""
    rng, policy = np.random.default_rng(0), build(guard=False)
    ids = [f"r{i}" for i in range(64)]
    for _ in range(60):
        step_once(policy, ids, [[0.75] * 8] * 64, rng)
    survival, found = policy._choose(policy._where, 0)
    best = policy.ladder.index(3)
    policy.sees_confidence, policy.honoured, policy.judging.left = True, 1.0, 0
    for own, room in ((0, 5), (best, 5), (policy.ladder.index(5), 8)):
        monkeypatch.setattr(policy, "_choose", lambda *_, own=own: (survival, found._replace(best=best, own=own)))
        judged, plain = policy._decide(ids, 0)
        assert (judged.k, plain.k) == (room, 3)


def test_a_length_that_may_well_be_cheaper_than_believed_is_drafted_once(step_once: Once) -> None:
    policy, ids, best = without_rivals(step_once)
    near = next(i for i in range(len(policy.ladder) - 1, 0, -1) if i != best)
    policy._rates[near] = 0.999
    assert policy._promising() == policy.ladder[near]
    policy.steps = policy.visits.look_at
    assert policy.plan(ids).k == policy.ladder[near]
    policy.steps += 1
    assert policy.plan(ids).k == policy.ladder[best]
    policy.params, policy.sees_confidence = GoodputParams(), True
    assert policy._promising() is None  # judged drafts end where they should
    policy.judging.left = 64
    assert policy._promising() == policy.ladder[near]


def test_zero_is_tried_for_two_steps_where_it_may_well_be_better_for_several_requests(step_once: Once) -> None:
    policy, ids, best = without_rivals(step_once)
    policy._rates[0] = 0.999
    for judged in (False, True):
        policy.params, policy.sees_confidence = GoodputParams(confidence=judged, guard=False), judged
        assert policy._promising() == 0
    policy._load = (1, 0)
    assert policy._promising() is None  # one request is hard for a while, and drafts are soon good again
    policy.params, policy._load = GoodputParams(confidence=False, guard=False), (16, 0)
    first, taken = policy.visits.look_at - 1, []
    for step in range(first, first + 4):
        policy.steps = step
        taken.append(policy.plan(ids).k)
    assert taken == [policy.ladder[best], 0, 0, policy.ladder[best]]
