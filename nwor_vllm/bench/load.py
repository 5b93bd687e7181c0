"""Load: how fast requests arrive, how many may be in flight, and what they must meet to count as good.

Names and definitions are those of vLLM's own `bench serve`; `--slo` is its `--goodput`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from nwor_vllm.errors import ConfigError, unknown_key

SLO = {"ttft": "time to first token", "tpot": "time per output token", "e2el": "latency of the request"}
FLAGS = ("request_rate", "burstiness", "max_concurrency", "slo")


def _above_zero(value: Any) -> float | str:
    """A number above 0. Infinity is the word `inf`: JSON has no such number."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number > 0:
        raise ValueError("expected a number above 0, or inf")
    return "inf" if math.isinf(number) else number


Rate = Annotated[float | Literal["inf"], BeforeValidator(_above_zero)]
Slo = dict[Literal["ttft", "tpot", "e2el"], Annotated[float, Field(gt=0)]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--request-rate", help="requests a second that arrive; inf (default): a batch comes at once")
    parser.add_argument(
        "--burstiness", help="gamma shape of the gaps between arrivals: 1 (default) Poisson, below 1 bursts, inf even"
    )
    parser.add_argument("--max-concurrency", help="requests in flight at most; the next waits for one to finish")
    parser.add_argument(
        "--slo", nargs="+", metavar="NAME:MS", help="what a good request meets: ttft:MS, tpot:MS, e2el:MS"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as a grid's keys."""
    given: dict[str, Any] = {}
    for name in ("request_rate", "burstiness"):
        if (text := getattr(args, name)) is not None:
            try:
                given[name] = _above_zero(text)
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')} is {text!r}; {error}") from None
    if (text := args.max_concurrency) is not None:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"--max-concurrency is {text!r}; expected a whole number from 1 up")
        given["max_concurrency"] = int(text)
    if args.slo is not None:
        given["slo"] = parse_slo(args.slo)
    return given


def parse_slo(pairs: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in pairs:
        name, colon, text = pair.partition(":")
        if not colon:
            raise ConfigError(f"--slo {pair!r} is not NAME:MS, such as ttft:200")
        if name not in SLO:
            raise ConfigError(f"--slo {pair!r}: {unknown_key('objective', name, SLO)}")
        if name in found:
            raise ConfigError(f"--slo {pair!r}: {name} is given twice")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise ConfigError(f"--slo {pair!r}: {text!r} is no number of milliseconds above 0")
    return found


def met(slo: Slo, ttft_s: float | None, tpot_s: float | None, e2el_s: float | None) -> bool | None:
    """Whether a request met every objective; None where a time is unknown. One token has no TPOT and misses none."""
    if ttft_s is None or e2el_s is None:
        return None
    times = {"ttft": ttft_s, "tpot": tpot_s or 0.0, "e2el": e2el_s}
    return all(times[name] * 1000 <= limit for name, limit in slo.items())
