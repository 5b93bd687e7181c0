from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nwor_vllm.bench import stats
from nwor_vllm.errors import ConfigError

POSITIVE = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(("n", "sd"), [(3, 3.3), (5, 1.7), (6, 1.4), (8, 1.2), (10, 1.0), (20, 0.66)])
def test_smallest_detectable_effect_is_the_published_one(n: int, sd: float) -> None:
    assert stats.mde_in_sd(n) == pytest.approx(sd, abs=0.05)


@pytest.mark.parametrize(("q", "n"), [(0.9, 64), (0.99, 662), (0.95, 130), (0.1, 64)])
def test_samples_a_quantile_needs(q: float, n: int) -> None:
    assert stats.samples_needed(q) == n


def test_tails_are_null_below_the_samples_they_need() -> None:
    assert stats.quantile([1.0] * 129, 0.95) is None
    assert stats.quantile([1.0] * 130, 0.95) == 1.0
    assert stats.quantile([1.0, 3.0], 0.5) == 2.0
    assert stats.quantile([], 0.5) is None
    assert stats.not_estimable(5, 0.99) == "p99 needs 662 samples, has 5"


def test_interval_covers_as_often_as_it_says() -> None:
    rng = random.Random(7)
    true, inside, total = math.log(0.9), 0, 2000
    for _ in range(total):
        a = [math.exp(true + rng.gauss(0, 0.1)) for _ in range(5)]
        result = stats.paired_ratio(a, [1.0] * 5)
        assert result.low is not None
        assert result.high is not None
        inside += result.low <= 0.9 <= result.high
    assert 0.935 <= inside / total <= 0.965


def test_a_planted_five_percent_is_found_at_ten_and_no_effect_is_not() -> None:
    rng = random.Random(3)
    found = alarms = 0
    for _ in range(200):
        noise = [rng.gauss(0, 0.03) for _ in range(10)]
        base = [math.exp(rng.gauss(0, 0.3)) for _ in range(10)]
        slow = [b * 1.05 * math.exp(e) for b, e in zip(base, noise, strict=True)]
        same = [b * math.exp(e) for b, e in zip(base, noise, strict=True)]
        found += (stats.paired_ratio(slow, base).p or 0) < 0.05
        alarms += (stats.paired_ratio(same, base).p or 0) < 0.05
    assert found > 190
    assert alarms <= 20


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20))
def test_swapping_the_arms_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    one, other = stats.paired_ratio(a, b), stats.paired_ratio(b, a)
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert one.p == pytest.approx(other.p, abs=1e-9)
    assert one.low is not None
    assert one.high is not None
    assert one.low <= one.ratio * (1 + 1e-12)
    assert one.ratio <= one.high * (1 + 1e-12)


def test_extremes_stay_finite() -> None:
    found = stats.paired_ratio([1e308, 5e-324], [5e-324, 1e308])
    assert all(math.isfinite(x) and x > 0 for x in (found.ratio, found.low, found.high, found.mde) if x is not None)


def test_one_pair_has_no_interval() -> None:
    result = stats.paired_ratio([2.0], [1.0])
    assert (result.ratio, result.low, result.p, result.mde) == (2.0, None, None, None)
    assert stats.verdict(result, None) == "one pair: no interval"


@pytest.mark.parametrize(
    "bad", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([math.nan], [1.0]), ([math.inf], [1.0])]
)
def test_what_cannot_be_paired_is_refused(bad: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ConfigError):
        stats.paired_ratio(*bad)


def test_holm_is_the_textbook_s() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_never_lowers_a_p_and_keeps_the_order(p: list[float]) -> None:
    adjusted = stats.holm(p)
    assert all(q >= x and q <= 1 for q, x in zip(adjusted, p, strict=True))
    ranked = sorted(range(len(p)), key=p.__getitem__)
    assert [adjusted[i] for i in ranked] == sorted(adjusted)


def test_verdicts() -> None:
    faster = stats.paired_ratio([0.8, 0.81, 0.79, 0.8], [1.0] * 4)
    assert stats.verdict(faster, faster.p) == "faster"
    slower = stats.paired_ratio([1.0] * 4, [0.8, 0.81, 0.79, 0.8])
    assert stats.verdict(slower, slower.p) == "slower"
    assert stats.verdict(slower, 1.0).startswith("no difference larger than ")
