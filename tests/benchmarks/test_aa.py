"""The check of the checker, on an engine whose noise is known: no alarm without a cause, and none missed."""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench import stats
from nwor_vllm.errors import ConfigError


@pytest.fixture(scope="module")
def aa() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "aa.py"
    spec = importlib.util.spec_from_file_location("aa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_alternate_on_equal_batches(aa: ModuleType) -> None:
    served: list[int] = []

    def serve(number: int) -> float:
        served.append(number)
        return 1.0

    assert aa.repetition(serve, 4, 3, 0.0).ratio == 1.0
    assert served == [4, 4, 5, 5, 6, 6]


def test_a_sleep_is_found_and_nothing_is_not(aa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of very different length, 2 % noise, a clock that only sleeping moves."""
    rng, now = random.Random(5), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def serve(number: int) -> float:
        seconds = random.Random(number).lognormvariate(0, 0.5) * rng.lognormvariate(0, 0.02)
        now[0] += seconds
        return seconds

    equal = [aa.repetition(serve, i * 10, 10, 0.0) for i in range(20)]
    assert aa.judge(equal, 0.0)[0]
    slow = [aa.repetition(serve, i * 10, 10, 0.05) for i in range(20)]
    good, text = aa.judge(slow, 0.05)
    assert good
    assert "found in 20 of 20" in text or "found in 19 of 20" in text
    assert not aa.judge(slow, 0.0)[0]  # such arms are not equal
    assert not aa.judge(equal, 0.05)[0]  # and these are


def test_three_of_twenty_may_be_chance(aa: ModuleType) -> None:
    assert aa.allowed(20) == 3
    alarm, calm = (stats.PairedRatio(10, 1.1, 1.0, 1.2, p, 0.1) for p in (0.01, 0.6))
    assert aa.judge([alarm] * 3 + [calm] * 17, 0.0)[0]
    assert not aa.judge([alarm] * 4 + [calm] * 16, 0.0)[0]


def test_what_cannot_be_judged_is_refused(aa: ModuleType) -> None:
    with pytest.raises(ConfigError):
        aa.main(["--pairs", "1"])
