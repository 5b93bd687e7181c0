"""Every launch wrapper compiles for Ampere, Hopper and Blackwell; nothing spills, logits load 128 bits at a time."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LOADS_LOGITS = ("confidence-bf16", "confidence-fp", "confidence-partial", "confidence-stop", "sample", "residual")


@functools.cache
def compiled(capability: int, what: str, cache: str) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "compiled.py"), str(capability), what]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def problems(name: str, code: dict[str, int]) -> list[str]:
    found = [f"{name}: {key} {code[key]}" for key in ("stack", "local_accesses") if code[key]]
    if name.startswith(LOADS_LOGITS) and not code["loads_128"]:
        found.append(f"{name}: no 128-bit load")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability: int, tmp_path: Path) -> None:
    result = compiled(capability, "all", str(tmp_path))
    kernels = result["kernels"]
    for name, code in kernels.items():
        print(f"sm_{capability} {name:48s} {code['registers']:4d} registers, {code['loads_128']} 128-bit loads")
    assert [line for name, code in kernels.items() for line in problems(name, code)] == []
    launched = {name.split("/")[1].split("#")[0] for name in kernels}
    assert launched >= {"confidence_kernel", "combine_kernel", "stop_kernel", "sample_kernel", "residual_kernel"}
    assert "kv_write_kernel" in launched
    assert any(name.startswith("fp8") for name in kernels) == (capability >= 89)
    assert [64, 16, 1] in result["grids"]  # 64 rows fill 132 multiprocessors 8 times over in 16 pieces each


def test_a_spilling_kernel_is_caught(tmp_path: Path) -> None:
    ((name, code),) = compiled(90, "spill", str(tmp_path))["kernels"].items()
    found = problems(name, code)
    assert any("stack" in line for line in found)
    assert any("local_accesses" in line for line in found)
