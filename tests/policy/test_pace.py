from __future__ import annotations

import math

import numpy as np
import pytest

from nwor_vllm.policy.pace import MOST, Pace

KINDS = [(3, 20 + k, k, 0) for k in range(6)]


def run(pace: Pace, steps: int, speed: float, seed: int = 0, of: int = len(KINDS)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chosen = [KINDS[i] for i in rng.integers(0, of, steps)]
    seconds = [speed * (0.01 + 0.002 * kind[2]) * math.exp(0.03 * rng.normal()) for kind in chosen]
    return pace.observe(chosen, seconds)


def test_a_machine_that_stays_as_it_is_has_no_pace() -> None:
    pace = Pace()
    assert np.abs(run(pace, 3000, 1.0)).max() < 0.06


@pytest.mark.parametrize("speed", [0.7, 1.3, 1.8])
def test_what_all_kinds_take_longer_is_the_pace(speed: float) -> None:
    pace = Pace()
    run(pace, 60, 1.0)
    assert run(pace, 40, speed)[8:] == pytest.approx(math.log(speed), abs=0.06)
    assert run(pace, 40, 1.0)[8:] == pytest.approx(0.0, abs=0.06)


def test_a_kind_that_is_new_says_nothing_and_is_not_dearer_for_having_come_in_slow_times() -> None:
    pace = Pace()
    run(pace, 60, 1.0, of=3)
    run(pace, 200, 1.5)
    assert pace.now > 0.3
    first = pace.kinds[KINDS[0]][0]
    for kind, (mean, _, _) in pace.kinds.items():
        assert mean - first == pytest.approx(math.log(1.0 + 0.2 * kind[2]), abs=0.08)


def test_steps_of_minutes_move_nothing() -> None:
    pace = Pace()
    for kind in KINDS:
        pace.observe([kind], [60.0])  # each was suspended the first time
    assert np.abs(run(pace, 200, 1.0)[60:]).max() < 0.05
    before = pace.now
    pace.observe(KINDS * 3, [60.0] * 18)
    assert pace.now == before


def test_only_the_latest_kinds_are_remembered() -> None:
    pace = Pace()
    pace.observe([(1, i, 0, 0) for i in range(MOST + 50)], [0.01] * (MOST + 50))
    assert len(pace.kinds) == MOST
    assert (1, 0, 0, 0) not in pace.kinds


def test_it_comes_back_from_json_exactly() -> None:
    import json

    pace, again = Pace(), Pace()
    run(pace, 100, 1.3)
    again.restore(json.loads(json.dumps(pace.snapshot())))
    assert (run(pace, 50, 1.1, seed=1) == run(again, 50, 1.1, seed=1)).all()
