"""A round on the V1 runner follows the stop rule's own statement, row by row, whatever else a row is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.kernels import StopState
from nwor_vllm.plugin.draft_round import DraftRound
from nwor_vllm.plugin.messages import Orders
from nwor_vllm.policy import StopRule

K = 4


def logits_of(confidence):
    """Two tokens, the first with this probability (at least one half, to be the largest)."""
    return torch.logit(torch.tensor(confidence, dtype=torch.float64)).float()[:, None] * torch.tensor([[1.0, 0.0]])


def draft(table, orders, dead=None, whole=None, k=K):
    """Run a round over confidences [position][row]; returns it and how many positions were drafted."""
    rows = len(table[0])
    state = StopState.create(8, K)
    ids = [f"r{i}" for i in range(rows)]
    now = DraftRound(ids, k, orders, state, dead or [False] * rows, whole or [False] * rows)
    for position in range(k):
        if not now.score(logits_of(table[position]), torch.full((rows,), position), None):
            break
    return now


confidences = st.lists(st.lists(st.floats(0.51, 0.99), min_size=3, max_size=3), min_size=K, max_size=K)


@settings(max_examples=60, deadline=None)
@given(confidences, st.floats(0, 0.95), st.floats(0, 0.8), st.lists(st.integers(0, K), min_size=3, max_size=3))
def test_lengths_follow_threshold_survival_and_caps(table, threshold, survival, caps):
    orders = Orders(StopRule(threshold=threshold, min_survival=survival), {f"r{i}": n for i, n in enumerate(caps)})
    got = draft(table, orders).lengths()
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


def test_the_loop_ends_with_the_last_row():
    table = [[0.9, 0.9], [0.9, 0.6], [0.6, 0.9], [0.9, 0.9]]
    now = draft(table, Orders(StopRule(threshold=0.7)))
    assert now.lengths() == [2, 1]
    assert len(now.tokens) == 3
    drafts = now.drafts()
    assert drafts.shape == (2, K) and drafts[:, 3].tolist() == [0, 0]
    report = now.report()
    assert report.lengths == {"r0": 2, "r1": 1}
    assert [len(report.confidence[i]) for i in ("r0", "r1")] == [3, 2]
    np.testing.assert_allclose(report.confidence["r1"], [0.9, 0.6], rtol=1e-5)


def test_a_row_that_samples_nothing_keeps_nothing_and_is_not_reported():
    now = draft([[0.9, 0.9]] * K, Orders(StopRule(threshold=0.5)), dead=[True, False])
    assert now.lengths() == [0, K]
    assert set(now.report().lengths) == {"r1"}


def test_a_row_that_must_be_whole_is_drafted_to_the_end():
    now = draft([[0.6, 0.6]] * K, Orders(StopRule(threshold=0.7)), whole=[False, True])
    assert now.lengths() == [0, K]
    assert len(now.tokens) == K


def test_a_draft_step_that_pays_for_nobody_is_not_run():
    now = draft([[0.6, 0.6]] * K, Orders(StopRule(draft_cost=0.5)))
    # After two tokens: 2 * 0.36 * 0.6 = 0.43 accepted tokens are expected of the third.
    assert now.lengths() == [2, 2] and len(now.tokens) == 2


def test_caps_alone_need_no_confidence():
    now = draft([[0.5, 0.5]] * K, Orders(caps={"r0": 1, "r1": 2}))
    assert not now.watches
    assert now.lengths() == [1, 2] and len(now.tokens) == 2


def test_nan_keeps_nothing():
    state = StopState.create(2, K)
    now = DraftRound(["a"], K, Orders(StopRule(threshold=0.1)), state, [False], [False])
    assert not now.score(torch.full((1, 5), torch.nan), torch.zeros(1, dtype=torch.int64), None)
    assert now.lengths() == [0]
    assert now.report().confidence == {"a": (0.0,)}


@pytest.mark.parametrize("k", [0, 1])
def test_short_rounds(k):
    now = DraftRound(["a"], k, Orders(StopRule(threshold=0.1)), StopState.create(2, K), [False], [False])
    if k:
        now.score(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), None)
    assert now.report().lengths == ({"a": 1} if k else {})
