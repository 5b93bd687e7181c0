"""The benchmark's cases are right before a GPU is spent on them; without one it says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_benchmark", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_case_runs_and_agrees(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm_confidence", "vllm_sample", "vllm_kv_write"):
        monkeypatch.setattr(bench, name, lambda *args: {})
    names = set()
    for case in bench.cases("cpu", (1, 3), 500):
        x = case.make()
        case.compare(case.contenders["ours"](x), case.contenders["torch"](x))
        assert case.bytes_moved > 0
        names.add(case.name)
    assert len(names) == 7


def test_targets_are_judged(bench: ModuleType) -> None:
    row = {"us": {"ours": 12.0, "torch": 24.0, "compile": 13.0}, "of_copy_1gib": 0.5}
    limits = {"torch_speedup_min": 2.5, "compile_speedup_min": 1.0, "copy_fraction_min": 0.85, "us_max": 10.0}
    assert [line.split()[0] for line in bench.missed(limits, row)] == [
        "torch_speedup_min",
        "copy_fraction_min",
        "us_max",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_says_so_where_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "kernels: no CUDA GPU here, nothing to measure\n"
    assert done.stdout == ""
