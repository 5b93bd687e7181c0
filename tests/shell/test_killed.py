"""A grid's script, killed with all it started at thirty random moments: whole records, then the undisturbed set."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nwor_vllm.bench import record

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
name: small
file: "run{run}_adaptive{adaptive}.json"
common: {requests: 3, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 4, warmup_batches: 1}
axes: {adaptive: [false, true]}
runs: [{run: 1}, {run: 2, temperature: 0.7}, {run: 3, draft_length: 3}]
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The real shell around the real `nwor`, but for the engine, which is scripted."""
    bench = ROOT / "tests" / "bench" / "scripted_bench.py"
    (tmp_path / "bin").mkdir()
    nwor = tmp_path / "bin" / "nwor"
    nwor.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{bench}" "$PPID" "$@"\n', encoding="utf-8")
    nwor.chmod(0o755)
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return tmp_path


def start(lab: Path, out: str) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "PATH": f"{lab / 'bin'}:{os.environ['PATH']}", "NWOR_TEST_PAUSE_S": "0.01"}
    environ |= {**dict.fromkeys(("TARGET_MODEL", "DRAFT_MODEL", "ONLY"), ""), "PROFILE": "embedded"}
    script = f"set -euo pipefail; source {ROOT}/scripts/lib.sh; run_grid small.yaml {out}"
    return subprocess.Popen(
        ["bash", "-c", script], cwd=lab, env=environ, start_new_session=True, stdout=subprocess.DEVNULL
    )


def shape(folder: Path) -> dict[str, tuple[str, str, str, list[str]]]:
    found = {}
    for path in folder.glob("*.json"):
        r = record.read(path)  # raises unless whole and valid
        found[path.name] = (r.key, r.config_key, r.status, [m.mode for m in r.summary.per_mode] if r.summary else [])
    return found


@pytest.mark.slow
def test_killed_at_thirty_moments_the_set_is_the_undisturbed_one(lab: Path) -> None:
    rng = random.Random(11)
    before = time.monotonic()
    assert start(lab, "undisturbed").wait() == 0
    length = time.monotonic() - before
    killed = 0
    while killed < 30:
        process = start(lab, "out")
        time.sleep(rng.uniform(0, 1.1 * length))
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
            shape(lab / "out")
        else:
            shutil.rmtree(lab / "out")  # done before the kill: start over, so that there is something to interrupt
    assert start(lab, "out").wait() == 0
    assert shape(lab / "out") == shape(lab / "undisturbed")
    assert {status for _, _, status, _ in shape(lab / "out").values()} == {"done"}
    assert not list((lab / "out").rglob("*.partial"))
