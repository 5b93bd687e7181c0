"""Residual sampling: one launch a round, rows split over programs, the last program of a row decides the round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nwor_vllm.kernels.dispatch import Workspace, programs_wanted, split, workspace_for
from nwor_vllm.kernels.fused.confidence import SLOTS, WIDTH
from nwor_vllm.kernels.fused.noise import exponential, stream
from nwor_vllm.kernels.fused.sample import best_of
from nwor_vllm.kernels.reference.residual import Residual

BLOCK = 1024


@triton.jit
def _known(x):
    x = x.to(tl.float32)
    return tl.where(x == x, x, 0.0)


@triton.jit
def chain(p_ptr, q_ptr, round_stride, mass_ptr, offs, inside, ROUND: tl.constexpr):
    """r_ROUND at `offs`, from p and the earlier rounds' drafts and masses."""
    rest = _known(tl.load(p_ptr + offs, mask=inside, other=0.0))
    for k in tl.static_range(ROUND):
        over = tl.maximum(rest - _known(tl.load(q_ptr + k * round_stride + offs, mask=inside, other=0.0)), 0.0)
        z = tl.load(mass_ptr + k)
        rest = tl.where(z > 0.0, over / z, rest)
    return rest


@triton.jit(do_not_specialize=["rounds", "pieces", "blocks"])
def residual_kernel(
    target_ptr,
    draft_ptr,
    seeds_ptr,
    positions_ptr,
    limits_ptr,
    candidates_ptr,
    uniforms_ptr,
    token_ptr,
    accepted_ptr,
    mass_ptr,
    partials_ptr,
    arrivals_ptr,
    vocab,
    target_stride,
    draft_stride,
    round_stride,
    rounds,
    pieces,
    blocks,
    ROUND: tl.constexpr,
    DRAFTING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    piece = tl.program_id(1)
    wide = row.to(tl.int64)
    limit = rounds
    if limits_ptr is not None:
        limit = tl.minimum(tl.load(limits_ptr + row), rounds)
    runs = limit > ROUND
    draws = limit == ROUND + 1
    if ROUND == 0:
        draws = limit <= 1
    elif candidates_ptr is not None:
        open_row = tl.load(accepted_ptr + row) < 0
        runs = runs & open_row
        draws = draws & open_row
    if runs | draws:
        p_ptr = target_ptr + wide * target_stride
        q_ptr = draft_ptr + wide * draft_stride
        masses = mass_ptr + wide * rounds
        prefix = stream(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), DRAFTING)
        start = piece * blocks * BLOCK
        zs = tl.zeros((BLOCK,), tl.float32)
        high = tl.zeros((BLOCK,), tl.float32)
        fallback = tl.zeros((BLOCK,), tl.float32)
        drawn = start + tl.arange(0, BLOCK)
        spare = drawn
        for base in range(start, tl.minimum(start + blocks * BLOCK, vocab), BLOCK):
            offs = base + tl.arange(0, BLOCK)
            inside = offs < vocab
            rest = chain(p_ptr, q_ptr, round_stride, masses, offs, inside, ROUND)
            q = _known(tl.load(q_ptr + ROUND * round_stride + offs, mask=inside, other=0.0))
            over = tl.maximum(rest - q, 0.0)
            zs += over
            if draws:
                rate = exponential(prefix, offs)
                drawn = tl.where(over / rate > high, offs, drawn)
                high = tl.maximum(high, over / rate)
                spare = tl.where(rest / rate > fallback, offs, spare)
                fallback = tl.maximum(fallback, rest / rate)
        best, choice = best_of(high, drawn)
        other, spare_choice = best_of(fallback, spare)
        slot = partials_ptr + (wide * WIDTH + piece) * SLOTS
        tl.store(slot, tl.sum(zs, axis=0))
        tl.store(slot + 1, best)
        tl.store(slot + 2, choice.to(tl.float32))
        tl.store(slot + 3, other)
        tl.store(slot + 4, spare_choice.to(tl.float32))
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == pieces - 1:
            tl.debug_barrier()
            tl.store(arrivals_ptr + row, 0)
            pick = tl.arange(0, WIDTH)
            there = pick < pieces
            every = partials_ptr + (wide * WIDTH + pick) * SLOTS
            z = tl.sum(tl.load(every, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
            highs = tl.load(every + 1, mask=there, other=0.0, cache_modifier=".cg")
            choices = tl.load(every + 2, mask=there, other=2147483520.0, cache_modifier=".cg").to(tl.int32)
            others = tl.load(every + 3, mask=there, other=0.0, cache_modifier=".cg")
            spares = tl.load(every + 4, mask=there, other=2147483520.0, cache_modifier=".cg").to(tl.int32)
            best, choice = best_of(highs, choices)
            other, spare_choice = best_of(others, spares)
            if (z > 0.0) & runs:
                other = best
                spare_choice = choice
            token = tl.where(other > 0.0, spare_choice, -1).to(tl.int64)
            taken = False
            if runs:
                tl.store(masses + ROUND, z)
                if candidates_ptr is not None:
                    x = tl.load(candidates_ptr + wide * rounds + ROUND)
                    real = (x >= 0) & (x < vocab)
                    rest_x = chain(p_ptr, q_ptr, round_stride, masses, x, real, ROUND)
                    q_x = _known(tl.load(q_ptr + ROUND * round_stride + x, mask=real, other=0.0))
                    taken = tl.load(uniforms_ptr + wide * rounds + ROUND) * q_x < rest_x
                    if taken:
                        token = x
                        tl.store(accepted_ptr + row, ROUND)
            if draws | taken:
                tl.store(token_ptr + row, token)


def launch(
    target: torch.Tensor,
    draft: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rounds: torch.Tensor | None,
    candidates: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    drafting: bool,
    workspace: Workspace | None,
) -> Residual:
    rows, total, vocab = draft.shape
    result = Residual(
        torch.empty(rows, dtype=torch.int64, device=target.device),
        torch.full((rows,), -1, dtype=torch.int32, device=target.device),
        torch.full((rows, total), torch.nan, dtype=torch.float32, device=target.device),
    )
    pieces, blocks = split(rows, vocab, BLOCK, programs_wanted(target.device))
    space = workspace.fit(rows, target) if workspace else workspace_for(target, rows)
    for k in range(total):
        residual_kernel[(rows, pieces)](
            target,
            draft,
            seeds,
            positions,
            rounds,
            candidates,
            uniforms,
            result.token,
            result.accepted,
            result.mass,
            space.partials,
            space.arrivals,
            vocab,
            target.stride(0),
            draft.stride(0),
            draft.stride(1),
            total,
            pieces,
            blocks,
            ROUND=k,
            DRAFTING=drafting,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return result
