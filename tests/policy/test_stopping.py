from __future__ import annotations

import math

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nwor_vllm.policy import StopRule
from nwor_vllm.policy.stop import evaluate
from nwor_vllm.policy.stopping import Stopping

unit = st.floats(0.01, 0.99)


def run(stop: Stopping, table: np.ndarray) -> int:
    """Draft positions until nobody wants one more; the first one always runs."""
    for position in range(stop.k):
        stop.take([float(table[r, position]) for r in stop.going])
        if not stop.going:
            break
    return stop.drafted


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_position_by_position_is_the_recorded_round(data: st.DataObject) -> None:
    k, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    certain = st.sampled_from([0.0, 1.0, math.nan, 0.5])
    table = np.array([[data.draw(st.one_of(unit, unit, certain)) for _ in range(k)] for _ in range(n)])
    caps = [data.draw(st.integers(0, k)) for _ in range(n)]
    bias = [data.draw(st.floats(-1, 1)) for _ in range(n)]
    rule = StopRule(
        threshold=data.draw(st.sampled_from([0.0, 0.3])),
        min_survival=data.draw(st.sampled_from([0.0, 0.2])),
        verify_cost=data.draw(st.sampled_from([0.0, 0.1, 0.4])),
        draft_cost=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        calibration=tuple(data.draw(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 2)), max_size=3))),
        hazard=tuple(data.draw(st.lists(unit, max_size=3))),
    )
    given_all = k, np.array(caps), np.array(bias), table
    steps, kept = evaluate(rule, *given_all)
    for nudge in (1 - 1e-9, 1 + 1e-9):  # numpy's exp and C's differ in the last bit, which decides on an edge only
        nudged = StopRule(
            rule.threshold, rule.min_survival * nudge, rule.verify_cost * nudge, rule.draft_cost * nudge,
            rule.calibration, rule.hazard,
        )  # fmt: skip
        other = evaluate(nudged, *given_all)
        assume((other[0], other[1].tolist()) == (steps, kept.tolist()))
    stop = Stopping(rule, k, caps, bias)
    assert (run(stop, table), stop.kept) == (steps, kept.tolist())
    for r in range(n):
        shown = len(stop.seen[r])
        assert shown == (0 if caps[r] == 0 else min(stop.kept[r] + 1, caps[r], steps))
        np.testing.assert_array_equal(stop.seen[r], np.nan_to_num(table[r, :shown]))


def test_whole_rows_draft_on_alone() -> None:
    stop = Stopping(StopRule(threshold=0.5), 3, [3, 3, 1], [0.0] * 3, whole=[1])
    assert run(stop, np.array([[0.9, 0.1, 0.9], [0.1, 0.1, 0.1], [0.9, 0.9, 0.9]])) == 3
    assert stop.kept == [1, 3, 1]
    assert [len(s) for s in stop.seen] == [2, 3, 1]
