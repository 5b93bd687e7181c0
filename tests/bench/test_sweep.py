"""Sweeps of real processes on the scripted engine: the same records on this machine and on Ray, whoever is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nwor_vllm.bench import jobs, record, sweep
from nwor_vllm.bench.cli import main

ROOT = Path(__file__).resolve().parents[2]
GRIDS = tuple(ROOT / "sweeps_config" / f"{name}.yaml" for name in ("adaptive_grid", "early_exit_grid"))
BENCH = Path(__file__).with_name("scripted_bench.py")
# Two engines: the draft length is an engine's own.
SMALL = """
name: small
file: "run{run}_adaptive{adaptive}.json"
common: {requests: 3, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 4, warmup_batches: 1}
axes: {adaptive: [false, true]}
runs: [{run: 1}, {run: 2, temperature: 0.7}, {run: 3, draft_length: 3}]
"""
RUN = """
import sys
from nwor_vllm.bench import child, cli
child.PROGRAM = (sys.argv[1],)
sys.exit(cli.main(sys.argv[2:]))
"""


def start(
    scripted: ModuleType, folder: Path, *args: str, grids: tuple[Path, ...] = GRIDS, pause_s: float = 0.0
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    names = scripted.models(folder.parent / "models")
    environ = {**os.environ, "TARGET_MODEL": names["target"], "DRAFT_MODEL": names["drafter"], "PROFILE": "embedded"}
    environ |= {"NWOR_TEST_PAUSE_S": str(pause_s), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-P", "-c", RUN, str(BENCH), "sweep", *map(str, grids), *args]
    return subprocess.Popen(command, env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def swept(child: subprocess.Popen[str], timeout: float = 180) -> str:
    out, err = child.communicate(timeout=timeout)
    assert (child.returncode, err) == (0, ""), out[-2000:] + err[-2000:]
    return out


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, ...]:
    """As seen from a folder beside it."""
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return (tmp_path / "small.yaml",)


TIMES = re.compile(r"_s$|seconds|_at$|_ms$|^(ratio|low|high|p|mde|warmup|flags|git|NWOR_TEST_PAUSE_S)$")


def timeless(value: Any, at: str) -> dict[str, Any]:
    """Path -> leaf of a record, without what no second run can repeat; whether a time is known stays."""
    if not isinstance(value, dict | list):
        return {at: value}
    out = {} if value else {at: value}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        path = f"{at}.{key}"
        out |= {path: inner is None} if TIMES.search(str(key)) else timeless(inner, path)
    return out


def shape(out: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(out.glob("*.json")):
        assert record.read(path).status == "done"
        found |= timeless(json.loads(path.read_text(encoding="utf-8")), path.name)
        assert {p.name for p in path.with_suffix("").iterdir()} >= {"metrics.json", "responses.jsonl", "config.yaml"}
    assert not list(out.rglob("*.partial"))
    return found


def test_every_group_of_every_grid_is_planned(scripted: ModuleType, tmp_path: Path) -> None:
    out = swept(start(scripted, tmp_path / "a", "--dry-run", "--workers", "2"))
    assert "4 engines to start for 23 runs" in out
    assert out.count("would run") == 4


def test_wide_engines_start_first_and_none_wider_than_the_machine(scripted: ModuleType, tmp_path: Path) -> None:
    process = start(scripted, tmp_path / "a", "--tensor-parallel-size", "4", "--devices", "0,1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "needs 4 devices; 2 are given" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_each_engine_has_devices_of_its_own_and_a_second_sweep_runs_nothing(
    scripted: ModuleType, tmp_path: Path, small: tuple[Path, ...]
) -> None:
    out = swept(start(scripted, tmp_path / "a", "--devices", "4,5", grids=small))
    assert sorted(re.findall(r"scripted engine on (\S+)", out)) == ["4", "5"]
    assert "6/6 runs ended" in out
    assert len({path.partition(".json")[0] for path in shape(tmp_path / "a" / "sweeps" / "small")}) == 6
    again = swept(start(scripted, tmp_path / "a", grids=small))
    assert "0 engines to start for 0 runs" in again
    assert "scripted engine" not in again


@pytest.mark.slow
def test_a_second_sweep_of_a_grid_leaves_with_one_line(
    scripted: ModuleType, tmp_path: Path, small: tuple[Path, ...]
) -> None:
    first = start(scripted, tmp_path / "a", grids=small, pause_s=0.1)
    assert first.stdout is not None
    while "scripted engine" not in first.stdout.readline():
        pass
    second = start(scripted, tmp_path / "a", grids=small)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 75
    assert err == "nwor: sweeps/small is being worked on by another process; wait for it, or use --wait\n"
    swept(first)


class Once:
    """An executor whose processes end as told."""

    def __init__(self, codes: list[int]) -> None:
        self.codes, self.jobs, self.starts = list(codes), list[jobs.Job](), 0

    def start(self, job: jobs.Job) -> str | None:
        if self.jobs:
            return None
        self.jobs.append(job)
        self.starts += 1
        return "here"

    def ended(self) -> list[tuple[jobs.Job, int]]:
        return [(self.jobs.pop(), self.codes.pop(0))]

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    ("codes", "failed", "starts"), [([0], 0, 1), ([1], 1, 1), ([-9, 0], 0, 2), ([-9, -9, 0], 0, 3), ([-9] * 3, 1, 3)]
)
def test_a_lost_worker_is_replaced_a_bounded_number_of_times(
    codes: list[int], failed: int, starts: int, tmp_path: Path
) -> None:
    executor = Once(codes)
    job = jobs.Job("g", GRIDS[0], tmp_path, "g", 1, ())
    found = sweep.work(deque([job]), executor, sweep.Report([], terminal=False))
    assert (len(found), executor.starts) == (failed, starts)


@pytest.mark.slow
def test_stopped_it_leaves_no_worker_behind(scripted: ModuleType, tmp_path: Path) -> None:
    process = start(scripted, tmp_path / "a", "--workers", "2", pause_s=0.05)
    kids = engines(process, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=150)
    assert process.returncode == 130
    assert not any(alive(pid) for pid in kids)


@pytest.mark.slow
def test_a_killed_sweep_takes_its_workers_with_it(scripted: ModuleType, tmp_path: Path) -> None:
    process = start(scripted, tmp_path / "a", pause_s=0.05)
    kids = engines(process, 1)
    process.kill()
    process.wait()
    gone(kids)


def engines(process: subprocess.Popen[str], count: int) -> list[int]:
    """Processes of the engines, once so many have started."""
    found: list[int] = []
    assert process.stdout is not None
    while len(found) < count:
        line = process.stdout.readline()
        assert line, "it ended too early"
        if match := re.search(r"scripted engine on .* in (\d+)", line):
            found.append(int(match[1]))
    return found


def gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False


def test_without_ray_one_line_says_how_to_get_it(
    scripted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    names = scripted.models(tmp_path)
    models = ["--target", names["target"], "--drafter", names["drafter"], "--profile", "embedded"]
    assert main(["sweep", str(GRIDS[1]), *models, "--on", "ray"]) == 1
    assert capsys.readouterr().err == "nwor: --on ray needs Ray; install it: pip install 'nwor-vllm[ray]'\n"


@pytest.mark.slow
def test_stopped_on_ray_it_leaves_no_engine_behind(
    scripted: ModuleType, tmp_path: Path, small: tuple[Path, ...]
) -> None:
    process = start(scripted, tmp_path / "a", "--on", "ray", "--workers", "2", grids=small, pause_s=0.2)
    kids = engines(process, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=150)
    assert process.returncode == 130
    gone(kids)


@pytest.fixture(scope="module")
def local(scripted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("local")
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    swept(start(scripted, folder, grids=(Path("small.yaml"),)))
    return folder, shape(folder / "sweeps" / "small")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["nobody", "worker", "engine"])
def test_on_ray_the_records_are_those_of_this_machine(
    scripted: ModuleType, local: tuple[Path, dict[str, Any]], tmp_path: Path, killed: str
) -> None:
    folder = local[0].parent / f"{local[0].name}-{killed}"  # beside it, so that both use the same models
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    environ = ["--on", "ray", "--workers", "2"]
    process = start(scripted, folder, *environ, grids=(Path("small.yaml"),), pause_s=0.0 if killed == "nobody" else 0.3)
    lines: list[str] = []
    if killed != "nobody":
        assert process.stdout is not None
        sign = r"done run1_adaptive1\.json"
        while not (lines and re.search(sign, lines[-1])):
            lines.append(process.stdout.readline())
            assert lines[-1], f"it ended too early: {''.join(lines)} {process.communicate()[1]}"
        text = "".join(lines)
        pattern = r"runs on .*\(process (\d+)\)" if killed == "worker" else r"scripted engine on .* in (\d+)"
        for pid in re.findall(pattern, text):
            with suppress(ProcessLookupError):  # the other group's may be done
                os.kill(int(pid), signal.SIGKILL)
    out = "".join(lines) + swept(process)
    assert "6/6 runs ended" in out
    assert ("was lost on" in out) == (killed != "nobody")
    found, expected = shape(folder / "sweeps" / "small"), local[1]
    if killed != "nobody":
        # A panel cut after one of its records is measured again for the other: the same arms, that one's first.
        found, expected = ({k: v for k, v in of.items() if not k.endswith(".position")} for of in (found, expected))
    assert found == expected
