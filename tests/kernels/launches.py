"""Every launch whose machine code is judged: the shapes and options that a server would use."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nwor_vllm.kernels import (
    Confidence,
    StopState,
    commit_kv,
    confidence,
    confidence_and_stop,
    confidence_combine,
    confidence_partial,
    masked_kv_write,
    residual_sample,
    sample_with_confidence,
    stop,
)

VOCAB = 128256


def _logits(dtype: torch.dtype, rows: int = 64) -> torch.Tensor:
    return torch.zeros(rows, VOCAB, dtype=dtype)


def _confidence(dtype: torch.dtype, rows: int, **options: object) -> Callable[[], object]:
    return lambda: confidence(_logits(dtype, rows), backend="triton", **options)  # type: ignore[arg-type]


def _stop() -> None:
    state = StopState.create(64, 5)
    conf = Confidence(torch.zeros(64, dtype=torch.int64), torch.zeros(64), torch.zeros(64))
    stop(conf, state, 1, backend="triton")


def _sample() -> None:
    seeds = torch.zeros(64, dtype=torch.int64)
    sample_with_confidence(_logits(torch.bfloat16), seeds, seeds, torch.ones(64), backend="triton")


def _caches(dtype: torch.dtype, hnd: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (4, 8, 16, 128) if hnd else (4, 16, 8, 128)
    caches = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    return (caches[0].permute(0, 2, 1, 3), caches[1].permute(0, 2, 1, 3)) if hnd else caches


def _kv_write(dtype: torch.dtype, hnd: bool) -> Callable[[], object]:
    rows, one = torch.zeros(64, 8, 128, dtype=torch.bfloat16), torch.ones(1)
    slots, alive = torch.arange(64), torch.ones(64, dtype=torch.bool)
    counters = torch.zeros(2, dtype=torch.int64)
    return lambda: masked_kv_write(
        rows,
        rows,
        *_caches(dtype, hnd),
        slots,
        alive=alive,
        k_scale=one,
        v_scale=one,
        counters=counters,
        backend="triton",
    )


def _commit() -> None:
    staged = torch.zeros(16, 4, 8, 128, dtype=torch.bfloat16)
    accepted = torch.full((16,), 2, dtype=torch.int32)
    commit_kv(staged, staged, *_caches(torch.bfloat16, False), torch.arange(64).view(16, 4), accepted, backend="triton")


def _residual(rounds: int, chain: bool) -> Callable[[], object]:
    seeds = torch.zeros(8, dtype=torch.int64)
    options = (
        {"candidates": torch.zeros(8, rounds, dtype=torch.int64), "uniforms": torch.zeros(8, rounds)} if chain else {}
    )
    p, q = torch.zeros(8, VOCAB), torch.zeros(8, rounds, VOCAB)
    return lambda: residual_sample(p, q, seeds, seeds, backend="triton", **options)


LAUNCHES: dict[str, Callable[[], object]] = {
    "confidence-bf16": _confidence(torch.bfloat16, 64),
    "confidence-bf16-unsplit": _confidence(torch.bfloat16, 2048),
    "confidence-fp16-all": _confidence(torch.float16, 64, margin=True, entropy=True, temperature=torch.ones(64)),
    "confidence-fp32-mask": _confidence(torch.float32, 64, mask=torch.ones(64, VOCAB, dtype=torch.bool)),
    "confidence-partial": lambda: confidence_partial(_logits(torch.bfloat16), 0, backend="triton"),
    "confidence-combine": lambda: confidence_combine(
        torch.zeros(8, 64, 5), margin=True, entropy=True, backend="triton"
    ),
    "confidence-stop": lambda: confidence_and_stop(
        _logits(torch.bfloat16), StopState.create(64, 5), 1, margin=True, entropy=True, backend="triton"
    ),
    "stop": _stop,
    "sample": _sample,
    "kv-write-nhd": _kv_write(torch.bfloat16, False),
    "kv-write-hnd": _kv_write(torch.bfloat16, True),
    "fp8-kv-write-nhd": _kv_write(torch.float8_e4m3fn, False),
    "commit": _commit,
    "residual": _residual(1, False),
    "residual-chain": _residual(3, True),
}
