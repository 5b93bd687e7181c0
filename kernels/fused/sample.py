"""Gumbel-max sampling folded into the confidence pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nwor_vllm.kernels.dispatch import Workspace, programs_wanted, split, workspace_for
from nwor_vllm.kernels.fused.confidence import LANES, SLOTS, WARPS, WIDTH, hand_in, per_lane
from nwor_vllm.kernels.fused.noise import exponential, stream
from nwor_vllm.kernels.fused.row import NO_TOKEN, first_nan, fold, join, load_tile, row_scale, statistics
from nwor_vllm.kernels.reference.confidence import Confidence


@triton.jit
def best_of(score, at):
    """The highest score; equal ones go to the lowest token."""
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(score == best, at, NO_TOKEN), axis=0)


@triton.jit(do_not_specialize=["pieces", "blocks"])
def sample_kernel(
    logits_ptr,
    mask_ptr,
    seeds_ptr,
    positions_ptr,
    temp_ptr,
    sampled_ptr,
    token_ptr,
    prob_ptr,
    odds_ptr,
    margin_ptr,
    entropy_ptr,
    partials_ptr,
    arrivals_ptr,
    vocab,
    row_stride,
    stride,
    mask_row_stride,
    mask_stride,
    pieces,
    blocks,
    DRAFTING: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0)
    piece = tl.program_id(1)
    wide = row.to(tl.int64)
    scale = row_scale(temp_ptr, row)
    temp = tl.load(temp_ptr + row)
    prefix = stream(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), DRAFTING)
    row_ptr = logits_ptr + wide * row_stride
    row_mask = mask_ptr
    if mask_ptr is not None:
        row_mask = mask_ptr + wide * mask_row_stride
    start = piece * blocks * (LANES * PER)
    end = tl.minimum(start + blocks * (LANES * PER), vocab)
    lanes = tl.arange(0, LANES)
    cols = tl.arange(0, PER)[None, :]
    top = tl.full((LANES,), float("-inf"), tl.float32)
    at = start + lanes * PER
    others = tl.zeros((LANES,), tl.float32)
    second = top
    bits_sum = others
    high = top
    drawn = at
    for base in range(start, end, LANES * PER):
        at_tile = base + lanes * PER
        offs = at_tile[:, None] + cols
        x = load_tile(row_ptr, row_mask, offs, stride, mask_stride, vocab)
        top, at, others, second, bits_sum = fold(
            x,
            cols,
            at_tile,
            scale,
            top,
            at,
            others,
            second,
            bits_sum,
            PER,
            margin_ptr is not None,
            entropy_ptr is not None,
        )
        if temp != 0.0:
            x = x / temp - tl.log(exponential(prefix, offs))
        tile_high = tl.max(x, axis=1)
        first = tl.min(tl.where(x == tile_high[:, None], cols, PER), axis=1)
        drawn = tl.where(tile_high > high, at_tile + first, drawn)
        high = tl.maximum(high, tile_high)
    top, token, total, runner_up, excess = join(top, at, others, second, bits_sum, scale)
    best, choice = best_of(high, drawn)
    if total != total:
        nan_at = first_nan(row_ptr, row_mask, stride, mask_stride, start, end, vocab, LANES, PER)
        if nan_at != NO_TOKEN:
            top = float("nan")
            token = nan_at
    last = True
    if SPLIT:
        slot = partials_ptr + (wide * WIDTH + piece) * SLOTS
        tl.store(slot + 5, best)
        tl.store(slot + 6, choice.to(tl.float32))
        last, top, token, total, runner_up, excess = hand_in(
            partials_ptr, arrivals_ptr, row, piece, pieces, top, token, total, runner_up, excess, scale
        )
    if last:
        if SPLIT:
            pick = tl.arange(0, WIDTH)
            every = partials_ptr + (wide * WIDTH + pick) * SLOTS
            scores = tl.load(every + 5, mask=pick < pieces, other=float("-inf"), cache_modifier=".cg")
            choices = tl.load(every + 6, mask=pick < pieces, other=2147483520.0, cache_modifier=".cg").to(tl.int32)
            best, choice = best_of(scores, choices)
        if top != top:
            choice = token
        prob, odds, margin, entropy = statistics(top, total, runner_up, excess, scale)
        tl.store(sampled_ptr + row, choice.to(tl.int64))
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(prob_ptr + row, prob)
        tl.store(odds_ptr + row, odds)
        if margin_ptr is not None:
            tl.store(margin_ptr + row, margin)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)


def launch(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    drafting: bool,
    sampled: torch.Tensor,
    out: Confidence,
    workspace: Workspace | None,
) -> None:
    rows, vocab = logits.shape
    per = per_lane(logits)
    pieces, blocks = split(rows, vocab, LANES * per, programs_wanted(logits.device))
    space = workspace.fit(rows, logits) if workspace else workspace_for(logits, rows)
    sample_kernel[(rows, pieces)](
        logits,
        None if mask is None else mask.view(torch.uint8),
        seeds,
        positions,
        temperature,
        sampled,
        out.token,
        out.max_prob,
        out.log_odds,
        out.margin,
        out.entropy,
        space.partials,
        space.arrivals,
        vocab,
        logits.stride(0),
        logits.stride(1),
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(1),
        pieces,
        blocks,
        DRAFTING=drafting,
        LANES=LANES,
        PER=per,
        SPLIT=pieces > 1,
        num_warps=WARPS,
    )
