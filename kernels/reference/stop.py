"""Who drafts on after position j, in plain torch.

With c the max probability and a = sigmoid(intercept_j + slope_j * log_odds) the acceptance it predicts,
    S   <- S * a                                            running survival
    keep = c >= threshold and S >= max(min_survival, verify_cost)
A row that is not kept stops and its token j is not verified. Rows that go on have to be worth the next draft step
together, where the coming position is expected to be accepted like this one:
    sum max(0, S * a - verify_cost) > draft_cost, else every row stops, keeping its token j.
A NaN confidence counts as 0: it stops where anything can stop. Only the distribution is judged, never the drawn token.
"""

from __future__ import annotations

import torch

from nwor_vllm.kernels.reference.confidence import LOG_ODDS_MAX, Confidence
from nwor_vllm.kernels.state import RULE_FIELDS, StopState


def stop(conf: Confidence, state: StopState, step: torch.Tensor) -> None:
    n, positions = conf.max_prob.shape[0], state.stops.shape[0]
    inside = (step >= 0) & (step < positions)
    column = step.long().clamp(0, positions - 1)
    threshold, min_survival, verify_cost, draft_cost = state.rule[:RULE_FIELDS].unbind()
    intercept, slope = state.rule[RULE_FIELDS:].view(positions, 2).index_select(0, column)[0].unbind()
    alive = state.alive[:n] & inside
    prob = torch.where(conf.max_prob.isnan(), 0.0, conf.max_prob)
    odds = torch.where(conf.log_odds.isnan(), -LOG_ODDS_MAX, conf.log_odds)

    seen = state.confidence[:n].index_select(1, column)
    state.confidence[:n].index_copy_(1, column, torch.where(alive[:, None], prob[:, None], seen))
    accept = torch.sigmoid(intercept + slope * odds)
    survival = torch.where(alive, state.survival[:n] * accept, state.survival[:n])
    keep = alive & (prob >= threshold) & (survival >= torch.maximum(min_survival, verify_cost))
    on = keep & (state.caps[:n] > column + 1)
    gain = torch.where(on, (survival * accept - verify_cost).clamp_min(0.0), 0.0).sum()
    worth = (draft_cost <= 0) | (gain > draft_cost)

    state.survival[:n] = survival
    state.lengths[:n] += keep
    state.alive[:n] = torch.where(inside, on & worth, state.alive[:n])
    stopped = (alive & ~keep).sum() + (on & ~worth).sum()
    state.stops.index_add_(0, column, stopped.view(1))
