"""vLLM's V2 model runner on a machine without a GPU: its Triton kernels run in Triton's interpreter.

For checks, never for serving: a step costs tens of milliseconds. `enable()` must run before `vllm` is imported, in a
process of its own: the interpreter is chosen when a kernel is decorated, so it changes V1 engines of the process too.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from types import SimpleNamespace
from typing import Any

from nwor_vllm.errors import MissingError

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a child process would start without the shims
}

_enabled = False


def enable() -> None:
    """Make this process run V2 engines on CPU. Idempotent."""
    os.environ.update(ENVIRONMENT)
    global _enabled
    if _enabled:
        return
    if "vllm" in sys.modules:
        raise MissingError("vllm is already imported; start the V2 check in a process of its own")
    from triton.backends import backends

    if "cpu" not in backends:
        _register_cpu_backend(backends)
    _accept_integer_masks()
    _define_log1p()
    _save_time()
    _enabled = True


def _register_cpu_backend(backends: dict[str, Any]) -> None:
    """vLLM turns Triton off where no driver is active; the interpreter needs none, so a nominal one will do."""
    from triton.backends import Backend
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):  # type: ignore[misc]
        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise MissingError("the Triton interpreter has no benchmarker; autotuned kernels need a GPU")

    backends["cpu"] = Backend(compiler=BaseBackend, driver=InterpreterDriver)


def _accept_integer_masks() -> None:
    """A mask that a kernel carries through `tl.where` arrives as int32; compiled Triton takes it, the interpreter does
    not (vLLM's Gumbel sampler has one)."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def as_bool(mask: Any) -> Any:
        if mask is None or mask.data.dtype == np.bool_:
            return mask
        return TensorHandle(mask.data.astype(np.bool_), tl.int1)

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, cache: Any, volatile: Any) -> Any:
        return load(self, pointers, as_bool(mask), other, cache, volatile)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, cache: Any) -> Any:
        return store(self, pointers, value, as_bool(mask), cache)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store


def _define_log1p() -> None:
    """libdevice's functions are empty outside a compiler; vLLM's rejection sampler calls one of them."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def log1p(x: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            data = np.log1p(x.handle.data)
        return tl.tensor(TensorHandle(data.astype(x.handle.data.dtype), x.dtype.scalar), x.type)

    libdevice.log1p = log1p


def _save_time() -> None:
    """Triton looks its whole language up again in every function that a kernel calls, and checks integers for overflow,
    which compiled kernels do not: more than half of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock, running = interpreter._patch_lang, False
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # all that it looks for in a function

    def patch_lang(function: Any) -> Any:
        nonlocal running
        if running:
            return None  # a kernel calls the function: its launch has patched everything
        scope = stock(everything)
        restore = scope.restore

        def end() -> None:
            nonlocal running
            running = False
            restore()

        scope.restore, running = end, True
        return scope

    interpreter._patch_lang = patch_lang
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def main() -> None:
    """`python -m nwor_vllm.plugin.v2_interpreter MODULE ...`: run a module with V2 engines on CPU."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m nwor_vllm.plugin.v2_interpreter MODULE [ARGUMENT ...]")
    enable()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
