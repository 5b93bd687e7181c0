"""The stop rule (`nwor_vllm.policy.base.StopRule` states it) at one draft position of every row, in plain torch.

`policy.stop.evaluate` judges a recorded round; this judges a position while the round runs, in place, on the device.
Only the draft distribution is judged, never the token drawn from it.
"""

from __future__ import annotations

import math

import torch

from nwor_vllm.kernels.reference.confidence import Confidence
from nwor_vllm.kernels.state import POSITION_FIELDS, StopState

RULE_ODDS_MAX = 12.0  # a confidence is calibrated on log-odds clipped to this


def stop(conf: Confidence, state: StopState, step: torch.Tensor) -> None:
    n, positions, position = conf.max_prob.shape[0], state.stops.shape[0], int(step)
    if not 0 <= position < positions:
        return
    threshold, min_survival, verify_cost, draft_cost, *table = state.rule.tolist()
    intercept, slope, hazard = table[POSITION_FIELDS * position : POSITION_FIELDS * (position + 1)]
    alive, survival, product, column = state.alive[:n], state.survival[:n], state.product[:n], state.confidence[:n]
    # A row without a distribution counts as confidence 0.
    prob = conf.max_prob.nan_to_num(nan=0.0)
    odds = conf.log_odds.nan_to_num(nan=-RULE_ODDS_MAX).clamp_(-RULE_ODDS_MAX, RULE_ODDS_MAX)
    accept = torch.sigmoid(odds * slope + (state.bias[:n] + intercept))

    seen = column[:, position]
    seen.copy_(torch.where(alive, prob, seen))
    survival.copy_(torch.where(alive, survival * accept, survival))
    product.copy_(torch.where(alive, product * prob, product))
    keep = alive & (prob >= threshold) & (product >= min_survival) & (survival >= verify_cost)
    on = keep & (state.caps[:n] > position + 1)
    stopped = alive & ~keep
    if draft_cost > 0:
        following = accept if math.isnan(hazard) else hazard
        gain = ((survival * following - verify_cost).clamp_min_(0.0) * on).sum()
        if not gain > draft_cost:
            stopped, on = stopped | on, torch.zeros_like(on)
    state.lengths[:n] += keep
    state.alive[:n] = on
    state.stops[position] += stopped.sum()
