"""The CPU build's expansion of sampling parameters: stock is wrong, ours is right, and it reaches the sampler."""

import os
import subprocess
import sys

import pytest
import torch

from nwor_vllm.plugin import expand

CASES = [
    (torch.float32, [0.5, 0.0, 1.5], [2, 3, 7], 0, 1),
    (torch.int32, [5, 9, 0], [1, 1, 4], 0, 0),
    (torch.int64, [5, 9, 0], [1, 2, 4], 9, 3),
]


@pytest.mark.parametrize(("dtype", "values", "ends", "old", "new"), CASES)
def test_every_token_gets_the_value_of_its_request(dtype, values, ends, old, new):
    output = torch.full((ends[-1],), -1, dtype=dtype)
    expand.expand(output, torch.tensor(values, dtype=dtype), torch.tensor(ends, dtype=torch.int32), old, new)
    starts = [0, *ends[:-1]]
    expected = [new if v == old else v for v, a, b in zip(values, starts, ends, strict=True) for _ in range(b - a)]
    assert output.tolist() == expected


def test_the_probe_tells_wrong_from_right():
    def drops_the_copy(output, *rest):
        expand.expand(output.to(torch.int64), *rest)

    assert expand.is_wrong(drops_the_copy)
    assert not expand.is_wrong(expand.expand)
    assert expand.adapt(expand.expand) is expand.expand


def test_a_build_without_the_operator_is_left_alone():
    """A GPU's wheel has the routine too: probing it there must not end the engine's start."""

    def missing(*args):
        return torch.ops._C.an_operator_that_no_build_has(*args)

    assert expand.adapt(missing) is missing


# In a process of its own: elsewhere an engine may have put it right already.
PROGRAM = """
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils import cpu_triton_utils
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens
import vllm._C
from nwor_vllm.plugin import compat, expand

assert not HAS_TRITON, "Triton kernels run here: the routine is not used"
assert expand.is_wrong(cpu_triton_utils._expand_kernel_impl), "vLLM repaired it: drop the fix"
current_platform.register_triton_kernel_overrides()
assert compat.fix_cpu_expand()
assert not compat.fix_cpu_expand(), "the second call finds nothing to do"
got = expand_batch_to_tokens(torch.tensor([0.7, 0.0]), torch.tensor([2, 3], dtype=torch.int32), 3, 0, 1)
assert torch.equal(got, torch.tensor([0.7, 0.7, 1.0])), got
"""


@pytest.mark.vllm
def test_stock_is_wrong_and_the_sampler_is_put_right():
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the fault is the CPU build's")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# The plugin alone, as a user has it: nothing here asks for the fix.
ENGINE = """
import vllm
from nwor_vllm import zoo
from nwor_vllm.plugin import control

llm = vllm.LLM(
    model=str(zoo.path("target")), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, seed=0,
    speculative_config={"method": "eagle", "model": str(zoo.path("eagle")), "num_speculative_tokens": 5},
    additional_config={"nwor": {"policy": "fixed"}},
)
chat = [[{"role": "user", "content": row["prompt"]}] for row in zoo.prompts("code", 4, 1)]
llm.chat(chat, vllm.SamplingParams(temperature=0.7, max_tokens=40, seed=3), use_tqdm=False)
counted = control.snapshot(llm)["counters"]
assert counted["accepted_tokens"] > 0.3 * counted["verified_tokens"], counted
"""


@pytest.mark.vllm
def test_an_engine_with_the_plugin_accepts_drafts_above_temperature_zero():
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


KERNELS = """
import os, sys
os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
if sys.argv[1:]:
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = sys.argv[1]
import nwor_vllm.plugin.worker
print(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
"""


@pytest.mark.vllm
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CPU build")
@pytest.mark.parametrize(("given", "expected"), [([], "4096"), (["77"], "77")])
def test_a_cpu_worker_keeps_the_kernels_of_more_sizes_than_stock(given, expected):
    command = [sys.executable, "-c", KERNELS, *given]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.split()[-1] == expected
