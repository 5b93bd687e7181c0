from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.policy import StopRule
from nwor_vllm.policy.stop import evaluate


def by_the_book(stop: StopRule, k: int, caps: list[int], bias: list[float], c: np.ndarray) -> tuple[int, list[int]]:
    """`StopRule`'s docstring, one row and one position at a time."""
    n = len(caps)
    alive, kept, s, r = [cap >= 1 for cap in caps], [0] * n, [1.0] * n, [1.0] * n
    for j in range(1, k + 1):
        gain, p_last = 0.0, [0.0] * n
        for i in range(n):
            if not alive[i]:
                continue
            x = c[i, j - 1]
            x = 0.0 if math.isnan(x) else x
            a, b = stop.calibration[min(j, len(stop.calibration)) - 1] if stop.calibration else (0.0, 1.0)
            odds = -12.0 if x <= 0 else 12.0 if x >= 1 else min(max(math.log(x / (1 - x)), -12.0), 12.0)
            p_last[i] = 1 / (1 + math.exp(-(a + b * odds + bias[i])))
            s[i] *= p_last[i]
            r[i] *= x
            if x >= stop.threshold and r[i] >= stop.min_survival and s[i] >= stop.verify_cost:
                kept[i] = j
                alive[i] = j < caps[i]
            else:
                alive[i] = False
        for i in range(n):
            if alive[i]:
                h = stop.hazard[min(j + 1, len(stop.hazard)) - 1] if stop.hazard else p_last[i]
                gain += max(0.0, s[i] * h - stop.verify_cost)
        if j == k or not any(alive) or (stop.draft_cost > 0 and not gain > stop.draft_cost):
            return j, kept
    raise AssertionError


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_evaluate_is_the_documented_rule(data: st.DataObject) -> None:
    k, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    unit = st.floats(0.01, 0.99)
    c = np.array([[data.draw(st.one_of(unit, st.just(math.nan))) for _ in range(k)] for _ in range(n)])
    caps = [data.draw(st.integers(0, k)) for _ in range(n)]
    if max(caps) == 0:
        caps[0] = 1
    bias = [data.draw(st.floats(-1, 1)) for _ in range(n)]
    stop = StopRule(
        threshold=data.draw(st.sampled_from([0.0, 0.3])),
        min_survival=data.draw(st.sampled_from([0.0, 0.2])),
        verify_cost=data.draw(st.sampled_from([0.0, 0.1, 0.4])),
        draft_cost=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        calibration=tuple(data.draw(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 2)), max_size=3))),
        hazard=tuple(data.draw(st.lists(unit, max_size=3))),
    )
    steps, kept = evaluate(stop, k, np.array(caps), np.array(bias), c)
    assert (steps, kept.tolist()) == by_the_book(stop, k, caps, bias, c)
