"""One program writes one row's K and V, or finds that it must not and ends."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nwor_vllm.kernels.dispatch import refuse
from nwor_vllm.kernels.reference.kv_write import FP8


@triton.jit
def _copy(source, target, span, mask, head_stride, scale_ptr, LIMIT: tl.constexpr, DIM: tl.constexpr):
    x = tl.load(source + span, mask=mask)
    if LIMIT > 0:
        y = x.to(tl.float32) / tl.load(scale_ptr)
        x = tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(target + span // DIM * head_stride + span % DIM, x.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "slots_in_cache"])
def kv_write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    alive_ptr,
    accepted_ptr,
    k_scale_ptr,
    v_scale_ptr,
    counters_ptr,
    key_stride,
    value_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    positions,
    slots_in_cache,
    row_bytes,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    live = (slot >= 0) & (slot < slots_in_cache)
    if alive_ptr is not None:
        live = live & (tl.load(alive_ptr + token) != 0)
    if accepted_ptr is not None:
        live = live & (token % positions < tl.load(accepted_ptr + token // positions))
    if counters_ptr is not None:
        tl.atomic_add(counters_ptr + tl.where(live, 0, 1), row_bytes.to(tl.int64), sem="relaxed")
    if live:
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        key_row = key_cache_ptr + block * k_block_stride + offset * k_slot_stride
        value_row = value_cache_ptr + block * v_block_stride + offset * v_slot_stride
        for base in range(0, HEADS * DIM, TILE):
            span = base + tl.arange(0, TILE)
            mask = span < HEADS * DIM
            _copy(key_ptr + token * key_stride, key_row, span, mask, k_head_stride, k_scale_ptr, LIMIT, DIM)
            _copy(value_ptr + token * value_stride, value_row, span, mask, v_head_stride, v_scale_ptr, LIMIT, DIM)


def launch(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    alive: torch.Tensor | None,
    accepted: torch.Tensor | None,
    positions: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    counters: torch.Tensor | None,
) -> None:
    tokens, heads, dim = key.shape
    blocks, block_size = key_cache.shape[:2]
    quantizes = key_cache.dtype in FP8 and key.dtype not in FP8
    if quantizes and key.is_cuda and torch.cuda.get_device_capability(key.device) < (8, 9):
        refuse("key_cache", f"{key_cache.dtype} on compute capability below 8.9", "a cache of the rows' dtype")
    # Heads of one token are dense in the rows of any attention layer; a view that is not costs a copy here.
    key, value = (rows if rows.stride(1) == dim else rows.contiguous() for rows in (key, value))
    kv_write_kernel[(tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        alive,
        accepted,
        k_scale,
        v_scale,
        counters,
        key.stride(0),
        value.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        positions,
        blocks * block_size,
        2 * heads * dim * key_cache.element_size(),
        BLOCK_SIZE=block_size,
        HEADS=heads,
        DIM=dim,
        LIMIT=torch.finfo(key_cache.dtype).max if quantizes else 0.0,
        TILE=min(1024, triton.next_power_of_2(heads * dim)),
        num_warps=4,
    )
