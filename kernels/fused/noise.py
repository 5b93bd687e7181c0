"""reference/noise.py on the device."""

from __future__ import annotations

import triton
import triton.language as tl

DRAFT_SALT = tl.constexpr(1 << 30)


@triton.jit
def _rotate(x, BY: tl.constexpr):
    return (x << BY) | (x >> (32 - BY))


@triton.jit
def _mix(h, word):
    word = _rotate(word * 0xCC9E2D51, 15)
    h = _rotate(h ^ (word * 0x1B873593), 13)
    return h * 5 + 0xE6546B64


@triton.jit
def stream(seed, position, DRAFTING: tl.constexpr):
    """What (seed, position) contribute to every token's hash."""
    seed = seed.to(tl.int64)
    place = position.to(tl.int64)
    if DRAFTING:
        place += DRAFT_SALT
    h = (seed ^ seed).to(tl.uint32)
    h = _mix(h, (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(h, (place & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def exponential(prefix, token):
    h = _mix(prefix, token.to(tl.uint32)) ^ 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    high = (h >> 16).to(tl.int32).to(tl.float32)
    low = (h & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    tail = 1.0 / 7.0 + u * (1.0 / 8.0)
    tail = 1.0 / 6.0 + u * tail
    tail = 1.0 / 5.0 + u * tail
    tail = 1.0 / 4.0 + u * tail
    tail = 1.0 / 3.0 + u * tail
    tail = 1.0 / 2.0 + u * tail
    tail = 1.0 + u * tail
    return tl.where(u < 0.25, u * tail, -tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08)))
