"""Confidence, and confidence + stop, in one launch: rows are split over programs; a row's last program joins them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nwor_vllm.kernels.dispatch import MAX_SPLITS, Workspace, programs_wanted, split, workspace_for
from nwor_vllm.kernels.fused.row import LN2, LOG2E, join_slices, row_scale, scan, statistics
from nwor_vllm.kernels.fused.stop import end_all, judge, state_pointers
from nwor_vllm.kernels.reference.confidence import Confidence
from nwor_vllm.kernels.state import StopState

LANES = 512
WARPS = 8
SLOTS = tl.constexpr(8)  # Workspace.FIELDS
WIDTH = tl.constexpr(MAX_SPLITS)


@triton.jit
def hand_in(partials_ptr, arrivals_ptr, row, piece, pieces, top, token, total, runner_up, excess, scale):
    """Leave this program's slice behind. (whether it came last, and then what all slices of the row join to)."""
    slot = partials_ptr + (row.to(tl.int64) * WIDTH + piece) * SLOTS
    tl.store(slot, top)
    tl.store(slot + 1, token.to(tl.float32))
    tl.store(slot + 2, total)
    tl.store(slot + 3, runner_up)
    tl.store(slot + 4, excess)
    # Every thread's stores come before the arrival, which releases them; the last arrival acquires all of them.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == pieces - 1
    if last:
        tl.debug_barrier()
        tl.store(arrivals_ptr + row, 0)
        pick = tl.arange(0, WIDTH)
        there = pick < pieces
        every = partials_ptr + (row.to(tl.int64) * WIDTH + pick) * SLOTS
        ninf = float("-inf")
        tops = tl.load(every, mask=there, other=ninf, cache_modifier=".cg")
        tokens = tl.load(every + 1, mask=there, other=2147483520.0, cache_modifier=".cg").to(tl.int32)
        totals = tl.load(every + 2, mask=there, other=0.0, cache_modifier=".cg")
        seconds = tl.load(every + 3, mask=there, other=ninf, cache_modifier=".cg")
        excesses = tl.load(every + 4, mask=there, other=0.0, cache_modifier=".cg")
        top, token, total, runner_up, excess = join_slices(tops, tokens, totals, seconds, excesses, scale)
    return last, top, token, total, runner_up, excess


@triton.jit
def settle(
    row,
    rows,
    prob,
    odds,
    step_ptr,
    confidence_ptr,
    survival_ptr,
    product_ptr,
    bias_ptr,
    alive_ptr,
    lengths_ptr,
    caps_ptr,
    stops_ptr,
    rule_ptr,
    positions,
    partials_ptr,
    arrivals_ptr,
):
    """The stop rule behind this row's confidence; the last row of the batch judges the next draft step."""
    step = tl.load(step_ptr).to(tl.int32)
    if (step >= 0) & (step < positions):
        _on, gain, stopped = judge(
            row,
            step,
            prob,
            odds,
            row >= 0,
            confidence_ptr,
            survival_ptr,
            product_ptr,
            bias_ptr,
            alive_ptr,
            lengths_ptr,
            caps_ptr,
            rule_ptr,
            positions,
        )
        tl.atomic_add(stops_ptr + step, stopped.to(tl.int64), mask=stopped, sem="relaxed")
        draft_cost = tl.load(rule_ptr + 3)
        if draft_cost > 0.0:
            tl.store(partials_ptr + row.to(tl.int64) * WIDTH * SLOTS + 5, gain)
            tl.debug_barrier()
            if tl.atomic_add(arrivals_ptr + rows, 1, sem="acq_rel") == rows - 1:
                tl.debug_barrier()
                tl.store(arrivals_ptr + rows, 0)
                gains = tl.zeros((256,), tl.float32)
                for base in range(0, rows, 256):
                    each = base + tl.arange(0, 256)
                    slot = partials_ptr + each.to(tl.int64) * WIDTH * SLOTS + 5
                    gains += tl.load(slot, mask=each < rows, other=0.0, cache_modifier=".cg")
                if tl.sum(gains, axis=0) <= draft_cost:
                    end_all(rows, step, alive_ptr, stops_ptr, 256)


@triton.jit(do_not_specialize=["rows", "pieces", "blocks", "vocab_start", "positions"])
def confidence_kernel(
    logits_ptr,
    mask_ptr,
    temp_ptr,
    token_ptr,
    prob_ptr,
    odds_ptr,
    margin_ptr,
    entropy_ptr,
    shard_ptr,
    partials_ptr,
    arrivals_ptr,
    step_ptr,
    confidence_ptr,
    survival_ptr,
    product_ptr,
    bias_ptr,
    alive_ptr,
    lengths_ptr,
    caps_ptr,
    stops_ptr,
    rule_ptr,
    rows,
    vocab,
    vocab_start,
    row_stride,
    stride,
    mask_row_stride,
    mask_stride,
    pieces,
    blocks,
    positions,
    LANES: tl.constexpr,
    PER: tl.constexpr,
    SPLIT: tl.constexpr,
    STOP: tl.constexpr,
):
    row = tl.program_id(0)
    piece = tl.program_id(1)
    scale = row_scale(temp_ptr, row)
    # In whole blocks, so that the compiler knows the alignment: 128-bit loads depend on it.
    start = piece * blocks * (LANES * PER)
    end = tl.minimum(start + blocks * (LANES * PER), vocab)
    wide = row.to(tl.int64)
    row_mask = mask_ptr
    if mask_ptr is not None:
        row_mask = mask_ptr + wide * mask_row_stride
    SHARD: tl.constexpr = shard_ptr is not None
    top, token, total, runner_up, excess = scan(
        logits_ptr + wide * row_stride,
        row_mask,
        stride,
        mask_stride,
        start,
        end,
        vocab,
        scale,
        LANES,
        PER,
        SHARD or (margin_ptr is not None),
        SHARD or (entropy_ptr is not None),
    )
    last = True
    if SPLIT:
        last, top, token, total, runner_up, excess = hand_in(
            partials_ptr, arrivals_ptr, row, piece, pieces, top, token, total, runner_up, excess, scale
        )
    if last:
        if SHARD:
            slot = shard_ptr + wide * 5
            tl.store(slot, top)
            tl.store(slot + 1, (token + vocab_start).to(tl.float32))
            tl.store(slot + 2, total)
            tl.store(slot + 3, runner_up)
            tl.store(slot + 4, excess * LN2)
        else:
            prob, odds, margin, entropy = statistics(top, total, runner_up, excess, scale)
            tl.store(token_ptr + row, token.to(tl.int64))
            tl.store(prob_ptr + row, prob)
            tl.store(odds_ptr + row, odds)
            if margin_ptr is not None:
                tl.store(margin_ptr + row, margin)
            if entropy_ptr is not None:
                tl.store(entropy_ptr + row, entropy)
            if STOP:
                settle(
                    row,
                    rows,
                    prob,
                    odds,
                    step_ptr,
                    confidence_ptr,
                    survival_ptr,
                    product_ptr,
                    bias_ptr,
                    alive_ptr,
                    lengths_ptr,
                    caps_ptr,
                    stops_ptr,
                    rule_ptr,
                    positions,
                    partials_ptr,
                    arrivals_ptr,
                )


@triton.jit(do_not_specialize=["shards", "rows"])
def combine_kernel(
    shards_ptr,
    temp_ptr,
    token_ptr,
    prob_ptr,
    odds_ptr,
    margin_ptr,
    entropy_ptr,
    shards,
    rows,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    scale = row_scale(temp_ptr, row)
    pick = tl.arange(0, WIDTH)
    there = pick < shards
    every = shards_ptr + (pick.to(tl.int64) * rows + row) * 5
    tops = tl.load(every, mask=there, other=float("-inf"))
    tokens = tl.load(every + 1, mask=there, other=2147483520.0).to(tl.int32)
    totals = tl.load(every + 2, mask=there, other=0.0)
    seconds = tl.load(every + 3, mask=there, other=float("-inf"))
    excesses = tl.load(every + 4, mask=there, other=0.0) * LOG2E
    top, token, total, runner_up, excess = join_slices(tops, tokens, totals, seconds, excesses, scale)
    prob, odds, margin, entropy = statistics(top, total, runner_up, excess, scale)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(prob_ptr + row, prob)
    tl.store(odds_ptr + row, odds)
    if margin_ptr is not None:
        tl.store(margin_ptr + row, margin)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


def per_lane(logits: torch.Tensor) -> int:
    """Entries of one 128-bit load."""
    return 16 // logits.element_size()


def launch(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    mask: torch.Tensor | None,
    out: Confidence,
    workspace: Workspace | None,
    state: StopState | None = None,
    step: torch.Tensor | None = None,
) -> None:
    buffers = (out.token, out.max_prob, out.log_odds, out.margin, out.entropy, None)
    _run(logits, temperature, mask, buffers, 0, workspace, state, step)


def launch_partial(
    logits: torch.Tensor,
    vocab_start: int,
    temperature: torch.Tensor | None,
    mask: torch.Tensor | None,
    workspace: Workspace | None,
) -> torch.Tensor:
    shard = torch.empty(logits.shape[0], 5, dtype=torch.float32, device=logits.device)
    _run(logits, temperature, mask, (None, None, None, None, None, shard), vocab_start, workspace, None, None)
    return shard


def launch_combine(parts: torch.Tensor, temperature: torch.Tensor | None, out: Confidence) -> None:
    shards, rows, _ = parts.shape
    combine_kernel[(rows,)](
        parts.contiguous(),
        temperature,
        out.token,
        out.max_prob,
        out.log_odds,
        out.margin,
        out.entropy,
        shards,
        rows,
        WIDTH=triton.next_power_of_2(shards),
        num_warps=1,
    )


def _run(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    mask: torch.Tensor | None,
    buffers: tuple[torch.Tensor | None, ...],
    vocab_start: int,
    workspace: Workspace | None,
    state: StopState | None,
    step: torch.Tensor | None,
) -> None:
    rows, vocab = logits.shape
    per = per_lane(logits)
    pieces, blocks = split(rows, vocab, LANES * per, programs_wanted(logits.device))
    space = workspace.fit(rows, logits) if workspace else workspace_for(logits, rows)
    confidence_kernel[(rows, pieces)](
        logits,
        None if mask is None else mask.view(torch.uint8),
        temperature,
        *buffers,
        space.partials,
        space.arrivals,
        step,
        *(state_pointers(state) if state else (None,) * 9),
        rows,
        vocab,
        vocab_start,
        logits.stride(0),
        logits.stride(1),
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(1),
        pieces,
        blocks,
        state.stops.shape[0] if state else 0,
        LANES=LANES,
        PER=per,
        SPLIT=pieces > 1,
        STOP=state is not None,
        num_warps=WARPS,
    )
