"""Grids and `nwor profile` under a stand-in for ncu: what it reports, and every way in which it does not."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nwor_vllm.bench import compare, grid, measure, plan, provenance, record
from nwor_vllm.bench import profile as command
from nwor_vllm.bench.cli import main
from nwor_vllm.bench.ncu import probe, profile
from nwor_vllm.errors import CorruptFileError

GRID = """
name: ncu_grid
file: "{name}.json"
common: {requests: 2, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 2, warmup_batches: 0, ncu: true}
runs: [{name: baseline}, {name: stopping, threshold: 0.5}, {name: moving, adaptive: true}]
"""
WRITES = {"dram__bytes_write.sum": 96.0, profile.STORES[0]: 1000.0}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ncu_file: ModuleType, scripted: ModuleType) -> Path:
    """A machine with a GPU and an ncu: it reports 1000 sectors, and its child counts `window.txt`."""
    pytest.importorskip("ncu_report")
    (tmp_path / "g.yaml").write_text(GRID, encoding="utf-8")
    (tmp_path / "report").write_bytes(ncu_file.report([("reshape_and_cache_flash_kernel", WRITES)] * 2))
    agree(tmp_path, 64_000.0)
    stand_in(
        tmp_path,
        'while [ $# -gt 0 ]; do case "$1" in -o) out=$2 ;; *window.json) window=$1 ;; esac; shift; done\n'
        f'cp {tmp_path}/report "$out"; cp {tmp_path}/window.txt "$window"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(provenance, "gpus", lambda: ["H200"])
    monkeypatch.setattr(provenance, "hardware", provenance.hardware.__wrapped__)  # not kept for the tests that follow
    monkeypatch.setattr(probe, "preflight", lambda gpus, environ: probe.Probe("ok"))
    models = scripted.models(tmp_path / "models")
    for name, variable in (("target", "TARGET_MODEL"), ("drafter", "DRAFT_MODEL")):
        monkeypatch.setenv(variable, models[name])
    return tmp_path


def stand_in(folder: Path, body: str) -> None:
    path = folder / "bin" / "ncu"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def agree(folder: Path, expected: float) -> None:
    text = {"logical_bytes": 64_000.0, "analytic_bytes": expected, "text": "a window"}
    (folder / "window.txt").write_text(json.dumps(text), encoding="utf-8")


def run_grid(lab: Path, scripted: ModuleType) -> tuple[list[plan.Planned], Path]:
    out, lines = lab / "out", list[str]()
    loaded = grid.load(lab / "g.yaml", "embedded", scripted.models(lab / "models"))
    session = replace(
        scripted.session(scripted.Scripted({}), lines.append),
        profile=lambda cell: profile.run(cell, out / cell.id, os.environ, lines.append, timeout_s=60.0),
    )
    return measure.run_group(plan.examine_all(loaded, out), session), out


def test_a_profiled_run_holds_all_four_byte_counts(lab: Path, scripted: ModuleType) -> None:
    failed, out = run_grid(lab, scripted)
    assert failed == []
    mode = compare.subject(record.read(out / "baseline.json"), "x")
    assert mode.ncu.status == "ok"
    assert (mode.ncu.store_bytes, mode.ncu.dram_bytes) == (64_000.0, 192.0)
    assert (mode.ncu.logical_bytes, mode.ncu.analytic_bytes) == (64_000.0, 64_000.0)
    assert mode.ncu_metrics is not None
    assert mode.ncu_metrics["dram__bytes_write.sum"] == 192.0


def test_stores_against_arithmetic_fail_the_baseline_and_it_alone(lab: Path, scripted: ModuleType) -> None:
    agree(lab, 32_000.0)
    failed, out = run_grid(lab, scripted)
    assert [item.cell.id for item in failed] == ["baseline"]
    found = record.read(out / "baseline.json")
    assert (found.status, found.summary) == ("failed", None)
    assert found.failure is not None
    assert found.failure.exception == "ContradictionError"
    assert found.failure.message == "kernels stored 64000 bytes where the model's shape says 32000"
    assert "nwor profile" in found.failure.advice
    with pytest.raises(CorruptFileError, match="is a failed run"):
        compare.subject(found, "baseline.json")
    for name in ("stopping", "moving"):
        assert record.read(out / f"{name}.json").status == "done"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('echo "==ERROR== ERR_NVGPUCTRPERM"; exit 1', "denied"),
        ('while [ "$1" != -o ]; do shift; done; : >"$2"', "empty"),
        ("exec sleep 100", "timeout"),
        ("exit 9", "failed"),
    ],
)
def test_an_ncu_that_fails_leaves_a_finished_record_that_says_so(
    lab: Path, scripted: ModuleType, body: str, status: str
) -> None:
    stand_in(lab, body)
    cell = grid.load(lab / "g.yaml", "embedded", scripted.models(lab / "models")).cells[0]
    said: list[str] = []
    found = profile.run(cell, lab / "out" / cell.id, os.environ, said.append, timeout_s=0.4)
    assert found.status == status
    assert said[-1].startswith(f"ncu {status}: ")
    session = replace(scripted.session(scripted.Scripted({})), profile=lambda cell: found)
    assert measure.run_group([plan.examine(cell, lab / "out")], session) == []
    mode = compare.subject(record.read(lab / "out" / "baseline.json"), "x")
    assert mode.ncu.status == status
    assert mode.ncu.reason == found.reason
    assert mode.ncu_metrics is None
    assert mode.ncu.analytic_bytes is not None


def test_a_child_that_leaves_no_counts_is_a_failure(lab: Path, scripted: ModuleType) -> None:
    stand_in(lab, f'while [ "$1" != -o ]; do shift; done; cp {lab}/report "$2"')
    cell = grid.load(lab / "g.yaml", "embedded", scripted.models(lab / "models")).cells[0]
    found = profile.run(cell, lab / "out", os.environ, lambda text: None, timeout_s=20.0)
    assert (found.status, found.totals) == ("failed", None)
    assert "left no counts" in found.reason


def profiled(lab: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    answer = lab / "answer.json"
    code = main(["profile", str(lab / "g.yaml"), "--out", str(lab / "out"), "--output", str(answer), *flags])
    return code, json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}


def test_the_command_lays_them_side_by_side(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = profiled(lab, "--only", "baseline")
    out = capsys.readouterr().out
    assert code == 0, out
    assert answer["store_bytes"] == answer["analytic_bytes"] == answer["logical_bytes"] == 64_000.0
    assert answer["kernels"] == [{"name": "reshape_and_cache_flash_kernel", "launches": 2, **totals()}]
    assert "reshape_and_cache_flash_kernel: 2 launches, 64,000 bytes stored" in out


def totals() -> dict[str, float]:
    return {name: 2 * value for name, value in WRITES.items()}


def test_the_command_ends_with_the_contradiction(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agree(lab, 32_000.0)
    code, answer = profiled(lab, "--only", "baseline")
    assert (code, answer["status"]) == (1, "contradiction")
    assert capsys.readouterr().err.splitlines()[-1].endswith("where the model's shape says 32000")
    assert profiled(lab, "--only", "stopping")[0] == 0


def test_without_ncu_the_window_is_counted(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "preflight", lambda gpus, environ: probe.Probe("unavailable", "no GPU"))
    child = ["bash", "-c", f"cp {lab}/window.txt $0"]
    monkeypatch.setattr(profile, "child", lambda cell, folder, *flags: [*child, str(_made(folder) / "window.json")])
    code, answer = profiled(lab, "--only", "moving")
    assert (code, answer["status"], answer["reason"]) == (0, "unavailable", "no GPU")
    assert (answer["logical_bytes"], answer["store_bytes"]) == (64_000.0, None)
    assert answer["reasons"] == dict.fromkeys(("kernels", "store_bytes", "dram_bytes"), "no GPU")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "names 3 runs of ncu_grid; choose one of baseline, stopping, moving"),
        (("--only", "none"), "names 0 runs of ncu_grid"),
        (("--only", "baseline", "--timeout-s", "0"), "expected seconds above 0"),
    ],
)
def test_one_run_is_named(lab: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str) -> None:
    assert profiled(lab, *flags)[0] == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_grid_or_cost_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile"]) == 2
    assert "name a GRID.yaml" in capsys.readouterr().err


def test_kernels_are_added_up_by_name() -> None:
    rows = command.by_name(
        [probe.Kernel("b", {"x.sum": 1.0}), probe.Kernel("a", {}), probe.Kernel("b", {"x.sum": 2.0})]
    )
    assert rows == [{"name": "a", "launches": 1}, {"name": "b", "launches": 2, "x.sum": 3.0}]
