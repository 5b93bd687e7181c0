from __future__ import annotations

import itertools

from nwor_vllm.policy.visits import IN_A_ROW, LOOK, MANY, Visits

LADDER = (0, 1, 2, 3, 5, 8)


def lengths(visits: Visits, best: list[int], kept: float = 1.0, requests: int = 1, start: int = 0) -> list[int]:
    """What is drafted where these lengths are the best ones, step by step."""
    drafted = []
    for step, k in enumerate(best, start):
        forced = visits.forced(k, step, 0.9, kept, lambda: None, requests)
        drafted.append(k if forced is None else forced)
        visits.done(drafted[-1])
    return drafted


def test_a_probe_of_good_drafts_goes_on_for_the_step_that_shows_their_price() -> None:
    drafted = lengths(Visits(LADDER, 32, 32), [0] * 40)
    assert [i for i, k in enumerate(drafted) if k] == [31, 32]


def test_a_probe_of_drafts_that_nobody_keeps_is_one_step() -> None:
    drafted = lengths(Visits(LADDER, 32, 32), [0] * 40, kept=-3.0)
    assert [i for i, k in enumerate(drafted) if k] == [31]


def test_probes_become_rarer_though_each_wakes_the_policy_for_a_moment() -> None:
    visits, probes, best = Visits(LADDER, 32, 32), [], 0
    for step in range(1000):
        k = lengths(visits, [best], kept=-3.0, start=step)[0]
        best = 3 if k and not best else 0
        if best:
            probes.append(step)
    waits = [b - a for a, b in itertools.pairwise(probes)]
    assert all(b > 1.5 * a for a, b in itertools.pairwise(waits))


def test_drafts_that_stay_good_bring_quick_probes_back() -> None:
    visits = Visits(LADDER, 32, 32)
    lengths(visits, [0] * 400, kept=-3.0)
    assert visits.idle_wait > 32
    lengths(visits, [5] * 500, start=400)
    assert visits.idle_wait == 32


def test_no_visit_is_made_up_for_after_zero() -> None:
    visits = Visits(LADDER, 32, 32)
    lengths(visits, [0] * 300, kept=-3.0)
    assert lengths(visits, [5] * (LOOK - 1), start=300) == [5] * (LOOK - 1)


def test_visits_of_many_requests_are_several_steps_long_and_learnt_from_at_once() -> None:
    few, visits = Visits(LADDER, 32, 32), Visits(LADDER, 32, 32)
    alone = lengths(few, [5] * 60)
    assert [k for k in alone if k not in (0, 5)] == [3, 8]
    over = []
    for step in range(60):
        forced = visits.forced(5, step, 0.9, 1.0, lambda: None, MANY)
        over.append(visits.done(5 if forced is None else forced))
        alone[step] = 5 if forced is None else forced
    assert [k for k in alone if k not in (0, 5)] == [8] + [3] * IN_A_ROW + [8] * IN_A_ROW
    ends = [i for i in range(59) if alone[i] in (3, 8) and alone[i - 1 : i] == alone[i : i + 1] != alone[i + 1 : i + 2]]
    assert [i for i, done in enumerate(over) if done] == ends


def test_slots_are_told_from_draft_steps_by_drafts_of_which_little_is_verified() -> None:
    visits, seen = Visits(LADDER, 32, 32), []
    for step in range(60):
        forced = visits.forced(5, step, 0.9, 1.0, lambda: None, 3)
        if forced and (caps := visits.caps(["b", "a", "c"])):
            seen.append((forced, caps))
        visits.done(5 if forced is None else forced)
    assert seen == [(8, {"b": 3, "c": 3})]  # somebody drafts to the end, the same whatever the order is
    alone = Visits(LADDER, 32, 32)
    lengths(alone, [5] * 60)
    assert alone.cap is None
