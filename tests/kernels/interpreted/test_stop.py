from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.kernels import StopState, Workspace, confidence, confidence_and_stop, stop
from nwor_vllm.policy.base import StopRule

rules = st.builds(
    StopRule,
    threshold=st.sampled_from([0.0, 0.2, 0.5]),
    min_survival=st.sampled_from([0.0, 0.1, 0.3]),
    verify_cost=st.sampled_from([0.0, 0.05, 0.2]),
    draft_cost=st.sampled_from([0.0, 0.0, 0.3, 2.0]),
    calibration=st.sampled_from([(), ((0.3, 0.8),), ((0.1, 1.2), (-0.4, 0.5))]),
    hazard=st.sampled_from([(), (0.8,), (0.9, 0.4)]),
)


def assert_same(got: StopState, want: StopState) -> None:
    for name in ("alive", "lengths", "stops", "caps"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("confidence", "survival", "product"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(rules, rules, st.integers(1, 6), st.sampled_from([40, 5000]), st.integers(0, 10_000))
def test_alone_and_fused_equal_the_twin(rule: StopRule, later: StopRule, rows: int, vocab: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    k = 3
    twin = StopState.create(rows + 2, k)  # more rows than the batch: the rest must not change
    twin.set_rule(rule)
    twin.caps.copy_(torch.randint(0, k + 1, (rows + 2,), generator=gen))
    twin.bias.copy_(torch.randn(rows + 2, generator=gen))
    twin.reset()
    alone, fused = copy.deepcopy(twin), copy.deepcopy(twin)
    space = Workspace(rows, "cpu")
    for j in range(k):
        x = torch.randn(rows, vocab, generator=gen) * 5
        if j == 1:
            x[0] = torch.nan
            for state in (twin, alone, fused):  # in place: what a replayed graph would see
                state.set_rule(later)
        conf = confidence(x)
        stop(conf, twin, j)
        stop(conf, alone, j, backend="triton")
        got = confidence_and_stop(x, fused, torch.tensor([j]), backend="triton", workspace=space)
        assert torch.equal(got.token, conf.token)
        assert_same(alone, twin)
        assert_same(fused, twin)
        assert int(space.arrivals.abs().sum()) == 0


def test_a_batch_wider_than_a_block() -> None:
    rows = 700
    gen = torch.Generator().manual_seed(0)
    conf = confidence(torch.randn(rows, 8, generator=gen) * 3)
    for cost in (0.0, 5.0, 1e6):
        twin = StopState.create(rows, 2)
        twin.set_rule(StopRule(threshold=0.4, draft_cost=cost))
        kernel = copy.deepcopy(twin)
        stop(conf, twin, 0)
        stop(conf, kernel, 0, backend="triton")
        assert_same(kernel, twin)
        assert bool(kernel.alive.any()) == (cost < 1e6)


def test_a_device_position_outside_changes_nothing() -> None:
    state = StopState.create(2, 2)
    before = copy.deepcopy(state)
    x = torch.randn(2, 10)
    confidence_and_stop(x, state, torch.tensor([2]), backend="triton")
    stop(confidence(x), state, torch.tensor([-1]), backend="triton")
    assert_same(state, before)
