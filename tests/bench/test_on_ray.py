"""What a Ray task does and what comes home of it, without Ray: its process here, its messages one by one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nwor_vllm.bench import child, grid, jobs, on_ray, plan, provenance, record
from nwor_vllm.errors import NworError

GRID = """
name: small
file: "run{run}.json"
common: {requests: 3, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 2, warmup_batches: 0}
runs: [{run: 1}, {run: 2, temperature: 0.7}]
"""


@pytest.fixture
def job(scripted: ModuleType, tmp_path: Path) -> jobs.Job:
    path, out = tmp_path / "small.yaml", tmp_path / "home"
    path.write_text(GRID, encoding="utf-8")
    names = scripted.models(tmp_path / "models")
    planned = plan.examine_all(grid.load(path, "embedded", names), out)
    flags = ("--profile=embedded", f"--target={names['target']}", f"--drafter={names['drafter']}")
    return jobs.Job("small/g", path, out, planned[0].cell.engine.group, 1, tuple(planned), flags)


def measured(scripted: ModuleType, job: jobs.Job) -> Path:
    """The job's records, done elsewhere."""
    out = job.out.parent / "elsewhere" / "out"
    names = {"target": job.planned[0].cell.engine.target, "drafter": job.planned[0].cell.engine.drafter}
    out.parent.mkdir()
    (out.parent / "models").symlink_to(Path(names["target"]).parent)
    loaded = grid.load(job.config, "embedded", names)
    from nwor_vllm.bench.measure import run_group

    assert run_group(plan.examine_all(loaded, out), scripted.session(scripted.Scripted({}))) == []
    return out


@pytest.mark.slow
def test_a_task_sends_lines_and_every_record_as_it_is_written(job: jobs.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PROGRAM", (str(Path(__file__).with_name("scripted_bench.py")),))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    messages: list[tuple[str, Any]] = []
    for message in on_ray.measure(on_ray.parcel(job, gpus=False)):
        messages.append(message)
        if message[0] == "record":
            on_ray.bring_home(job, *message[1])
    kinds = [kind for kind, _ in messages]
    assert (kinds[0], kinds[-1], messages[-1][1]) == ("where", "code", 0)
    assert kinds.count("record") == 2
    assert kinds.index("record") < len(kinds) - 4  # not all at the end
    for item in job.planned:
        found = record.read(item.path)
        assert (found.key, found.provenance["environment"]["OMP_NUM_THREADS"]) == (item.key, "3")
        assert {"metrics.json", "responses.jsonl"} <= {path.name for path in item.path.with_suffix("").iterdir()}
    again = on_ray.measure(on_ray.parcel(job, gpus=False))
    assert [kind for kind, _ in again if kind != "line"] == ["where", "code"]  # what is home is not measured again
    assert not list(Path(tempfile.gettempdir()).glob(f"{on_ray.SCRATCH}{os.getpid()}-*"))


def test_a_worker_unlike_this_machine_starts_no_engine(job: jobs.Job) -> None:
    sent = on_ray.parcel(job, gpus=False)
    other = dataclasses.replace(sent, machine={**sent.machine, "hardware": {"cpu": "another"}})
    where, line, code = on_ray.measure(other)
    assert (where[0], code) == ("where", ("code", 2))
    assert "has other hardware than the machine that sweeps" in line[1]


def test_nothing_but_this_job_s_valid_records_comes_home(scripted: ModuleType, job: jobs.Job) -> None:
    text = (measured(scripted, job) / "run1.json").read_text(encoding="utf-8")
    home = job.planned[0].path
    for name, content, beside, says in (
        ("run9.json", text, {}, "which this job does not have"),
        ("run1.json", text[:500], {}, "is not JSON"),
        ("run1.json", text.replace('"key": "', '"key": "0', 1), {}, "came with another key"),
        ("run1.json", text, {"../../x": b""}, "is outside"),
    ):
        with pytest.raises(NworError, match=says):
            on_ray.bring_home(job, name, content.encode(), beside)
        assert not home.exists()
    on_ray.bring_home(job, "run1.json", text.encode(), {"run1.md": b"words"})
    assert home.read_text(encoding="utf-8") == text
    assert home.with_suffix(".md").read_text(encoding="utf-8") == "words"


def test_what_travels_holds_no_secret_and_no_device(job: jobs.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "VLLM_API_KEY", "VLLM_LOGGING_LEVEL", "TARGET_MODEL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "x")
    environ = on_ray.parcel(job, gpus=True).environ
    assert {"VLLM_LOGGING_LEVEL", "TARGET_MODEL"} <= environ.keys()
    assert not environ.keys() & {"HF_TOKEN", "VLLM_API_KEY", "CUDA_VISIBLE_DEVICES"}
    assert "CUDA_VISIBLE_DEVICES" in on_ray.parcel(job, gpus=False).environ


def test_paths_below_this_folder_keep_their_names_on_a_worker(job: jobs.Job) -> None:
    here = dataclasses.replace(job, config=Path("grids/a.yaml"), out=Path("sweeps/a"))
    assert here.argv(here.config, here.out)[:4] == ["bench", "grids/a.yaml", "--out", "sweeps/a"]
    sent = on_ray.parcel(job, gpus=False)
    assert (sent.argv[1], sent.argv[3], sent.out) == ("grid.yaml", "out", "out")
    assert json.dumps(dict(sent.machine)) == json.dumps(provenance.machine())


def test_scratch_of_a_killed_task_is_removed_by_the_next() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = Path(tempfile.mkdtemp(prefix=f"{on_ray.SCRATCH}{ended.pid}-"))
    mine = Path(tempfile.mkdtemp(prefix=f"{on_ray.SCRATCH}{os.getpid()}-"))
    on_ray._sweep_scratch()
    assert (left.exists(), mine.exists()) == (False, True)
    mine.rmdir()
