"""`nwor bench` on real vLLM and the embedded pair: one engine, every arm, records that are whole."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nwor_vllm.bench import record

pytestmark = pytest.mark.vllm
GRID = """
name: tiny
file: "{name}_adaptive{adaptive}.json"
common: {requests: 6, max_tokens: 48, temperature: 0.0, draft_length: 5, batches: 2, warmup_batches: 1,
         max_model_len: 1024, enforce_eager: true, dtype: float32, slo: {ttft: 60000}}
axes: {adaptive: [false, true]}
runs:
  - {name: greedy, references: [vanilla, fixed, repeat]}
  - {name: stopping, threshold: 0.6, ncu: true}
  - {name: sampled, temperature: 0.7}
  - {name: arriving, request_rate: 12, burstiness: 0.5, max_concurrency: 4, references: [vanilla_engine, best_fixed]}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "tiny.yaml").write_text(GRID, encoding="utf-8")
    return folder, bench(folder)


def bench(folder: Path) -> str:
    command = [sys.executable, "-P", "-m", "nwor_vllm.bench.cli", "bench", "tiny.yaml", "--out", "out"]
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    environ = {k: v for k, v in os.environ.items() if k not in ("TARGET_MODEL", "DRAFT_MODEL", "ONLY", "NUM_SEEDS")}
    environ |= {"PROFILE": "embedded"} | ({"LD_PRELOAD": str(library)} if library.exists() else {})
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def read(lab: tuple[Path, str], name: str) -> record.Record:
    return record.read(lab[0] / "out" / f"{name}.json")


def test_one_engine_serves_every_arm(lab: tuple[Path, str]) -> None:
    assert lab[1].count("engine ready") == 1
    assert lab[1].count("engine without a drafter ready") == 1
    assert len(list((lab[0] / "out").glob("*.json"))) == 8
    for name in ("greedy", "stopping", "sampled"):
        assert read(lab, f"{name}_adaptive0").panel == read(lab, f"{name}_adaptive1").panel


def test_at_temperature_0_every_arm_writes_the_same_tokens(lab: tuple[Path, str]) -> None:
    for name in ("greedy", "stopping"):
        for ratio in read(lab, f"{name}_adaptive1").comparisons:
            assert ratio.outputs == "identical", (name, ratio)


def test_arms_really_differ(lab: tuple[Path, str]) -> None:
    found = read(lab, "greedy_adaptive0")
    assert found.summary is not None
    modes = {mode.mode: mode for mode in found.summary.per_mode}
    # The stopping runs differ from these in the policy alone, so they were interleaved with them.
    assert set(modes) == {"fixed", "vanilla", "repeat", "adaptive", "early_exit", "both"}
    assert modes["vanilla"].spec_num_draft_tokens == 0
    assert modes["vanilla"].spec_acceptance_ratio is None
    assert modes["fixed"].spec_num_draft_tokens == modes["repeat"].spec_num_draft_tokens
    assert (modes["fixed"].spec_num_draft_tokens or 0) > 0
    assert 0 < (modes["fixed"].spec_acceptance_ratio or 0) < 1
    stopping = read(lab, "stopping_adaptive0").summary
    assert stopping is not None
    by_arm = {(mode.mode, mode.threshold): mode for mode in stopping.per_mode}
    assert (by_arm["early_exit", 0.6].tokens_stopped_by_confidence or 0) > 0
    assert by_arm["fixed", 0.0].tokens_stopped_by_confidence == 0
    # Fewer drafts; not fewer forwards: shorter rounds are more rounds.
    assert (by_arm["early_exit", 0.6].spec_num_draft_tokens or 0) < (by_arm["fixed", 0.0].spec_num_draft_tokens or 0)
    assert "Confidence early exit stats: " in lab[1]


def test_times_are_the_engine_s_own(lab: tuple[Path, str]) -> None:
    found = read(lab, "sampled_adaptive0")
    assert found.summary is not None
    mode = found.summary.per_mode[0]
    assert mode.ttft_s.n == mode.request_latency_s.n == mode.requests == 12
    assert 0 < (mode.ttft_s.mean or 0) < (mode.request_latency_s.mean or 0) <= max(b.seconds for b in mode.batches)
    assert mode.goodput_req_s is not None
    assert (found.peak_memory_bytes or 0) > 1 << 28  # an engine with its weights and cache


def test_requests_arrive_while_the_engine_runs_and_count_from_when_they_were_due(lab: tuple[Path, str]) -> None:
    found = read(lab, "arriving_adaptive1")
    assert found.summary is not None
    modes = {(m.mode, m.draft_length): m for m in found.summary.per_mode}
    assert set(modes) == {("adaptive", 5), ("vanilla_engine", 0), *(("fixed", k) for k in (1, 2, 3, 5))}
    for mode in modes.values():
        assert all(batch.seconds >= 0.5 for batch in mode.batches)  # 6 requests at 12 a second
        assert 0 <= (mode.queue_s.mean or 0) < (mode.ttft_s.mean or 0)
        assert mode.slo_met_share == 1.0
    assert {c.metric for c in found.comparisons} == {"request_latency_s"}
    assert {c.verdict for c in found.comparisons} == {"identical"}
    assert modes["vanilla_engine", 0].no_speculation == "engine_without_drafter"
    assert modes["vanilla_engine", 0].spec_num_draft_tokens is None
    assert found.summary.best_fixed is not None
    with (lab[0] / "out/arriving_adaptive1/requests.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    arrivals = {mode: [r["arrival_ms"] for r in rows if r["mode"] == mode and r["gamma"] in "05"] for mode in
                ("adaptive", "vanilla_engine", "fixed")}  # fmt: skip
    assert len(set(map(tuple, arrivals.values()))) == 1
    assert len(set(arrivals["adaptive"])) > 6


def test_rounds_add_up_to_what_the_plugin_counted(lab: tuple[Path, str]) -> None:
    """vLLM's rounds of each request against our counters of the arm."""
    for name in ("greedy_adaptive0", "stopping_adaptive0", "sampled_adaptive1", "arriving_adaptive1"):
        found = read(lab, name)
        assert found.summary is not None
        subject = found.summary.per_mode[0]
        with (lab[0] / "out" / name / "per_round.csv").open(encoding="utf-8", newline="") as file:
            rounds = [row for row in csv.DictReader(file) if row["mode"] == subject.mode]
        accepted = sum(int(row["accepted"]) for row in rounds)
        assert len(rounds) == subject.spec_num_rounds, name
        assert accepted == subject.spec_num_accepted_tokens, name


def test_counted_bytes_are_what_arithmetic_expects(lab: tuple[Path, str]) -> None:
    found = read(lab, "stopping_adaptive0")
    assert found.summary is not None
    ncu = found.summary.per_mode[0].ncu
    assert ncu.status != "not_requested"
    assert ncu.logical_bytes is not None
    assert ncu.analytic_bytes is not None
    # Accepted drafts behind an end of sequence are written and not counted as output.
    assert ncu.logical_bytes == pytest.approx(ncu.analytic_bytes, rel=0.05)


def test_per_request_rows_carry_their_rounds(lab: tuple[Path, str]) -> None:
    body: dict[str, Any] = json.loads((lab[0] / "out/greedy_adaptive0/metrics.json").read_text(encoding="utf-8"))
    rows = body["per_request"]
    assert len(rows) == 12
    assert all(row["num_rounds"] > 0 and 0 <= row["average_acceptance_rate"] <= 1 for row in rows)
    lines = (lab[0] / "out/greedy_adaptive0/responses.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["token_ids"] for line in lines)


def test_a_second_invocation_starts_no_engine(lab: tuple[Path, str]) -> None:
    again = bench(lab[0])
    assert "engine" not in again
    assert "nothing to run, 8 of 8 done" in again
