"""Triton kernels and their plain-torch twins, behind one dispatcher: CUDA tensors run Triton, CPU tensors the twin.

`import nwor_vllm.kernels` loads neither torch nor triton; a name loads its module when it is first used. `ops` holds
the faces (they check and dispatch), `reference` the twins, `fused` the Triton code.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "LOG_ODDS_MAX": "ops.confidence",
    "Confidence": "ops.confidence",
    "confidence": "ops.confidence",
    "confidence_combine": "ops.confidence",
    "confidence_partial": "ops.confidence",
    "StopState": "state",
    "confidence_and_stop": "ops.stop",
    "stop": "ops.stop",
    "sample_with_confidence": "ops.sample",
    "commit_kv": "ops.kv_write",
    "masked_kv_write": "ops.kv_write",
    "Residual": "ops.residual",
    "residual_sample": "ops.residual",
    "Workspace": "dispatch",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
