"""The stop rule on the device: for one row behind a confidence, or for the whole batch on its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nwor_vllm.kernels.reference.confidence import Confidence
from nwor_vllm.kernels.state import StopState

HEAD = tl.constexpr(4)  # state.RULE_FIELDS
FIELDS = tl.constexpr(3)  # state.POSITION_FIELDS
RULE_ODDS_MAX = tl.constexpr(12.0)


@triton.jit
def judge(
    row,
    step,
    prob,
    odds,
    live,
    confidence_ptr,
    survival_ptr,
    product_ptr,
    bias_ptr,
    alive_ptr,
    lengths_ptr,
    caps_ptr,
    rule_ptr,
    positions,
):
    """Rows that go on, their gain, and the rows that the rule ended. `row` is a scalar or a vector, `live` its mask."""
    threshold = tl.load(rule_ptr)
    min_survival = tl.load(rule_ptr + 1)
    verify_cost = tl.load(rule_ptr + 2)
    entry = rule_ptr + HEAD + FIELDS * step
    intercept, slope, hazard = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    alive = live & (tl.load(alive_ptr + row, mask=live, other=0) != 0)
    no_distribution = prob != prob
    prob = tl.where(no_distribution, 0.0, prob)
    odds = tl.minimum(tl.maximum(odds, -RULE_ODDS_MAX), RULE_ODDS_MAX)
    odds = tl.where(no_distribution, -RULE_ODDS_MAX, odds)
    logit = intercept + slope * odds + tl.load(bias_ptr + row, mask=live, other=0.0)
    accept = 1.0 / (1.0 + tl.exp(-logit))
    survival = tl.load(survival_ptr + row, mask=live, other=0.0) * accept
    product = tl.load(product_ptr + row, mask=live, other=0.0) * prob
    keep = alive & (prob >= threshold) & (product >= min_survival) & (survival >= verify_cost)
    on = keep & (tl.load(caps_ptr + row, mask=live, other=0) > step + 1)
    tl.store(confidence_ptr + row.to(tl.int64) * positions + step, prob, mask=alive)
    tl.store(survival_ptr + row, survival, mask=alive)
    tl.store(product_ptr + row, product, mask=alive)
    tl.store(lengths_ptr + row, tl.load(lengths_ptr + row, mask=live, other=0) + 1, mask=keep)
    tl.store(alive_ptr + row, on.to(tl.uint8), mask=live)
    following = tl.where(hazard == hazard, hazard, accept)
    gain = tl.where(on, tl.maximum(survival * following - verify_cost, 0.0), 0.0)
    return on, gain, alive & (keep == 0)


@triton.jit
def end_all(rows, step, alive_ptr, stops_ptr, BLOCK: tl.constexpr):
    """The next draft step pays for nobody: whoever is alive keeps its token and stops."""
    ended = tl.zeros((BLOCK,), tl.int64)
    for base in range(0, rows, BLOCK):
        row = base + tl.arange(0, BLOCK)
        inside = row < rows
        ended += (tl.load(alive_ptr + row, mask=inside, other=0) != 0).to(tl.int64)
        tl.store(alive_ptr + row, tl.zeros((BLOCK,), tl.uint8), mask=inside)
    tl.atomic_add(stops_ptr + step, tl.sum(ended, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["rows", "positions"])
def stop_kernel(
    prob_ptr,
    odds_ptr,
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
    positions,
    BLOCK: tl.constexpr,
):
    """One program: batches are at most thousands of rows, and the last clause needs all of them."""
    step = tl.load(step_ptr).to(tl.int32)
    if (step >= 0) & (step < positions):
        gains = tl.zeros((BLOCK,), tl.float32)
        ended = tl.zeros((BLOCK,), tl.int64)
        for base in range(0, rows, BLOCK):
            row = base + tl.arange(0, BLOCK)
            live = row < rows
            prob = tl.load(prob_ptr + row, mask=live, other=0.0)
            odds = tl.load(odds_ptr + row, mask=live, other=0.0)
            _on, gain, stopped = judge(
                row,
                step,
                prob,
                odds,
                live,
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
            gains += gain
            ended += stopped.to(tl.int64)
        tl.atomic_add(stops_ptr + step, tl.sum(ended, axis=0), sem="relaxed")
        draft_cost = tl.load(rule_ptr + 3)
        if (draft_cost > 0.0) & (tl.sum(gains, axis=0) <= draft_cost):
            # Other threads of this program wrote the flags that are read back.
            tl.debug_barrier()
            end_all(rows, step, alive_ptr, stops_ptr, BLOCK)


def state_pointers(state: StopState) -> tuple[torch.Tensor, ...]:
    """In the order of the kernels' arguments. Flags travel as bytes."""
    return (
        state.confidence,
        state.survival,
        state.product,
        state.bias,
        state.alive.view(torch.uint8),
        state.lengths,
        state.caps,
        state.stops,
        state.rule,
    )


def launch(conf: Confidence, state: StopState, step: torch.Tensor) -> None:
    rows, positions = conf.max_prob.shape[0], state.stops.shape[0]
    stop_kernel[(1,)](
        conf.max_prob, conf.log_odds, step, *state_pointers(state), rows, positions, BLOCK=256, num_warps=4
    )
