"""Device code that every logits kernel shares: one pass over a row's slice, and what joins slices.

A tile is [LANES, PER], PER entries of one thread each (128 bits), so that every lane keeps its own running maximum and
no thread waits for another inside the loop. The first largest entry never enters a sum: see reference/confidence.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ODDS_MAX = tl.constexpr(80.0)
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def row_scale(temp_ptr, row):
    """log2(e) / T; temperature 0 counts as 1."""
    scale = tl.full((), LOG2E, tl.float32)
    if temp_ptr is not None:
        t = tl.load(temp_ptr + row)
        scale = scale / tl.where(t == 0.0, 1.0, t)
    return scale


@triton.jit
def load_tile(row_ptr, mask_ptr, offs, stride, mask_stride, vocab):
    inside = offs < vocab
    x = tl.load(row_ptr + offs * stride, mask=inside, other=float("-inf")).to(tl.float32)
    if mask_ptr is not None:
        allowed = tl.load(mask_ptr + offs * mask_stride, mask=inside, other=0)
        x = tl.where(allowed != 0, x, float("-inf"))
    return x


@triton.jit
def weigh(gap, scale):
    """(exponent in bits, its power of two); -inf counts as an exponent of 0 wherever its power is 0."""
    bits = gap * scale
    power = tl.exp2(bits)
    return tl.where(power > 0.0, bits, 0.0), power


@triton.jit
def fold(
    x,
    cols,
    at_tile,
    scale,
    top,
    at,
    others,
    second,
    bits_sum,
    PER: tl.constexpr,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """A tile into the lanes' running (top, at, others, second, sum of bits * power)."""
    tile_top = tl.max(x, axis=1)
    first = tl.min(tl.where(x == tile_top[:, None], cols, PER), axis=1)
    is_first = cols == first[:, None]
    wins = tile_top > top
    new_top = tl.maximum(top, tile_top)
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    bits = (x - origin[:, None]) * scale
    power = tl.where(is_first, 0.0, tl.exp2(bits))
    old_bits, old_power = weigh(top - origin, scale)
    tile_bits, tile_power = weigh(tile_top - origin, scale)
    if ENTROPY:
        kept = tl.sum(tl.where(power > 0.0, bits * power, 0.0), axis=1)
        bits_sum = old_power * (bits_sum + old_bits * others) + kept
        bits_sum += tl.where(wins, old_bits * old_power, tile_bits * tile_power)
    others = others * old_power + tl.sum(power, axis=1) + tl.where(wins, old_power, tile_power)
    if MARGIN:
        tile_second = tl.max(tl.where(is_first, float("-inf"), x), axis=1)
        second = tl.where(wins, tl.maximum(top, tile_second), tl.maximum(second, tile_top))
    at = tl.where(wins, at_tile + first, at)
    return new_top, at, others, second, bits_sum


@triton.jit
def join(top, at, others, second, bits_sum, scale):
    """A vector of (top, at, others, second, bits_sum), each over its own entries, into one. NaN tops are left out."""
    known = tl.where(top == top, top, float("-inf"))
    best = tl.max(known, axis=0)
    token = tl.min(tl.where(known == best, at, NO_TOKEN), axis=0)
    winner = (known == best) & (at == token)
    bits, power = weigh(known - tl.where(best == float("-inf"), 0.0, best), scale)
    count = others + tl.where(winner, 0.0, 1.0)
    total = tl.sum(power * count, axis=0)
    excess = tl.sum(power * (bits_sum + bits * count), axis=0)
    runner_up = tl.max(tl.where(winner, second, known), axis=0)
    return best, token, total, runner_up, excess


@triton.jit
def first_nan(
    row_ptr,
    mask_ptr,
    stride,
    mask_stride,
    start,
    stop,
    vocab,
    LANES: tl.constexpr,
    PER: tl.constexpr,
):
    """Rescans a slice whose sum came out NaN: rare, so the hot loop does not look for NaN."""
    inner = tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]
    found = tl.full((LANES, PER), NO_TOKEN, tl.int32)
    for base in range(start, stop, LANES * PER):
        offs = base + inner
        x = load_tile(row_ptr, mask_ptr, offs, stride, mask_stride, vocab)
        found = tl.minimum(found, tl.where(x != x, offs, NO_TOKEN))
    return tl.min(tl.min(found, axis=1), axis=0)


@triton.jit
def scan(
    row_ptr,
    mask_ptr,
    stride,
    mask_stride,
    start,
    stop,
    vocab,
    scale,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """One slice: (top, token, others, second, bits_sum). A NaN in it makes top NaN and token its place."""
    lanes = tl.arange(0, LANES)
    cols = tl.arange(0, PER)[None, :]
    top = tl.full((LANES,), float("-inf"), tl.float32)
    at = start + lanes * PER
    others = tl.zeros((LANES,), tl.float32)
    second = tl.full((LANES,), float("-inf"), tl.float32)
    bits_sum = tl.zeros((LANES,), tl.float32)
    for base in range(start, stop, LANES * PER):
        at_tile = base + lanes * PER
        x = load_tile(row_ptr, mask_ptr, at_tile[:, None] + cols, stride, mask_stride, vocab)
        top, at, others, second, bits_sum = fold(
            x, cols, at_tile, scale, top, at, others, second, bits_sum, PER, MARGIN, ENTROPY
        )
    top, token, total, runner_up, excess = join(top, at, others, second, bits_sum, scale)
    if total != total:
        nan_at = first_nan(row_ptr, mask_ptr, stride, mask_stride, start, stop, vocab, LANES, PER)
        if nan_at != NO_TOKEN:
            top = float("nan")
            token = nan_at
    return top, token, total, runner_up, excess


@triton.jit
def join_slices(top, at, others, second, bits_sum, scale):
    """`join` over slices or shards: a NaN anywhere decides the token and the validity of the row."""
    broken = tl.min(tl.where(top != top, at, NO_TOKEN), axis=0)
    best, token, total, runner_up, excess = join(top, at, others, second, bits_sum, scale)
    if broken != NO_TOKEN:
        best = float("nan")
        token = broken
    return best, token, total, runner_up, excess


@triton.jit
def statistics(top, total, runner_up, excess, scale):
    """(max probability, log-odds, margin, entropy); NaN where the row has no distribution."""
    valid = (top > float("-inf")) & (top < float("inf")) & (total == total)
    nan = float("nan")
    prob = tl.where(valid, 1.0 / (1.0 + total), nan)
    odds = tl.minimum(tl.maximum(-tl.log(tl.maximum(total, 1e-37)), -ODDS_MAX), ODDS_MAX)
    odds = tl.where(valid, odds, nan)
    margin = prob * (1.0 - tl.exp2((runner_up - top) * scale))
    # log1p keeps what a sure row still has: below 2**-12 the sum itself is its logarithm to fp32's precision.
    log_sum = tl.where(total < 2.44140625e-4, total - 0.5 * total * total, tl.log(1.0 + total))
    entropy = log_sum - LN2 * excess * prob
    return prob, odds, margin, entropy
