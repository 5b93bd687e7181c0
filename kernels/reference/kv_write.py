"""Paged K/V writes in which dead rows write nothing, in plain torch."""

from __future__ import annotations

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    live: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    counters: torch.Tensor | None,
) -> None:
    """Rows go where their slot says: block = slot // block size. `live` is False for rows that must not write."""
    blocks, block_size = key_cache.shape[:2]
    live = live & (slots >= 0) & (slots < blocks * block_size)
    block, offset = slots[live] // block_size, slots[live] % block_size
    for source, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache[block, offset] = convert(source[live], cache.dtype, scale)
    if counters is not None:
        row_bytes = (key[0].numel() + value[0].numel()) * key_cache.element_size()
        counters += torch.stack((live.sum(), (~live).sum())) * row_bytes


def convert(rows: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """fp8 saturates: torch's own cast would turn an overflow into NaN, the hardware's does not."""
    if dtype not in FP8 or rows.dtype == dtype:
        return rows.to(dtype)
    limit = torch.finfo(dtype).max
    return (rows.float() / (1.0 if scale is None else scale)).clamp(-limit, limit).to(dtype)
