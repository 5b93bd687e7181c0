"""The shell around `nwor bench`: goes on after a failure, one invocation a grid, leaves nothing behind when stopped.

`nwor` is a stand-in here, because what is tested is what the shell does with its answers.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NWOR = r"""#!/bin/bash
echo "$*" >>"$CALLS"
case "$1 $*" in
    plan*--tsv*)
        if [[ -e $CALLS.planned ]]; then cat "$ROWS"; else printf '%s\tpending\tx\tmissing\n' $GROUPS_LEFT; fi
        touch "$CALLS.planned" ;;
    bench*"$HANG"*)
        trap 'echo stopped >>"$CALLS"; exit 7' TERM
        echo $$ >"$CALLS.pid"
        while :; do sleep 0.05; done ;;
    bench*"$FAIL"*) echo "measuring $6"; exit 1 ;;
    bench*) echo "measuring $6" ;;
esac
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "nwor"
    program.parent.mkdir()
    program.write_text(NWOR, encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "rows").write_text("g1\tdone\ta.json\t\n", encoding="utf-8")
    return tmp_path


def start(lab: Path, hang: str = "never", fail: str = "never", left: str = "g1 g2 g2 g3") -> subprocess.Popen[str]:
    environ = {
        **os.environ, "PATH": f"{lab / 'bin'}:{os.environ['PATH']}", "CALLS": str(lab / "calls"), "GROUPS_LEFT": left,
        "ROWS": str(lab / "rows"), "HANG": hang, "FAIL": fail,
    }  # fmt: skip
    script = f"set -euo pipefail; source {ROOT}/scripts/lib.sh; run_grid grid.yaml {lab / 'out'}"
    return subprocess.Popen(
        ["bash", "-c", script], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=lab
    )


def calls(lab: Path) -> list[str]:
    return (lab / "calls").read_text(encoding="utf-8").splitlines()


def test_every_group_is_measured_and_logged(lab: Path) -> None:
    child = start(lab)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    expected = [f"bench grid.yaml --out {lab}/out --group g{n}" for n in (1, 2, 3)]
    assert [c for c in calls(lab) if c.startswith("bench")] == expected
    log = (lab / "out" / "experiment.log").read_text(encoding="utf-8")
    assert [f"measuring g{n}" in log for n in (1, 2, 3)] == [True] * 3
    assert "1 of 1 runs done" in log


def test_where_nothing_is_left_one_plan_says_so(lab: Path) -> None:
    (lab / "calls.planned").touch()
    child = start(lab)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "1 of 1 runs done\n", "")
    assert calls(lab) == [f"plan grid.yaml --out {lab}/out --tsv"]


def test_a_failure_does_not_stop_the_night_and_is_named_at_its_end(lab: Path) -> None:
    (lab / "rows").write_text("g1\tdone\ta.json\t\ng2\tpending\tb.json\tfailed 1x: boom\n", encoding="utf-8")
    child = start(lab, fail="g2")
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 1
    assert sum(c.startswith("bench") for c in calls(lab)) == 3
    assert "not done: b.json (failed 1x: boom)" in out
    assert "not done: b.json" in (lab / "out" / "experiment.log").read_text(encoding="utf-8")


def test_a_second_invocation_leaves_with_one_line(lab: Path) -> None:
    (lab / "out").mkdir()
    with (lab / "out" / ".grid.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        child = start(lab)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert err.count("\n") == 1
    assert "another invocation" in err
    assert not (lab / "calls").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_from_outside_it_stops_its_child_and_frees_the_grid(lab: Path, number: signal.Signals) -> None:
    child = start(lab, hang="g2")
    pid = lab / "calls.pid"
    end = time.monotonic() + 30
    while not (pid.exists() and pid.read_text(encoding="utf-8").strip()):
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(number)
    child.communicate(timeout=30)
    assert child.returncode == 130
    assert calls(lab)[-1] == "stopped"
    assert not Path(f"/proc/{int(pid.read_text(encoding='utf-8'))}").exists()
    again = start(lab)
    again.communicate(timeout=60)
    assert again.returncode == 0


@pytest.mark.parametrize("name", ["run_adaptive_grid.sh", "run_early_exit_grid.sh", "run_oneoff_scenarios.sh"])
def test_scripts_are_thin(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert os.access(ROOT / name, os.X_OK)
    config = name.removeprefix("run_").removesuffix(".sh")
    assert any(f"sweeps_config/{config}.yaml" in line for line in lines)
    assert (ROOT / "sweeps_config" / f"{config}.yaml").exists()
