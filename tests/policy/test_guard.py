from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.policy.guard import FIRST_HOLD, MAX_HOLD, Guard

LADDER = (0, 1, 3)


def feed(guard: Guard, tokens: float, seconds: float, shadow: list[float], costs: list[float]) -> None:
    """One step, and what rounds of every length keep and cost."""
    guard.observe(1, seconds, np.array([tokens / kept * cost for kept, cost in zip(shadow, costs, strict=True)]))


def test_a_policy_that_loses_to_no_speculation_is_replaced_by_it() -> None:
    guard = Guard(LADDER)
    for _ in range(30):
        feed(guard, 1.0, 1.3, [1.0, 1.0, 1.0], [1.0, 1.1, 1.3])
    assert guard.fallback == 0


def test_a_policy_that_wins_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    guard = Guard(LADDER)
    for _ in range(3000):
        kept = float(rng.integers(0, 4))
        feed(guard, 1.0 + kept, 1.2, [1.0, 1.0 + min(kept, 1.0), 1.0 + kept], [1.0, 1.15, 1.35])
    assert guard.trips == 0


def test_holding_moves_to_the_length_that_has_become_better() -> None:
    guard = Guard(LADDER)
    for _ in range(15):
        feed(guard, 1.0, 1.5, [1.0, 1.15, 1.15], [1.0, 1.1, 1.3])
    assert guard.fallback == 1
    for _ in range(20):
        feed(guard, 1.0, 1.1, [1.0, 1.0, 1.0], [1.0, 1.1, 1.3])
    assert guard.fallback == 0


numbers = st.tuples(st.floats(0.5, 8), st.floats(0.1, 3), st.lists(st.floats(0.5, 8), min_size=3, max_size=3))


@settings(max_examples=30, deadline=None)
@given(cycle=st.lists(numbers, min_size=1, max_size=12))
def test_it_never_oscillates(cycle: list[tuple[float, float, list[float]]]) -> None:
    """Whatever the stream, trips grow as the logarithm of the steps, up to the longest hold."""
    guard = Guard(LADDER)
    steps = 4000
    for i in range(steps):
        tokens, seconds, shadow = cycle[i % len(cycle)]
        feed(guard, tokens, seconds, shadow, [1.0, 1.1, 1.3])
    # A hold halves again only after 4 holds of good steps: each trip costs at least its hold.
    assert guard.trips <= 2 * math.log2(steps / FIRST_HOLD) + 2 + steps / (8 * FIRST_HOLD)
    assert FIRST_HOLD <= guard.hold <= MAX_HOLD
