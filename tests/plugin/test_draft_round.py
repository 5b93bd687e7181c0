"""A round on the V1 runner follows the stop rule's own statement, row by row, whatever else a row is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.kernels import StopState
from nwor_vllm.plugin.draft_round import DraftRound
from nwor_vllm.plugin.judge import Scratch
from nwor_vllm.plugin.messages import Orders
from nwor_vllm.policy import StopRule

K = 4
PLACES = ("host", "device")
on_both = pytest.mark.parametrize("place", PLACES)


def state_of(place):
    return StopState.create(8, K) if place == "device" else Scratch()


def logits_of(confidence):
    """Two tokens, the first with this probability (at least one half, to be the largest)."""
    return torch.logit(torch.tensor(confidence, dtype=torch.float64)).float()[:, None] * torch.tensor([[1.0, 0.0]])


def score(now, logits, tokens):
    if now.judge is not None:
        assert torch.equal(now.judge.score(logits), logits.argmax(dim=-1))
    return now.take(tokens, None)


def draft(table, orders, dead=None, whole=(), k=K, place="host"):
    """Run a round over confidences [position][row]; the drafter may not leave before it is told to."""
    rows = len(table[0])
    ids = [f"r{i}" for i in range(rows)]
    now = DraftRound(ids, k, orders, state_of(place), dead or [False] * rows, whole)
    for position in range(k):
        if not score(now, logits_of(table[position]), torch.full((rows,), position)):
            break
    return now


confidences = st.lists(st.lists(st.floats(0.51, 0.99), min_size=3, max_size=3), min_size=K, max_size=K)


@on_both
@settings(max_examples=60, deadline=None)
@given(confidences, st.floats(0, 0.95), st.floats(0, 0.8), st.lists(st.integers(0, K), min_size=3, max_size=3))
def test_lengths_follow_threshold_survival_and_caps(place, table, threshold, survival, caps):
    orders = Orders(StopRule(threshold=threshold, min_survival=survival), {f"r{i}": n for i, n in enumerate(caps)})
    got = draft(table, orders, place=place).lengths()
    for row in range(3):
        product, kept = 1.0, 0
        for position in range(caps[row]):
            confidence = table[position][row]
            product *= confidence
            # What lies on the edge is decided by rounding.
            if abs(confidence - threshold) < 1e-4 or abs(product - survival) < 1e-4:
                return
            if confidence < threshold or product < survival:
                break
            kept += 1
        assert got[row] == kept


@on_both
def test_the_loop_ends_with_the_last_row(place):
    table = [[0.9, 0.9], [0.9, 0.6], [0.6, 0.9], [0.9, 0.9]]
    now = draft(table, Orders(StopRule(threshold=0.7)), place=place)
    assert now.lengths() == [2, 1]
    assert len(now.tokens) == 3
    drafts = now.drafts()
    assert drafts.shape == (2, K) and drafts[:, 3].tolist() == [0, 0]
    report = now.report(now.lengths())
    assert report.lengths == {"r0": 2, "r1": 1}
    assert [len(report.confidence[i]) for i in ("r0", "r1")] == [3, 2]
    np.testing.assert_allclose(report.confidence["r1"], [0.9, 0.6], rtol=1e-5)


@on_both
def test_a_row_that_samples_nothing_keeps_nothing_and_is_not_reported(place):
    now = draft([[0.9, 0.9]] * K, Orders(StopRule(threshold=0.5)), dead=[True, False], place=place)
    assert now.lengths() == [0, K]
    assert set(now.report(now.lengths()).lengths) == {"r1"}


@on_both
@pytest.mark.parametrize("dead", [False, True])
def test_a_row_that_must_be_whole_is_drafted_to_the_end(place, dead):
    orders = Orders(StopRule(threshold=0.7), caps={"r1": 2})
    now = draft([[0.6, 0.6]] * K, orders, dead=[False, dead], whole=[1], place=place)
    assert now.lengths() == [0, 0 if dead else K]
    assert len(now.tokens) == (1 if dead else K)


@on_both
def test_a_draft_step_that_pays_for_nobody_is_not_run(place):
    now = draft([[0.6, 0.6]] * K, Orders(StopRule(draft_cost=0.5)), place=place)
    # After two tokens: 2 * 0.36 * 0.6 = 0.43 accepted tokens are expected of the third.
    assert now.lengths() == [2, 2] and len(now.tokens) == 2


def test_caps_alone_need_no_confidence():
    now = draft([[0.5, 0.5]] * K, Orders(caps={"r0": 1, "r1": 2}))
    assert not now.watches
    assert now.lengths() == [1, 2] and len(now.tokens) == 2


@on_both
def test_confidences_are_reported_to_whom_wants_them(place):
    now = draft([[0.9, 0.6]] * K, Orders(observe=True), place=place)
    assert now.lengths() == [K, K] and not now.may_stop
    confidence = now.report(now.lengths()).confidence
    np.testing.assert_allclose([confidence["r0"], confidence["r1"]], [[0.9] * K, [0.6] * K], rtol=1e-5)


@on_both
def test_nan_keeps_nothing(place):
    now = DraftRound(["a"], K, Orders(StopRule(threshold=0.1)), state_of(place), [False])
    assert not score(now, torch.full((1, 5), torch.nan), torch.zeros(1, dtype=torch.int64))
    assert now.lengths() == [0]
    assert now.report(now.lengths()).confidence == {"a": (0.0,)}


@on_both
@pytest.mark.parametrize("k", [0, 1])
def test_short_rounds(place, k):
    now = DraftRound(["a"], k, Orders(StopRule(threshold=0.1)), state_of(place), [False])
    if k:
        score(now, torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))
    assert now.report(now.lengths() if now.tokens else ()).lengths == ({"a": 1} if k else {})


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_host_and_the_kernels_agree(data):
    """Same rows, drawn at random, through both: the same lengths, and confidences as far as fp32 goes."""
    number = st.floats(-30, 30, width=32)
    odd = st.sampled_from([torch.inf, -torch.inf, torch.nan, 0.0])
    rows, vocab = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    logits = [
        torch.tensor([[data.draw(st.one_of(number, number, number, odd)) for _ in range(vocab)] for _ in range(rows)])
        for _ in range(K)
    ]
    unit = st.floats(0.01, 0.99)
    rule = StopRule(
        threshold=data.draw(st.sampled_from([0.0, 0.313])),
        min_survival=data.draw(st.sampled_from([0.0, 0.217])),
        verify_cost=data.draw(st.sampled_from([0.0, 0.117, 0.411])),
        draft_cost=data.draw(st.sampled_from([0.0, 0.307, 1.03])),
        calibration=tuple(data.draw(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 2)), max_size=3))),
        hazard=tuple(data.draw(st.lists(unit, max_size=3))),
    )
    ids = [f"r{i}" for i in range(rows)]
    caps = {i: data.draw(st.integers(0, K)) for i in ids}
    bias = {i: data.draw(st.floats(-1, 1)) for i in ids}
    whole = [r for r in range(rows) if data.draw(st.integers(0, 4)) == 0]
    seen = []
    for place in PLACES:
        now = DraftRound(ids, K, Orders(rule, caps, bias, True), state_of(place), [False] * rows, whole)
        for x in logits:
            if not score(now, x, x.argmax(dim=-1)):
                break
        seen.append((now.lengths(), now.report(now.lengths()).confidence))
    (kept, confidence), (other_kept, other) = seen
    for i in ids:
        shared = min(len(confidence[i]), len(other[i]))
        np.testing.assert_allclose(confidence[i][:shared], other[i][:shared], rtol=2e-6, atol=1e-30)
    assert kept == other_kept
