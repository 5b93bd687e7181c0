"""The measuring loop on an engine whose times are known: what is run, recorded, repeated, and survives a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench import arms, bench, grid, plan, record

ROOT = Path(__file__).resolve().parents[2]
ADAPTIVE = ROOT / "sweeps_config" / "adaptive_grid.yaml"
SMALL = """
name: small
file: "run{run}_adaptive{adaptive}.json"
common: {requests: 3, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 4, warmup_batches: 1}
axes: {adaptive: [false, true]}
runs: [{run: 1}, {run: 2, temperature: 0.7}, {run: 3, draft_length: 3}]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def states(scripted: ModuleType, path: Path, out: Path) -> dict[str, str]:
    loaded = grid.load(path, "embedded", scripted.models(out.parent / "models"))
    return {p.cell.file: f"{p.state} {p.why}".strip() for p in plan.examine_all(loaded, out)}


def test_27_records_are_valid_and_stand_beside_their_baselines(finished: Path) -> None:
    files = list((finished / "sweeps").glob("*/*.json"))
    assert len(files) == 27
    for path in files:
        found = record.read(path)
        assert found.status == "done"
        assert found.summary is not None
        modes = [mode.mode for mode in found.summary.per_mode]
        assert "vanilla" in modes
        assert "fixed" in modes
        assert len({tuple(b.prompts_sha256 for b in mode.batches) for mode in found.summary.per_mode}) == 1
        prompts = [b.prompts_sha256 for b in found.summary.per_mode[0].batches]
        assert len(set(prompts)) == len(prompts) == found.cell.batches
        assert path.with_suffix(".md").exists()
        assert {p.name for p in path.with_suffix("").iterdir()} == {
            "config.yaml", "metrics.json", "responses.jsonl", "requests.csv", "per_round.csv", "summary.csv",
        }  # fmt: skip
    assert not list(finished.rglob("*.partial"))


def test_arms_are_interleaved_a_b_then_b_a(finished: Path) -> None:
    found = record.read(finished / "sweeps/oneoff_scenarios/scenario_d_creative_writing.json")
    assert found.summary is not None
    positions = {mode.mode: [b.position for b in mode.batches[:4]] for mode in found.summary.per_mode}
    assert positions == {"adaptive": [0, 2, 0, 2], "vanilla": [1, 1, 1, 1], "fixed": [2, 0, 2, 0]}


def test_headline_runs_carry_an_a_a_arm(finished: Path) -> None:
    found = record.read(finished / "sweeps/oneoff_scenarios/scenario_b_chatbot.json")
    assert found.summary is not None
    assert [m.mode for m in found.summary.per_mode] == ["adaptive", "vanilla", "fixed", "repeat"]
    assert [c.against for c in found.comparisons] == ["vanilla", "fixed", "repeat"]


def test_nothing_is_run_twice(scripted: ModuleType, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = scripted.Scripted({})
    assert scripted.run_grid(small, out, first) == []
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*.json")}
    again = scripted.Scripted({})
    assert scripted.run_grid(small, out, again) == []
    assert again.calls == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.json")} == stamps


def test_exactly_what_is_damaged_foreign_or_half_written_is_run_again(
    scripted: ModuleType, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    scripted.run_grid(small, out, scripted.Scripted({}))
    truncated, foreign, partial = (out / f"run{n}_adaptive1.json" for n in (1, 2, 3))
    truncated.write_text(truncated.read_text(encoding="utf-8")[:500], encoding="utf-8")
    foreign.write_text(foreign.read_text(encoding="utf-8").replace('"key": "', '"key": "0', 1), encoding="utf-8")
    partial.rename(partial.with_name(partial.name + ".partial"))
    now = states(scripted, small, out)
    assert now[truncated.name].startswith("pending invalid:")
    assert now[foreign.name].startswith("pending other key:")
    assert now[partial.name] == "pending missing"
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.json")}
    assert scripted.run_grid(small, out, scripted.Scripted({})) == []
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.json")}
    assert {name for name in after if after[name] != before.get(name)} == {truncated.name, foreign.name, partial.name}
    assert set(states(scripted, small, out).values()) == {"done"}
    assert len(list((out / "superseded").iterdir())) == 1
    assert not list(out.rglob("*.partial"))


def test_a_failed_run_is_a_record_with_advice_and_is_tried_three_times(
    scripted: ModuleType, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for attempt in (1, 2, 3):
        driver = scripted.Scripted({})
        driver.fail_on = "run2"
        failed = scripted.run_grid(small, out, driver)
        assert {p.cell.file for p in failed} == {"run2_adaptive0.json", "run2_adaptive1.json"}
        found = record.read(out / "run2_adaptive0.json")
        assert (found.status, found.attempts, found.summary) == ("failed", attempt, None)
        assert found.failure is not None
        assert found.failure.exception == "RuntimeError"
        assert "lower requests or max_tokens" in found.failure.advice
    now = states(scripted, small, out)
    assert now["run2_adaptive0.json"].startswith("exhausted failed 3x: CUDA out of memory")
    assert sum(state == "done" for state in now.values()) == 4
    driver = scripted.Scripted({})
    assert scripted.run_grid(small, out, driver) == []
    assert driver.calls == 0


def test_one_process_a_grid(tmp_path: Path) -> None:
    with (
        bench.locked(tmp_path, wait=False),
        pytest.raises(bench.Busy, match="another process"),
        bench.locked(tmp_path, False),
    ):
        pass
    with bench.locked(tmp_path, wait=False):
        pass


def test_engine_groups_of_a_grid_may_run_side_by_side_but_not_with_all_of_it(tmp_path: Path) -> None:
    with bench.locked(tmp_path, False, "a"), bench.locked(tmp_path, False, "b"):
        with pytest.raises(bench.Busy), bench.locked(tmp_path, False):
            pass
        with pytest.raises(bench.Busy), bench.locked(tmp_path, False, "a"):
            pass


def test_settings_that_reach_the_plugin() -> None:
    cells = grid.load(ROOT / "sweeps_config/early_exit_grid.yaml", "full", {"target": "t", "drafter": "d"}).cells
    panel = arms.of_panel([c for c in cells if c.panel == cells[0].panel])
    assert [(a.mode, a.policy, a.draft_length, a.threshold) for a in panel if a.mode != "repeat"] == [
        ("fixed", "fixed", 10, 0.0), ("early_exit", "fixed", 10, 0.3), ("early_exit", "fixed", 10, 0.5),
        ("early_exit", "fixed", 10, 0.7), ("vanilla", "off", 0, 0.0),
    ]  # fmt: skip
    assert panel[2].setting() == {
        "policy": "fixed", "policy_params": {"k": 10}, "early_exit": {"threshold": 0.5, "policy_rule": False},
    }  # fmt: skip


def nwor(*args: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**{k: v for k, v in os.environ.items() if k not in plan_variables()}, **(environ or {})}
    return subprocess.run(
        [sys.executable, "-m", "nwor_vllm.bench.cli", *args],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        check=False,
    )


def plan_variables() -> set[str]:
    return {"TARGET_MODEL", "DRAFT_MODEL", "TENSOR_PARALLEL_SIZE", "PROFILE", "ONLY", "NUM_SEEDS"}


def test_plan_for_shell_tools_and_people(scripted: ModuleType, tmp_path: Path) -> None:
    names = scripted.models(tmp_path)
    environ = {"TARGET_MODEL": names["target"], "DRAFT_MODEL": names["drafter"], "PROFILE": "embedded"}
    common = ("plan", str(ADAPTIVE), "--out", str(tmp_path / "out"))
    described = json.loads(nwor(*common, "--json", environ=environ).stdout)
    assert len(described["cells"]) == 16
    assert {"id", "file", "key", "state"} <= described["cells"][0].keys()
    assert described["estimate_s"] is None
    rows = [line.split("\t") for line in nwor(*common, "--tsv", environ=environ).stdout.splitlines()]
    assert len(rows) == 16
    assert {row[1] for row in rows} == {"pending"}
    groups = nwor(*common, "--groups", environ=environ).stdout.splitlines()
    assert len(groups) == 3
    table = nwor(*common, environ=environ).stdout
    assert "16 runs, 0 done, 16 pending in 3 engine starts, no estimate yet" in table
    only = nwor(*common, "--tsv", environ={**environ, "ONLY": "run3"}).stdout.splitlines()
    assert len(only) == 2
    would = nwor("bench", *common[1:], "--dry-run", environ={**environ, "ONLY": "run3"}).stdout
    assert would.count("would run") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TARGET_MODEL": "/no/such/model"}, "model '/no/such/model' does not exist"),
        ({"TARGET_MODEL": "nobody/nothing-here"}, "is not on this machine"),
        ({"PROFILE": "ful"}, "did you mean 'full'"),
        ({"TENSOR_PARALLEL_SIZE": "two"}, "expected a whole number"),
        ({"ONLY": "run99"}, "names no run"),
    ],
)
def test_what_is_wrong_is_said_before_an_engine_starts(
    scripted: ModuleType, tmp_path: Path, environ: dict[str, str], says: str
) -> None:
    names = scripted.models(tmp_path)
    base = {"TARGET_MODEL": names["target"], "DRAFT_MODEL": names["drafter"], "PROFILE": "embedded"}
    done = nwor("bench", str(ADAPTIVE), "--out", str(tmp_path / "out"), environ={**base, **environ})
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
