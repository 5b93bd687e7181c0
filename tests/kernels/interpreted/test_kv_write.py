from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.kernels import commit_kv, masked_kv_write

CANARY = 0xA5


@dataclass
class Cache:
    raw: torch.Tensor  # the bytes, with a border around the cache
    view: torch.Tensor  # [blocks, block_size, heads, dim]


def cache(dtype: torch.dtype, blocks: int, block_size: int, heads: int, dim: int, hnd: bool) -> Cache:
    size = blocks * block_size * heads * dim * dtype.itemsize
    raw = torch.full((size + 128,), CANARY, dtype=torch.uint8)
    inside = raw[64 : 64 + size].view(dtype)
    if hnd:
        return Cache(raw, inside.view(blocks, heads, block_size, dim).permute(0, 2, 1, 3))
    return Cache(raw, inside.view(blocks, block_size, heads, dim))


def rows_for(dtype: torch.dtype, to: torch.dtype, shape: tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    """For fp8, values it holds exactly: the interpreter's own fp8 rounding is not the hardware's."""
    if to in (torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.randint(-7, 8, shape, generator=gen).to(dtype)
    return torch.randn(shape, generator=gen).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([8, 20, 64]),
    st.sampled_from([16, 24, 32, 64, 128]),
    st.booleans(),
    st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.float8_e4m3fn),
            (torch.float32, torch.float8_e5m2),
        ]
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_equals_the_twin_and_touches_nothing_else(
    tokens: int,
    heads: int,
    dim: int,
    block_size: int,
    hnd: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    fused_qkv: bool,
    some_dead: bool,
    seed: int,
) -> None:
    gen = torch.Generator().manual_seed(seed)
    blocks = 2
    rows = rows_for(*dtypes, (tokens, 3, heads, dim), gen)
    key, value = (rows[:, 1], rows[:, 2]) if fused_qkv else (rows[:, 1].contiguous(), rows[:, 2].contiguous())
    slots = torch.randperm(blocks * block_size, generator=gen)[:tokens]
    slots[torch.rand(tokens, generator=gen) < 0.3] = -1
    if some_dead:
        slots[0] = blocks * block_size  # outside the cache
    alive = torch.rand(tokens, generator=gen) < 0.6 if some_dead else None
    scale = torch.tensor([0.5])
    results = []
    for backend in ("reference", "triton"):
        k, v = (cache(dtypes[1], blocks, block_size, heads, dim, hnd) for _ in range(2))
        counters = torch.zeros(2, dtype=torch.int64)
        masked_kv_write(
            key,
            value,
            k.view,
            v.view,
            slots,
            alive=alive,
            k_scale=scale,
            v_scale=scale,
            counters=counters,
            backend=backend,
        )
        results.append((k, v, counters))
    (k, v, counters), (k2, v2, counters2) = results
    assert torch.equal(k.raw, k2.raw) and torch.equal(v.raw, v2.raw)
    assert torch.equal(counters, counters2)

    live = (slots >= 0) & (slots < blocks * block_size) & (True if alive is None else alive)
    row_bytes = 2 * heads * dim * dtypes[1].itemsize
    assert counters.tolist() == [int(live.sum()) * row_bytes, int((~live).sum()) * row_bytes]
    # The canary: put it back where live rows were written, and the whole allocation must be as it began.
    for which in (k2, v2):
        slot = slots[live]
        which.view[slot // block_size, slot % block_size] = (
            torch.full((1,), CANARY, dtype=torch.uint8).expand(dtypes[1].itemsize).contiguous().view(dtypes[1])
        )
        assert bool((which.raw == CANARY).all())


def test_a_write_past_the_mask_would_be_seen() -> None:
    """The canary's negative control: the same write without the mask changes bytes that must stay."""
    key = torch.randn(2, 1, 8)
    k, v = (cache(torch.float32, 1, 16, 1, 8, False) for _ in range(2))
    masked_kv_write(key, key, k.view, v.view, torch.tensor([3, 5]), backend="triton")
    k.view[0, 3] = torch.full((4,), CANARY, dtype=torch.uint8).view(torch.float32)
    assert not bool((k.raw == CANARY).all())


@pytest.mark.parametrize("hnd", [False, True])
def test_commit_writes_the_accepted_prefix(hnd: bool) -> None:
    gen = torch.Generator().manual_seed(3)
    staged_k, staged_v = (torch.randn(4, 3, 2, 16, generator=gen).bfloat16() for _ in range(2))
    slots = torch.randperm(64, generator=gen)[:12].view(4, 3)
    accepted = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    results = []
    for backend in ("reference", "triton"):
        k, v = (cache(torch.bfloat16, 4, 16, 2, 16, hnd) for _ in range(2))
        counters = torch.zeros(2, dtype=torch.int64)
        commit_kv(staged_k, staged_v, k.view, v.view, slots, accepted, counters=counters, backend=backend)
        results.append((k, v, counters))
    (k, v, counters), (k2, v2, counters2) = results
    assert torch.equal(k.raw, k2.raw) and torch.equal(v.raw, v2.raw)
    assert counters.tolist() == counters2.tolist() == [6 * 128, 6 * 128]
    slot = int(slots[2, 1])
    assert torch.equal(k2.view[slot // 16, slot % 16], staged_k[2, 1])
