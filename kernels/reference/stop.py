"""The stop rule (`nwor_vllm.policy.base.StopRule` states it) at one draft position of every row, in plain torch.

`policy.stop.evaluate` judges a recorded round; this judges a position while the round runs, in place, on the device.
Only the draft distribution is judged, never the token drawn from it.
"""

from __future__ import annotations

import torch

from nwor_vllm.kernels.reference.confidence import Confidence
from nwor_vllm.kernels.state import POSITION_FIELDS, RULE_FIELDS, StopState

RULE_ODDS_MAX = 12.0  # a confidence is calibrated on log-odds clipped to this


def stop(conf: Confidence, state: StopState, step: torch.Tensor) -> None:
    n, positions = conf.max_prob.shape[0], state.stops.shape[0]
    inside = (step >= 0) & (step < positions)
    column = step.long().clamp(0, positions - 1)
    threshold, min_survival, verify_cost, draft_cost = state.rule[:RULE_FIELDS].unbind()
    table = state.rule[RULE_FIELDS:].view(positions, POSITION_FIELDS)
    intercept, slope, hazard = table.index_select(0, column)[0].unbind()
    alive = state.alive[:n] & inside
    # A row without a distribution counts as confidence 0.
    prob = torch.where(conf.max_prob.isnan(), 0.0, conf.max_prob)
    odds = torch.where(conf.log_odds.isnan(), -RULE_ODDS_MAX, conf.log_odds.clamp(-RULE_ODDS_MAX, RULE_ODDS_MAX))

    seen = state.confidence[:n].index_select(1, column)
    state.confidence[:n].index_copy_(1, column, torch.where(alive[:, None], prob[:, None], seen))
    accept = torch.sigmoid(intercept + slope * odds + state.bias[:n])
    survival = torch.where(alive, state.survival[:n] * accept, state.survival[:n])
    product = torch.where(alive, state.product[:n] * prob, state.product[:n])
    keep = alive & (prob >= threshold) & (product >= min_survival) & (survival >= verify_cost)
    on = keep & (state.caps[:n] > column + 1)
    following = torch.where(hazard.isnan(), accept, hazard)
    gain = torch.where(on, (survival * following - verify_cost).clamp_min(0.0), 0.0).sum()
    worth = (draft_cost <= 0) | (gain > draft_cost)

    state.survival[:n] = survival
    state.product[:n] = product
    state.lengths[:n] += keep
    state.alive[:n] = torch.where(inside, on & worth, state.alive[:n])
    stopped = (alive & ~keep).sum() + (on & ~worth).sum()
    state.stops.index_add_(0, column, stopped.view(1))
