"""A driver in another process: values come across, failures in words, and it ends when nobody asks any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = """
import os, sys, time
from scripted_engine import Scripted
from nwor_vllm.bench.backends.beside import Beside
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.workload import Prompt
from nwor_vllm.errors import NworError

def opener(engine):
    driver = Scripted({"off": 3.0}, noise=0.0)
    driver.fail_on = "broken"
    if engine.target == "missing":
        raise RuntimeError("no such model")
    return driver

def cell(name):
    return Cell(engine=ENGINE, requests=1, max_tokens=4, temperature=0, draft_length=0, batches=1, id=name)

ENGINE = Engine(target="t", method="none", draft_length=0)
PROMPT = Prompt("a", "hello", "", 1)

if __name__ == "__main__":
    beside = Beside(ENGINE, opener)
    print("child", beside.process.pid, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
    beside.switch({"policy": "off", "policy_params": {}, "early_exit": {"threshold": 0.0}})
    seconds, results = beside.generate([PROMPT], cell("fine"))
    print(seconds, results[0].id, len(results[0].token_ids), beside.dtype(), beside.counters().drafted, flush=True)
    for what in (lambda: beside.generate([PROMPT], cell("broken")), beside.dtype,
                 lambda: Beside(Engine(target="missing", method="none", draft_length=0), opener)):
        try:
            what()
        except NworError as error:
            print("refused:", error, flush=True)
    beside.close()
    print("ended", beside.process.exitcode, flush=True)
"""


def start(folder: Path, mode: str) -> subprocess.Popen[str]:
    (folder / "beside_run.py").write_text(SCRIPT, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(folder / "beside_run.py"), mode]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_what_it_answers(tmp_path: Path) -> None:
    child = start(tmp_path, "talk")
    lines = child.communicate(timeout=120)[0].splitlines()
    assert child.returncode == 0
    assert lines[1:] == [
        "3.0 a 8 float32 0",
        "refused: the engine beside the subject's: RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "refused: the engine beside the subject's ended; see what it printed",
        "refused: the engine beside the subject's: RuntimeError: no such model",
        "ended 0",
    ]


@pytest.mark.slow
def test_it_ends_when_who_started_it_is_killed(tmp_path: Path) -> None:
    child = start(tmp_path, "wait")
    assert child.stdout is not None
    pid = int(child.stdout.readline().split()[1])
    assert Path(f"/proc/{pid}").exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
