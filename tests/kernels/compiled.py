"""Runs the launch wrappers under a driver that compiles for a named GPU and launches nothing; prints JSON by kernel.

    python compiled.py 90        every launch in launches.py
    python compiled.py 90 spill  a kernel that has to spill

Specialisations (divisibility, unit strides, None) are the JIT's own, because the wrappers' own calls are compiled.
A spill shows as a stack frame or as LDL/STL in the machine code; the LOCAL column stays 0 even then.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class CompilingDriver(DriverBase):  # type: ignore[misc]
    """Enough of a driver for `kernel[grid](...)` to bind, specialise and compile; the launch itself is recorded."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.grids: list[tuple[int, int, int]] = []
        self.utils = self
        self.launcher_cls = self._launcher
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def _launcher(self, src: Any, metadata: Any) -> Any:
        return lambda *args: self.grids.append(args[:3])

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return (None, None, 0, 0, 1024)


def machine_code(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _dump("-res-usage", file.name)
        sass = _dump("-sass", file.name)
    return {
        "registers": int(_found(r"REG:(\d+)", usage)),
        "stack": int(_found(r"STACK:(\d+)", usage)),
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads_128": len(re.findall(r"\bLDG\.E\.\S*128", sass)),
        "stores_128": len(re.findall(r"\bSTG\.E\.\S*128", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", sass, re.M)),
    }


def _dump(flag: str, path: str) -> str:
    return subprocess.run([str(CUOBJDUMP), flag, path], check=True, capture_output=True, text=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if not match:
        raise SystemExit(f"no {pattern} in cuobjdump's output:\n{text}")
    return match.group(1)


@triton.jit
def _spiller(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + offs)
    b = tl.load(x_ptr + BLOCK + offs)
    total = tl.sum(a * b, axis=0)  # 512 values a thread have to survive this
    tl.store(out_ptr + offs, a * total + b)


def _spill() -> None:
    x = torch.zeros(1 << 15)
    _spiller[(1,)](x, x, BLOCK=1 << 13, num_warps=1)


def main(capability: int, what: str) -> None:
    driver = CompilingDriver(capability)
    triton.runtime.driver.set_active(driver)
    seen: dict[str, Any] = {}
    name = "spill"

    def collect(*, key: Any, repr: str, fn: Any, compile: Any, is_manual_warmup: bool, already_compiled: bool) -> None:
        kernels = [k for cache in fn.jit_function.device_caches.values() for k in cache[0].values()]
        seen[f"{name}/{fn.name}#{len(seen)}"] = machine_code(kernels[-1].asm["cubin"])

    triton.knobs.runtime.jit_post_compile_hook = collect
    if what == "spill":
        _spill()
    else:
        # The wrappers see CPU tensors; only the dispatcher's refusal of those is lifted.
        from nwor_vllm.kernels import dispatch

        dispatch._interpreting = lambda: True
        from launches import LAUNCHES

        for name, launch in LAUNCHES.items():
            if name.startswith("fp8") and capability < 89:
                continue
            launch()
    if not driver.grids or any(min(grid) < 1 for grid in driver.grids):
        raise SystemExit(f"bad grids: {driver.grids}")
    print(json.dumps({"kernels": seen, "grids": driver.grids}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "all")
