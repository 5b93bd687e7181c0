"""Statistics of paired runs: t intervals on log ratios, what a sample could have shown, and quantiles it can carry."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special  # scipy.stats has the same functions, and takes a second to import

from nwor_vllm.errors import ConfigError

CONFIDENCE = 0.95
POWER = 0.80
LARGEST_LOG = 50.0


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """a / b over n pairs: geometric mean, interval, p of "no difference", smallest detectable relative change."""

    n: int
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    mde: float | None


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> PairedRatio:
    """t interval on paired log ratios (bootstrap intervals under-cover at the n that a grid can afford)."""
    if len(a) != len(b) or not a:
        raise ConfigError(f"paired comparison of {len(a)} with {len(b)} values; expected equal counts from 1 up")
    if not all(math.isfinite(x) and x > 0 for x in (*a, *b)):
        raise ConfigError("paired comparison of values that are not positive numbers")
    logs = [math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)]
    n = len(logs)
    mean = math.fsum(logs) / n
    if n == 1:
        return PairedRatio(1, _exp(mean), None, None, None, None)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / (n - 1))
    error = sd / math.sqrt(n)
    half = _t_quantile(n - 1, 0.5 + confidence / 2) * error
    p = float(2 * special.stdtr(n - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return PairedRatio(
        n, _exp(mean), _exp(mean - half), _exp(mean + half), p, math.expm1(min(mde_in_sd(n) * sd, LARGEST_LOG))
    )


def _exp(log: float) -> float:
    """A ratio that is finite and above 0 whatever the values were: it goes into JSON."""
    return math.exp(max(-LARGEST_LOG, min(log, LARGEST_LOG)))


@functools.lru_cache(maxsize=256)
def mde_in_sd(n: int, confidence: float = CONFIDENCE, power: float = POWER) -> float:
    """The smallest true mean, in standard deviations of the paired difference, that n pairs detect with this power."""
    if n < 2:
        raise ConfigError(f"{n} pairs cannot show a difference; expected at least 2")
    # The noncentrality whose t falls short of the critical value with 1 - power.
    return float(special.nctdtrinc(n - 1, 1 - power, _t_quantile(n - 1, 0.5 + confidence / 2))) / math.sqrt(n)


def _t_quantile(freedom: int, p: float) -> float:
    return float(special.stdtrit(freedom, p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: compare the results with 0.05 and the whole family is held to it."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, p_values[index] * (len(order) - rank)))
        adjusted[index] = running
    return adjusted


@functools.lru_cache(maxsize=64)
def samples_needed(q: float) -> int:
    """How many samples carry the q quantile: two of them lie beyond it with 99 % probability (p90 64, p99 662)."""
    tail = min(q, 1 - q)
    n = 2
    while (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1) > 0.01:
        n += 1
    return n


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q quantile, linear between order statistics; None where a tail is not estimable. The median always is."""
    if not values or (q != 0.5 and len(values) < samples_needed(q)):
        return None
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def not_estimable(n: int, q: float) -> str:
    return f"p{round(q * 100)} needs {samples_needed(q)} samples, has {n}"


def verdict(result: PairedRatio, p_adjusted: float | None, alpha: float = 1 - CONFIDENCE) -> str:
    """In words: of `a` against `b`, where values are times."""
    if result.low is None or result.high is None or p_adjusted is None:
        return "one pair: no interval"
    if p_adjusted < alpha:
        return "faster" if result.ratio < 1 else "slower"
    bound = max(abs(1 - result.low), abs(result.high - 1))
    return f"no difference larger than {bound:.1%}"
