"""The README's first command: what it plans for real, and what it does around the grids (small scripts stand in)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRIDS = ("adaptive_grid", "early_exit_grid", "oneoff_scenarios")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "run_all_experiments.sh", tmp_path)
    shutil.copy(ROOT / "scripts" / "lib.sh", tmp_path / "scripts")
    program(tmp_path / "scripts" / "bootstrap.sh", "")
    for grid in GRIDS:
        program(tmp_path / f"run_{grid}.sh", f'echo "{grid} $*"')
    program(tmp_path / "bin" / "nwor", 'echo "nwor $*"')
    python = tmp_path / "bin" / "python3"
    program(python, f"echo {tmp_path}")  # what enter_env asks: the environment's prefix
    return tmp_path


def program(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def start(copy: Path, *args: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "NWOR_ENV": "current", "PATH": f"{copy / 'bin'}:{os.environ['PATH']}"}
    command = [str(copy / "run_all_experiments.sh"), *args]
    return subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_all_grids_in_order_then_the_report(copy: Path) -> None:
    process = start(copy)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == [*GRIDS, "nwor", "report", "sweeps"]
    assert (copy / "sweeps" / "master_experiment.log").read_text().split() == list(GRIDS)


def test_goes_on_after_a_failure_and_names_it(copy: Path) -> None:
    program(copy / "run_adaptive_grid.sh", "exit 3")
    process = start(copy)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.split() == [*GRIDS[1:], "nwor", "report", "sweeps"]
    assert err.splitlines()[-1].startswith("run_all_experiments.sh: not complete: adaptive_grid;")


def test_stopped_it_stops_its_grid(copy: Path) -> None:
    program(
        copy / "run_adaptive_grid.sh",
        "trap 'touch stopped; exit 130' TERM\ntouch started\nwhile :; do sleep 0.05; done",
    )
    process = start(copy)
    deadline = time.monotonic() + 30
    while not (copy / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert (copy / "stopped").exists()


def test_unknown_arguments_are_refused(copy: Path) -> None:
    process = start(copy, "--fast")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "unknown argument '--fast'" in err
    assert not (copy / "sweeps").exists()


def test_dry_run_plans_27_real_runs() -> None:
    if not (ROOT / ".venv" / ".nwor-ready").exists():
        pytest.skip("would set an environment up: run ./scripts/test.sh")
    environ = {name: value for name, value in os.environ.items() if name not in ("ONLY", "NUM_SEEDS")}
    command = [str(ROOT / "run_all_experiments.sh"), "--dry-run"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    counts = [
        int(word) for word, unit in zip(done.stdout.split(), done.stdout.split()[1:], strict=False) if unit == "runs,"
    ]
    assert counts == [16, 7, 4]
