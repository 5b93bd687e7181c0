from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.policy import Plan, Round, Step, make_policy
from nwor_vllm.policy.evidence import Seen, thinned
from nwor_vllm.policy.goodput import Goodput, GoodputParams
from nwor_vllm.policy.shadow import Walkers

RUNGS = np.array([0, 1, 2, 3, 5, 8, 15])
PLAIN = 4  # the length of the plan beside the rungs


def rounds_of_text(hard: Sequence[bool], k: int) -> list[int]:
    """What drafts of length k keep, round by round: easy tokens up to a hard one, and then the target's own."""
    at, kept = 0, []
    while at < len(hard):
        n = 0
        while n < k and at + n < len(hard) and not hard[at + n]:
            n += 1
        kept.append(n)
        at += n + 1
    return kept


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=60), min_size=1, max_size=4), st.data())
def test_every_length_is_counted_exactly_where_all_that_is_hard_is_known(
    texts: list[list[bool]], data: st.DataObject
) -> None:
    """Texts that end hard, in rounds that end only where it is: nothing is left to guess. In pieces of any size."""
    texts = [[*text, True] for text in texts]
    left = {row: np.diff([-1, *np.flatnonzero(text)]).tolist() for row, text in enumerate(texts, 1)}
    turns = data.draw(st.permutations([row for row, tokens in left.items() for _ in tokens]))
    walked = [(row, left[row].pop(0)) for row in turns]
    walkers, total = Walkers(RUNGS), np.zeros(len(RUNGS) + 1)
    while walked:
        n = data.draw(st.integers(1, len(walked)))
        rows, tokens = np.array(walked[:n]).T
        total += walkers.walk(rows, tokens, np.ones(n), np.full(n, PLAIN))
        walked = walked[n:]
    for place, k in enumerate([*RUNGS.tolist(), PLAIN]):
        assert total[place] == pytest.approx(sum(len(rounds_of_text(text, k)) for text in texts))


def test_a_request_that_ends_within_a_round_has_needed_all_of_it() -> None:
    walkers, one = Walkers(RUNGS), np.array([1])
    first = walkers.walk(one, np.array([3]), np.zeros(1), np.array([PLAIN]))
    assert first[RUNGS.tolist().index(5)] == pytest.approx(0.5)  # three of six tokens
    walkers.end([1])
    walkers.reset([1])
    rest = walkers.walk(np.array([2]), np.array([1]), np.ones(1), np.array([PLAIN]))
    assert (first + rest).tolist() == [4, 3, 2, 2, 2, 2, 2, 2]


def test_requests_that_end_where_nobody_drafts_leave_no_rounds_behind() -> None:
    walkers, one = Walkers(RUNGS), np.array([1])
    walkers.walk(one, np.array([3]), np.zeros(1), np.array([PLAIN]))
    walkers.pause()
    walkers.end([1])
    walkers.begun = walkers.prompts = 1
    walkers.pause()
    assert walkers.waited(stride=1) == 0.0  # nor steps in prompts, whose tokens nobody counts
    assert walkers.walk(np.array([2]), np.array([1]), np.ones(1), np.array([PLAIN])).tolist() == [1.0] * 8


def test_requests_that_have_ended_have_spent_steps_in_their_prompts() -> None:
    walkers = Walkers(RUNGS)
    walkers.begun, walkers.prompts = 10, 25  # long prompts come in pieces
    walkers.end([1, 2, 3, 4])
    assert walkers.waited(stride=2) == pytest.approx(4 * 2.5 / 2)
    assert walkers.waited(stride=2) == 0.0
    assert walkers.overhead == 0.0
    walkers.learn(100.0, 30, np.full(len(RUNGS), 30.0), np.full(len(RUNGS), 90.0), waits=5.0)
    assert walkers.overhead == pytest.approx(0.05)


def test_what_may_be_hard_counts_as_often_as_it_is() -> None:
    """Rounds of one kept draft each; the target's token after it was never drafted: one in four would be rejected."""
    walkers, total = Walkers(RUNGS), np.zeros(len(RUNGS) + 1)
    for _ in range(100):
        total += walkers.walk(np.array([1]), np.array([2]), np.array([0.25]), np.array([PLAIN]))
    assert total[0] == 200
    assert total[RUNGS.tolist().index(15)] == pytest.approx(
        25.25
    )  # stretches of eight tokens, the last of which goes on


def served(text: Sequence[bool], k: int, rounds: int) -> Goodput:
    """The policy after rounds of length k on `text`, over and over, with nothing judged."""
    policy = make_policy("goodput", GoodputParams(confidence=False), RUNGS.tolist())
    assert isinstance(policy, Goodput)
    kept = rounds_of_text([*text] * (1 + rounds * (k + 1) // len(text)), k)[:rounds]
    for n in kept:
        policy.plan(["a"])
        policy._last = policy._plain = Plan(k, watch=False)
        policy.observe(Step([Round("a", k, k, n)], k, k, 1.0 + 0.1 * k, 1, 1 + k))
    return policy


@pytest.mark.parametrize("k", [5, 8, 15])
def test_text_with_a_period_is_seen_through_from_other_lengths(k: int) -> None:
    """Every eighth token is hard: three drafts need two rounds for it, as five do, and eight need one. (From rounds of
    three nothing is seen: what is hard is always the target's own token.)"""
    policy = served([False] * 7 + [True], k, 400)
    walkers = policy.walkers
    found = dict(zip(RUNGS.tolist(), (walkers.tokens / walkers.rounds).tolist(), strict=True))
    for length, tokens in {3: 4.0, 5: 4.0, 8: 8.0, 15: 8.0}.items():
        assert found[length] == pytest.approx(tokens, rel=0.06)
    if k == 5:  # rounds that start where its own do would have told otherwise
        assert walkers.kept[RUNGS.tolist().index(3)] / walkers.count < 3.6


def test_of_two_lengths_that_need_the_same_rounds_the_shorter_is_chosen() -> None:
    policy = served([False] * 7 + [True], 5, 400)
    policy.visits.at = 10**9
    assert policy.plan(["a"]).k in (3, 8)


def test_of_many_requests_some_are_followed_without_a_gap() -> None:
    ids = [f"r{i}" for i in range(100)]
    row = {name: i + 1 for i, name in enumerate(ids)}
    step = Step([Round(name, 2, 2, 1) for name in ids], 2, 2, 1.0, 100, 300)
    seen = [Seen(step, Plan(2), Plan(2))] * 16
    kept, stride = thinned(seen, row)
    assert stride == 7
    assert [len(s.step.rounds) for s in kept] == [14] * 14 + [100] * 2
    assert all({row[r.request_id] % stride for r in s.step.rounds} == {0} for s in kept[:14])
    few, one = thinned(seen[:2], row)
    assert (list(few), one) == (seen[:2], 1)
