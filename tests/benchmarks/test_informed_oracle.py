"""The oracle that is told all but the future: it must not see that, and must find what there is to find."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nwor_vllm.bench.sim.synthetic import DOMAINS, generate
from nwor_vllm.bench.traces import Trace
from nwor_vllm.errors import ConfigError


@pytest.fixture(scope="module")
def informed() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "informed_oracle.py"
    spec = importlib.util.spec_from_file_location("informed_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["informed_oracle"] = module  # its workers look for its functions there
    return module


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(DOMAINS[1], 12, 40, 6, 3)


def test_nothing_is_known_of_what_is_yet_to_come(informed: ModuleType, trace: Trace) -> None:
    """Whatever the rounds do behind position 25 of a text, what is known there and before stays the same."""
    begin = int(trace.starts[4])
    at = begin + 25
    before = informed.known(trace)[begin : at + 1]
    accepted = trace.accepted.copy()
    for q in range(begin, int(trace.starts[5])):
        seen = max(at - q, 0)  # tokens of a draft from q that the text shows
        if accepted[q] >= seen:
            accepted[q] = seen if accepted[q] > seen else trace.k_max
    assert (accepted != trace.accepted).any()
    after = informed.known(replace(trace, accepted=accepted))[begin : at + 1]
    np.testing.assert_array_equal(after, before)


def test_what_the_text_has_shown_is_known(informed: ModuleType, trace: Trace) -> None:
    at = int(trace.starts[4]) + 25
    accepted = trace.accepted.copy()
    accepted[at - 1] = 0 if accepted[at - 1] else 1
    assert (informed.known(replace(trace, accepted=accepted))[at] != informed.known(trace)[at]).any()


def test_it_learns_what_confidences_say_and_more_where_it_has_seen_the_answers(
    informed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(informed, "EPOCHS", 10)
    trace = generate(DOMAINS[1], 60, 60, 6, 5)
    owner = np.repeat(np.arange(trace.requests), np.diff(trace.starts))
    room = trace.starts[owner + 1] - np.arange(len(owner)) - 1
    depth = np.arange(trace.k_max)
    seen = (depth <= trace.accepted[:, None]) & (depth < room[:, None])
    kept = (depth < trace.accepted[:, None])[seen]

    def loss(p: np.ndarray) -> float:
        return float(-np.mean(np.log(np.where(kept, p, 1 - p))))

    held_out, in_sample = (loss(informed.chances(trace, folds)[seen]) for folds in (informed.FOLDS, 1))
    assert in_sample < held_out < loss(np.full(len(kept), kept.mean())) - 0.05


def test_a_load_of_the_package(informed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informed, "EPOCHS", 16)
    out = tmp_path / "found.json"
    assert informed.main(["--names", "summary@0", "--batches", "1", "--jobs", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["command"].startswith("python benchmarks/informed_oracle.py --names summary@0 ")
    row = next(r for r in found["cells"] if r["workload"] == "stationary")
    assert row["o1"] <= min(row["rule"], row["held_out"], row["in_sample"])
    assert row["rule"] < row["held_out"] < 1  # where raw confidence says little and its bends say much
    assert found["summary"]["share_of_o3"]["all"]["held_out"] == pytest.approx(row["held_out"])


def test_an_unknown_load_is_named(informed: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"'latin@0'.*code@0\.7"):
        informed.main(["--names", "latin@0"])
