from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nwor_vllm.policy.judging import FIRST_WAIT, MARGIN, MAX_WAIT, MOST, TRIAL, Judging


def serve(judging: Judging, steps: int, mine: float, plain: float, noise: float = 0.1, seed: int = 0) -> int:
    """Steps that were judged, of `steps` which take `mine` judged and `plain` otherwise."""
    rng, judged = np.random.default_rng(seed), 0
    for factor in np.exp(noise * rng.normal(size=steps)).tolist():
        if judging.on:
            judged += 1
            judging.observe(1, mine * factor, plain)
        else:
            judging.wait_on(1)
    return judged


def test_judging_that_costs_more_than_it_brings_is_tried_ever_more_rarely() -> None:
    judging = Judging()
    first = serve(judging, 200, 1.1, 1.0)
    assert TRIAL <= first < 100
    assert judging.wait > FIRST_WAIT
    assert serve(judging, 8 * MAX_WAIT, 1.1, 1.0) < 0.03 * 8 * MAX_WAIT


def test_judging_that_pays_keeps_the_steps() -> None:
    judging = Judging()
    assert serve(judging, 2000, 1.0, 1.1) > 1900


def test_it_comes_back_when_the_traffic_changes() -> None:
    judging = Judging()
    serve(judging, 2000, 1.1, 1.0)
    assert serve(judging, 2 * MAX_WAIT, 1.0, 1.2) > MAX_WAIT // 2
    assert judging.wait == FIRST_WAIT


def test_what_is_as_good_as_it_must_be_is_not_switched_off_for_good() -> None:
    judged = [serve(Judging(), 4000, 1.0, 1.0 + MARGIN, seed=seed) for seed in range(20)]
    assert min(judged) > 100


def test_the_advantage_is_told_only_while_judging_has_the_steps() -> None:
    judging = Judging()
    assert judging.advantage == 1.0
    serve(judging, 200, 1.0, 1.2)
    assert 1.15 < judging.advantage < 1.25
    serve(judging, 800, 1.5, 1.0)
    assert not judging.on
    assert judging.advantage == 1.0


def test_snapshot_continues_exactly() -> None:
    judging, again = Judging(), Judging()
    serve(judging, 150, 1.05, 1.0)
    again.restore(json.loads(json.dumps(judging.snapshot())))
    assert serve(judging, 500, 1.05, 1.0) == serve(again, 500, 1.05, 1.0)
    assert judging.snapshot() == again.snapshot()


def test_a_trial_asks_for_its_verdict_in_time_where_steps_say_much() -> None:
    judging = Judging()
    assert judging.due(4) == TRIAL
    assert judging.due(1) == 4 * TRIAL
    assert judging.due(6) == pytest.approx(TRIAL / math.sqrt(1.5))
    assert judging.due(1000) == TRIAL / MOST
    judging.observe(TRIAL, 12.0, 9.0, requests=1)
    assert judging.on
    judging = Judging()
    judging.observe(TRIAL - 2, 10.0, 9.0)
    assert judging.due(4) == 2
    judging.observe(2, 2.0, 1.8)
    assert not judging.on
    assert judging.due(16) == math.inf
    judging.wait_on(FIRST_WAIT)
    assert judging.due(4) == TRIAL
    judging.observe(TRIAL, 10.0, 12.0)
    assert judging.on
    assert judging.due(16) == math.inf
