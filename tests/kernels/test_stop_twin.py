"""The stop twin walked position by position is the policy's own statement of the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.kernels import Confidence, StopState, stop
from nwor_vllm.policy.base import StopRule
from nwor_vllm.policy.stop import evaluate


def cents(low: int, high: int) -> st.SearchStrategy[float]:
    """Fractions that fp32 and fp64 tell apart from every product the rule compares them with."""
    return st.integers(low, high).map(lambda n: n / 100)


unit = cents(0, 100)
rules = st.builds(
    StopRule,
    threshold=unit,
    min_survival=unit,
    verify_cost=cents(0, 30),
    draft_cost=cents(0, 200),
    calibration=st.lists(st.tuples(cents(-200, 200), cents(0, 200)), max_size=4).map(tuple),
    hazard=st.lists(unit, max_size=4).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(rules, st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_matches_the_policy(rule: StopRule, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    conf = rng.uniform(0.02, 0.999, (rows, k)) ** rng.uniform(0.1, 2)
    conf[rng.uniform(size=conf.shape) < 0.05] = np.nan
    conf = conf.astype(np.float32).astype(np.float64)
    caps, bias = rng.integers(0, k + 1, rows), rng.normal(0, 1, rows).round(3)
    state = StopState.create(rows, k)
    state.set_rule(rule)
    state.caps.copy_(torch.from_numpy(caps))
    state.bias.copy_(torch.from_numpy(bias))
    state.reset()
    steps = 0
    for j in range(k):
        prob = torch.from_numpy(conf[:, j]).float()
        stop(Confidence(torch.zeros(rows, dtype=torch.int64), prob, torch.logit(prob.double()).float()), state, j)
        steps = j + 1
        if not state.alive.any():
            break
    want_steps, want = evaluate(rule, k, caps, bias, conf)
    # The host leaves the loop when nobody is alive; the policy counts a first step for a batch of caps 0 too.
    assert steps == want_steps
    assert state.lengths.tolist() == want.tolist()


def test_a_stop_is_counted_once_where_it_happened() -> None:
    state = StopState.create(3, 4)
    state.set_rule(StopRule(threshold=0.5))
    for j, probs in enumerate(((0.9, 0.2, 0.9), (0.9, 0.1, 0.3), (0.9, 0.1, 0.1))):
        prob = torch.tensor(probs)
        stop(Confidence(torch.zeros(3, dtype=torch.int64), prob, torch.logit(prob)), state, j)
    assert state.stops.tolist() == [1, 1, 0, 0]
    assert state.lengths.tolist() == [3, 0, 1]
    assert state.alive.tolist() == [True, False, False]
    assert torch.equal(state.confidence[1].isnan(), torch.tensor([False, True, True, True]))


def test_a_device_position_outside_changes_nothing() -> None:
    state = StopState.create(2, 3)
    before = [t.clone() for t in (state.survival, state.alive, state.lengths, state.stops)]
    conf = Confidence(torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.5), torch.zeros(2))
    stop(conf, state, torch.tensor([3]))
    for old, new in zip(before, (state.survival, state.alive, state.lengths, state.stops), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(ValueError, match=r"position: got 3; expected 0\.\.2"):
        stop(conf, state, 3)
