"""The committed recordings: whole, small, and what real vLLM did."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nwor_vllm import zoo
from nwor_vllm.bench import traces
from nwor_vllm.bench.sim import curves, workloads

TEMPERATURES = ("0", "0.7", "1")


@pytest.fixture(scope="module")
def files() -> dict[Path, traces.Trace]:
    return {path: traces.load(path) for path in sorted(workloads.RECORDED.glob("*.npz"))}


def test_every_domain_and_temperature_is_there_and_small(files: dict[Path, traces.Trace]) -> None:
    assert set(workloads.recorded()) == {f"{domain}@{t}" for domain in zoo.DOMAINS for t in TEMPERATURES}
    assert sum(path.stat().st_size for path in files) < 3e6
    for path, trace in files.items():
        made = trace.about["recording"]
        assert path.name == f"{made['domain']}-t{made['temperature']:g}-b{made['batch']}.npz"
        assert trace.k_max == workloads.K_MAX
        assert trace.about["command"].startswith("nwor record")
        assert {"pair", "versions", "hardware"} <= trace.about.keys()
        assert not np.isnan(trace.confidence).any()
        assert (trace.steps[:, 4] > 0).all()


def test_greedy_recordings_replay_as_vllm_served_them(files: dict[Path, traces.Trace]) -> None:
    greedy = [t.about for t in files.values() if t.about["recording"]["temperature"] == 0]
    assert all(about["text_same"] for about in greedy)
    assert [about["rounds_differ"] for about in greedy] == [0] * len(greedy)


def test_sampled_recordings_accept_as_much_as_vllm_served_them(files: dict[Path, traces.Trace]) -> None:
    """Other draws of the same chances: the log ratios of accepted lengths centre on zero."""
    sampled = [t.about for t in files.values() if t.about["recording"]["temperature"] > 0]
    ratios = np.array([math.log(about["tau_replayed"] / about["tau_served"]) for about in sampled])
    assert abs(ratios.mean()) < 3 * ratios.std() / math.sqrt(len(ratios)) + 0.005
    assert ratios.std() < 0.1


def test_the_measured_cost_reads_and_grows_with_everything_asked_for() -> None:
    curve = curves.find("plain")
    k = np.arange(16)
    for n in (1, 8, 32, 128):
        seconds = curve.seconds(n, n * (1 + k), k)
        assert (np.diff(seconds) > 0).all()
        assert (curve.seconds(n, n * (1 + k), k, k) >= seconds).all()
