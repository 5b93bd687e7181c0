"""K/V of the draft layer into the paged cache: only what may still be read; and staged K/V committed once accepted."""

from __future__ import annotations

import torch

import nwor_vllm.kernels.reference.kv_write as twin
from nwor_vllm.kernels.dispatch import (
    FLOATS,
    Backend,
    check_buffer,
    check_device,
    check_dtype,
    check_shape,
    choose,
    refuse,
)
from nwor_vllm.kernels.reference.kv_write import FP8

__all__ = ["commit_kv", "masked_kv_write"]


def masked_kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    alive: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Row t of key and value [tokens, heads, dim] into slot `slot_mapping[t]` of the caches, where `alive[t]`.

    The caches are [blocks, block_size, heads, dim] by shape, in any memory order whose last dimension is dense: NHD as
    it is, HND as a permuted view. Same dtype as the rows, or fp8 with one-element scales. Slots outside the cache
    (padding is -1) write nothing. `counters` int64 [2] gains the bytes written and the bytes avoided.
    """
    _check_rows(key, value, key_cache, value_cache, k_scale, v_scale, counters)
    tokens = key.shape[0]
    check_buffer("slot_mapping", slot_mapping, torch.int64, (tokens,), key)
    if alive is not None:
        check_buffer("alive", alive, torch.bool, (tokens,), key)
    if tokens == 0:
        return
    if choose(key, backend) == "triton":
        from nwor_vllm.kernels.fused.kv_write import launch

        flags = None if alive is None else alive.view(torch.uint8)
        launch(key, value, key_cache, value_cache, slot_mapping, flags, None, 1, k_scale, v_scale, counters)
        return
    live = torch.ones_like(slot_mapping, dtype=torch.bool) if alive is None else alive
    twin.write(key, value, key_cache, value_cache, slot_mapping, live, k_scale, v_scale, counters)


def commit_kv(
    staged_key: torch.Tensor,
    staged_value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    accepted: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """The first `accepted[r]` of request r's staged rows [requests, positions, heads, dim] into its slots.

    Stage-and-commit, for comparison with plain writes: every accepted row is written twice and read once.
    """
    if staged_key.dim() != 4:
        refuse("staged_key", f"shape {tuple(staged_key.shape)}", "shape (requests, positions, heads, dim)")
    check_shape("staged_value", staged_value, staged_key.shape)
    requests, positions = staged_key.shape[:2]
    for name, staged in (("staged_key", staged_key), ("staged_value", staged_value)):
        if not staged.is_contiguous():
            refuse(name, f"strides {staged.stride()}", "a contiguous tensor")
    check_buffer("slot_mapping", slot_mapping, torch.int64, (requests, positions), staged_key)
    check_buffer("accepted", accepted, torch.int32, (requests,), staged_key)
    key, value = staged_key.flatten(0, 1), staged_value.flatten(0, 1)
    _check_rows(key, value, key_cache, value_cache, k_scale, v_scale, counters)
    if key.shape[0] == 0:
        return
    slots = slot_mapping.view(-1)
    if choose(key, backend) == "triton":
        from nwor_vllm.kernels.fused.kv_write import launch

        launch(key, value, key_cache, value_cache, slots, None, accepted, positions, k_scale, v_scale, counters)
        return
    live = (torch.arange(positions, device=key.device)[None, :] < accepted[:, None]).view(-1)
    twin.write(key, value, key_cache, value_cache, slots, live, k_scale, v_scale, counters)


def _check_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    counters: torch.Tensor | None,
) -> None:
    check_dtype("key", key, (*FLOATS, *FP8))
    if key.dim() != 3 or 0 in key.shape[1:]:
        refuse("key", f"shape {tuple(key.shape)}", "shape (tokens, heads, dim) with heads and dim of 1 or more")
    check_dtype("value", value, (key.dtype,))
    check_shape("value", value, key.shape)
    check_device("value", value, key.device)
    check_dtype("key_cache", key_cache, (key.dtype, *FP8))
    if key_cache.dim() != 4 or key_cache.shape[1] == 0:
        refuse("key_cache", f"shape {tuple(key_cache.shape)}", "shape (blocks, block_size, heads, dim)")
    check_shape("key_cache", key_cache, (*key_cache.shape[:2], *key.shape[1:]))
    check_dtype("value_cache", value_cache, (key_cache.dtype,))
    check_shape("value_cache", value_cache, key_cache.shape)
    for name, tensor in (("key", key), ("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_device(name, tensor, key.device)
        if tensor.stride(-1) != 1:
            refuse(name, f"strides {tensor.stride()}", "a dense last dimension (stride 1)")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if key_cache.dtype in FP8 and key.dtype not in FP8:
            if scale is None:
                refuse(name, None, f"a one-element tensor, because key_cache is {key_cache.dtype}")
            check_buffer(name, scale, torch.float32, scale.shape if scale.numel() == 1 else (1,), key)
    if counters is not None:
        check_buffer("counters", counters, torch.int64, (2,), key)
