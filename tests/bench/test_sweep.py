from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench import sweep

ROOT = Path(__file__).resolve().parents[2]
GRIDS = tuple(ROOT / "sweeps_config" / f"{name}.yaml" for name in ("adaptive_grid", "early_exit_grid"))


def start(scripted: ModuleType, tmp_path: Path, *args: str, grids: tuple[Path, ...] = GRIDS) -> subprocess.Popen[str]:
    names = scripted.models(tmp_path)
    environ = {**os.environ, "TARGET_MODEL": names["target"], "DRAFT_MODEL": names["drafter"], "PROFILE": "embedded"}
    command = [sys.executable, "-P", "-m", "nwor_vllm.bench.cli", "sweep", *map(str, grids), *args]
    return subprocess.Popen(
        command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_every_group_of_every_grid_is_planned(scripted: ModuleType, tmp_path: Path) -> None:
    child = start(scripted, tmp_path, "--dry-run", "--workers", "2")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    assert "4 engine groups, 23 runs, on cpu0, cpu1" in out
    assert out.count("would run") == 4


def test_flags_travel_and_the_sweep_s_own_do_not() -> None:
    job = sweep.Job(GRIDS[1], "abc", 7, 1)
    argv = [str(GRIDS[0]), str(GRIDS[1]), "--workers", "2", "--batches", "3", "--devices=0,1", "--only", "run1"]
    assert sweep.command(job, argv, GRIDS)[5:] == [str(GRIDS[1]), "--group", "abc", "--batches", "3", "--only", "run1"]


def test_wide_engines_start_first_and_none_wider_than_the_machine(scripted: ModuleType, tmp_path: Path) -> None:
    child = start(scripted, tmp_path, "--tensor-parallel-size", "4", "--devices", "0,1")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2
    assert "needs 4 devices; 2 are given" in err
    assert err.count("\n") == 1


class Process:
    """A process that has ended, as Popen shows it."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize(("codes", "failed", "starts"), [([0], 0, 1), ([1], 1, 1), ([-9, 0], 0, 2), ([-9, -9], 1, 2)])
def test_a_killed_worker_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], failed: int, starts: int
) -> None:
    left, used = list(codes), []

    def started(job: sweep.Job, taken: tuple[str, ...], *rest: object) -> Process:
        used.append(taken)
        return Process(left.pop(0))

    monkeypatch.setattr(sweep, "_start", started)
    found = sweep._work(sweep.deque([sweep.Job(GRIDS[0], "g", 1, 1)]), [], ["cpu0"], [], GRIDS, 1)
    assert (len(found), len(used)) == (failed, starts)


def test_stopped_it_leaves_no_worker_behind(scripted: ModuleType, tmp_path: Path) -> None:
    child = start(scripted, tmp_path, "--workers", "2")
    assert child.stdout is not None
    seen: list[str] = []
    while sum("started on" in line for line in seen) < 2:
        seen.append(child.stdout.readline())
    time.sleep(0.5)
    kids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="utf-8").split()
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=150)
    assert child.returncode == 130
    assert len(kids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in kids)
