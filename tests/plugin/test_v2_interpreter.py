"""What is changed in Triton's interpreter to save time leaves it doing what compiled kernels do."""

import os
import subprocess
import sys

PROGRAM = """
from nwor_vllm.plugin import v2_interpreter
v2_interpreter.enable()
import torch, triton
import triton.language as tl

@triton.jit
def twice(x):
    return x + x

@triton.jit
def kernel(numbers, N: tl.constexpr):
    at = numbers + tl.arange(0, N)
    tl.store(at, twice(tl.load(at)))

for _ in range(2):  # a launch leaves nothing behind that the next one trips over
    numbers = torch.tensor([3, 2**30], dtype=torch.int32)
    kernel[(1,)](numbers, N=2)
    assert numbers.tolist() == [6, -(2**31)], numbers  # integers wrap, as compiled
    assert all(map(tl.core.is_builtin, (tl.load, tl.core.load, tl.tensor.__add__, tl.math.exp)))

@triton.jit
def broken(numbers):
    tl.load(nobody)

try:
    broken[(1,)](numbers)
except Exception:
    assert tl.core.is_builtin(tl.load)
    kernel[(1,)](numbers, N=2)
"""


def test_kernels_still_do_what_compiled_ones_do(tmp_path):
    program = tmp_path / "program.py"  # the interpreter reads a kernel's source
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
