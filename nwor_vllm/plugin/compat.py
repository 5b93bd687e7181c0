"""Every private vLLM name the plugin relies on. A hook that is missing disables its one feature with one log line."""

from __future__ import annotations

import importlib
from typing import Any


def fix_cpu_expand() -> bool:
    """Put right the CPU build's expansion of sampling parameters; true where it had to be."""
    from nwor_vllm.plugin import expand

    try:
        owner: Any = importlib.import_module("vllm.utils.cpu_triton_utils")
        importlib.import_module("vllm._C")
        stock = owner._expand_kernel_impl
    except (ImportError, AttributeError):
        return False  # not the CPU build, or one that no longer has the routine
    fixed = expand.adapt(stock)
    owner._expand_kernel_impl = fixed
    dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    name = "vllm.v1.sample.rejection_sampler.expand_kernel"
    if fixed is not stock and name in dispatcher._registry:  # registered before us: replace it where it is used
        dispatcher.register_kernels({name: fixed})
    return fixed is not stock
