"""The plugin on vLLM's V2 model runner, which runs on CPU through Triton's interpreter in a process of its own.

A sample of drafters x scheduling x scenes x rules; `nwor verify --full` runs them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nwor_vllm import zoo

pytestmark = pytest.mark.vllm

# drafter, asynchronous, scene, rules: every value of each at least once.
CELLS: list[tuple[str, bool, str, list[str]]] = [
    ("eagle", False, "plain", ["fixed", "early exit", "zero", "pause", "no number", "planted"]),
    ("eagle", True, "preemption", ["both"]),
    ("eagle3", True, "chunked prefill", ["early exit", "both", "pause"]),
    ("draft_model", False, "prefix cache", ["adaptive", "zero", "pause"]),
    ("draft_model", True, "plain", ["fixed", "early exit", "no number"]),
]

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    pair = {
        "target": zoo.path("target"),
        "eagle": zoo.path("eagle"),
        "eagle3": zoo.path("eagle3"),
        "draft_model": zoo.path("draft"),
    }
    here = Path(__file__).parent
    argument = json.dumps([{name: str(path) for name, path in pair.items()}, CELLS])
    command = [sys.executable, "-m", "nwor_vllm.plugin.v2_interpreter", "v2_run", argument]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(here)}, capture_output=True, text=True, timeout=1500
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def of(rows: list[Row], drafter: str, asynchronous: bool, rule: str) -> Row:
    (row,) = (r for r in rows if r.get("cell", [""])[:2] == [drafter, asynchronous] and r["cell"][3] == rule)
    return row


def test_the_v2_runner_ran_every_cell(rows: list[Row]) -> None:
    assert rows[0]["runner"] == "CPUModelRunner"
    assert rows[0]["module"] == "vllm.v1.worker.cpu.model_runner"
    assert [r["cell"] for r in rows[1:]] == [[*cell[:3], rule] for cell in CELLS for rule in cell[3]]


def test_outputs_are_the_targets_own(rows: list[Row]) -> None:
    assert {tuple(map(str, r["cell"])): r["differences"] for r in rows[1:] if r["cell"][3] != "planted"} == {
        (d, str(a), s, rule): 0 for d, a, s, rules in CELLS for rule in rules if rule != "planted"
    }


def test_a_planted_lossy_rule_is_noticed(rows: list[Row]) -> None:
    assert of(rows, "eagle", False, "planted")["differences"] > 0


def test_each_engine_ran_the_scheduler_it_was_asked_for(rows: list[Row]) -> None:
    for row in rows[1:]:
        if row["cell"][3] not in ("planted", "pause", "no number"):
            assert (
                "nwor: V2 drafting is exact: drafts are trimmed one by one and their loop ends with the last"
                in row["said"]
            )
            assert row["scheduler"] == ("ElasticAsyncScheduler" if row["cell"][1] else "ElasticScheduler")
            assert row["mode"] == "exact"


@pytest.mark.parametrize(("drafter", "asynchronous"), [("eagle", False), ("draft_model", True)])
def test_early_exit_saves_draft_forwards_verified_tokens_and_kv_writes(
    rows: list[Row], drafter: str, asynchronous: bool
) -> None:
    fixed, early = of(rows, drafter, asynchronous, "fixed"), of(rows, drafter, asynchronous, "early exit")
    assert fixed["accepted_tokens"] > 0
    assert early["verified_tokens"] < fixed["verified_tokens"]
    assert early["tokens_stopped_by_confidence"] > 0
    assert early["draft_forwards_saved"] > 0
    assert early["draft_kv_bytes_avoided"] > 0
    # What is dropped is mostly what would have been rejected.
    assert early["accepted_tokens"] / early["verified_tokens"] > fixed["accepted_tokens"] / fixed["verified_tokens"]


@pytest.mark.parametrize(("drafter", "asynchronous"), [("eagle", False), ("draft_model", False)])
def test_k_zero_drafts_nothing(rows: list[Row], drafter: str, asynchronous: bool) -> None:
    row = of(rows, drafter, asynchronous, "zero")
    assert row["length_histogram"] == {"0": row["steps"]}
    assert row["verified_tokens"] == row["accepted_tokens"] == 0
    assert row["draft_forwards"] <= row["steps"] / 2  # prompts, and once per block of the cache


@pytest.mark.parametrize(
    ("drafter", "asynchronous"), [("eagle", False), ("eagle3", True), ("draft_model", False)], ids=str
)
def test_acceptance_after_a_pause_is_that_of_a_drafter_that_was_fed_all_along(
    rows: list[Row], drafter: str, asynchronous: bool
) -> None:
    row = of(rows, drafter, asynchronous, "pause")
    assert row["accepted_tokens"] > 0
    assert row["accepted_per_position"] == row["always"]["accepted_per_position"]
    assert row["draft_forwards"] < row["always"]["draft_forwards"]
    assert row["left"] == 0
    assert row["holes"]["accepted_tokens"] < row["accepted_tokens"]  # it would have been noticed


@pytest.mark.parametrize(("drafter", "asynchronous"), [("eagle", False), ("draft_model", True)])
def test_drafts_without_numbers_end_where_somebody_looks(rows: list[Row], drafter: str, asynchronous: bool) -> None:
    row = of(rows, drafter, asynchronous, "no number")
    assert row["differences"] == row["verified_tokens"] == 0
    assert row["unwatched"] > 0


def test_a_draft_model_honours_the_steps_k(rows: list[Row]) -> None:
    """Upstream it drafts num_speculative_tokens whatever the step says."""
    row = of(rows, "draft_model", False, "adaptive")
    lengths = {int(k): n for k, n in row["length_histogram"].items()}
    assert row["draft_forwards"] <= sum(max(k, 1) * n for k, n in lengths.items())


def test_preemption_happened(rows: list[Row]) -> None:
    assert of(rows, "eagle", True, "both")["preemptions"] > 0
