from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nwor_vllm.bench import load, workload
from nwor_vllm.bench.cli import main
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.errors import ConfigError

GRID = Path(__file__).resolve().parents[2] / "sweeps_config" / "adaptive_grid.yaml"


def cell(**changes: Any) -> Cell:
    base = {"requests": 8, "max_tokens": 4, "temperature": 0.0, "draft_length": 3, "batches": 3, "warmup_batches": 1}
    return Cell(engine=Engine(target="t", drafter="d", draft_length=3), workload="random", **{**base, **changes})


@given(
    count=st.integers(1, 200),
    rate=st.floats(0.01, 1000),
    shape=st.one_of(st.floats(0.01, 100), st.just("inf")),
    seed=st.integers(0, 2**32),
)
def test_arrivals_ascend_and_end_with_the_rate(count: int, rate: float, shape: float | str, seed: int) -> None:
    times = workload.arrivals(count, rate, shape, (seed, 0))
    assert times == sorted(times)
    assert len(times) == count
    assert times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == workload.arrivals(count, rate, shape, (seed, 0))


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    def variation(shape: float | str) -> float:
        gaps = [b - a for a, b in itertools.pairwise(workload.arrivals(5000, 10.0, shape, (1, 0)))]
        return statistics.stdev(gaps) / statistics.mean(gaps)

    assert variation(1.0) == pytest.approx(1.0, abs=0.05)  # Poisson
    assert variation(0.25) == pytest.approx(2.0, abs=0.2)  # 1 / sqrt(shape)
    assert variation("inf") == pytest.approx(0.0, abs=1e-9)


@pytest.mark.vllm
@pytest.mark.parametrize("shape", [0.3, 1.0, 4.0, float("inf")])
def test_arrivals_are_those_of_vllm_s_own_benchmark(monkeypatch: pytest.MonkeyPatch, shape: float) -> None:
    """Its generator, on a clock that moves when it sleeps and with our random numbers."""
    import vllm.benchmarks.serve as stock

    now, draws = [1000.0], np.random.default_rng((42, 7))

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(stock.time, "time", lambda: now[0])
    monkeypatch.setattr(stock.asyncio, "sleep", sleep)
    monkeypatch.setattr(stock.np.random, "gamma", lambda shape, scale: draws.gamma(shape, scale))

    async def collect() -> list[float]:
        requests: Any = [object()] * 20
        return [now[0] - 1000.0 async for _ in stock.get_request(requests, 4.0, shape)]

    assert workload.arrivals(20, 4.0, shape, (42, 7)) == pytest.approx(asyncio.run(collect()), abs=1e-6)


def test_every_arm_and_every_repetition_sees_the_same_arrivals_and_no_batch_those_of_another() -> None:
    first, again = workload.build(cell(request_rate=2.0)), workload.build(cell(request_rate=2.0))
    assert first == again
    times = [tuple(p.arrival_s for p in batch) for batch in (*first.batches, *first.warmup)]
    assert len(set(times)) == 4
    assert {p.arrival_s for batch in workload.build(cell()).batches for p in batch} == {0.0}
    slow = workload.build(cell(request_rate=1.0))
    assert [p.text for p in slow.batches[0]] == [p.text for p in first.batches[0]]  # the load changes no prompt


def parsed(*flags: str) -> dict[str, Any]:
    parser = ArgumentParser()
    load.add_flags(parser)
    return load.settings(parser.parse_args(flags))


def test_flags_are_a_grid_s_keys() -> None:
    assert parsed() == {}
    assert parsed("--request-rate", "inf") == {"request_rate": "inf"}
    assert parsed("--request-rate", "2.5", "--burstiness", "inf", "--max-concurrency", "4", "--slo", "ttft:200") == {
        "request_rate": 2.5, "burstiness": "inf", "max_concurrency": 4, "slo": {"ttft": 200.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--request-rate", "fast"], "--request-rate is 'fast'; expected a number above 0, or inf"),
        (["--request-rate", "0"], "--request-rate is '0'"),
        (["--request-rate", "nan"], "--request-rate is 'nan'"),
        (["--request-rate", "-1"], "--request-rate is '-1'"),
        (["--request-rate", "1", "--burstiness", "-0.5"], "--burstiness is '-0.5'"),
        (["--burstiness", "0.5"], "set request_rate too"),
        (["--max-concurrency", "0"], "--max-concurrency is '0'; expected a whole number"),
        (["--max-concurrency", "2.5"], "--max-concurrency is '2.5'"),
        (["--slo", "200"], "--slo '200' is not NAME:MS"),
        (["--slo", "tft:200"], "did you mean 'ttft'"),
        (["--slo", "ttft:inf"], "'inf' is no number of milliseconds"),
        (["--slo", "ttft:nan"], "'nan' is no number of milliseconds"),
        (["--slo", "tpot:-3"], "'-3' is no number of milliseconds"),
        (["--references", "bestfixed"], "unknown reference arm 'bestfixed'; valid: best_fixed"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TARGET_MODEL", "DRAFT_MODEL", "ONLY", "NUM_SEEDS", "TENSOR_PARALLEL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["nwor"])
    assert main(["bench", str(GRID), "--profile", "embedded", "--out", str(tmp_path), "--dry-run", *flags]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("slo", "times", "expected"),
    [
        ({"ttft": 100.0}, (0.1, 9.0, 9.0), True),
        ({"ttft": 100.0}, (0.11, 0.0, 0.2), False),
        ({"tpot": 10.0}, (5.0, 0.01, 6.0), True),
        ({"tpot": 10.0}, (5.0, None, 5.0), True),  # one token
        ({"ttft": 100.0, "tpot": 10.0, "e2el": 400.0}, (0.1, 0.01, 0.5), False),
        ({"ttft": 100.0}, (None, None, None), None),
    ],
)
def test_a_good_request_meets_every_objective(
    slo: dict[str, float], times: tuple[float | None, float | None, float | None], expected: bool | None
) -> None:
    assert load.met(slo, *times) is expected


def test_a_repeated_objective_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="ttft is given twice"):
        load.parse_slo(["ttft:100", "ttft:200"])
