"""What went wrong, for the record, and what to do about it."""

from __future__ import annotations

import traceback

from nwor_vllm.bench.ncu.expect import ContradictionError
from nwor_vllm.bench.record import Failure
from nwor_vllm.errors import ConfigError, MissingError

OUT_OF_MEMORY = (
    "out of memory",
    "no available memory for the cache blocks",
    "free memory on device",
    "oom",
    "bad_alloc",
)
NO_ROOM = "max seq len"


def explain(error: BaseException) -> Failure:
    text = " ".join(str(error).split()) or type(error).__name__
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Failure(
        exception=type(error).__name__,
        message=text[:2000],
        advice=advice(error, text),
        log_tail=[x[:400] for x in lines[-20:]],
    )


def advice(error: BaseException, text: str) -> str:
    lowered = text.lower()
    if isinstance(error, MemoryError) or any(sign in lowered for sign in OUT_OF_MEMORY):
        return "out of memory: lower requests or max_tokens in the grid's YAML, lower max_model_len, or use more GPUs"
    if NO_ROOM in lowered:
        return "the K/V cache is too small for max_model_len: lower max_model_len, or give the engine more memory"
    if isinstance(error, MissingError | FileNotFoundError):
        return "a model or file is missing: download it, or set TARGET_MODEL and DRAFT_MODEL to folders that exist"
    if isinstance(error, ConfigError):
        return "a setting is wrong: correct the grid's YAML or the flag it names"
    if isinstance(error, ContradictionError):
        return "the counters or the arithmetic are wrong: `nwor profile GRID.yaml --only ID` shows kernel by kernel"
    return "see log_tail; the next invocation tries this run again"
