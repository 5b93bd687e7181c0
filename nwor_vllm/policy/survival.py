"""How far drafts survive: per position hazards, shared by all requests, shifted by each request's own history.

The probability that position j is accepted, given that it is reached, is sigmoid(base_j + theta_r). A round that
verified v drafts and kept a of them reached positions 1..min(a + 1, v): those are Bernoulli outcomes, the rest is
censored and says nothing. That likelihood factorises, so plain logistic updates on reached positions are exact under
censoring that does not look at the outcome. Stopping on confidence does look at a proxy of it: such a position,
reached but not verified, enters with its calibrated confidence as a soft outcome, else deep positions would look
better than they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nwor_vllm.policy.requests import Effects, Groups
from nwor_vllm.policy.stop import Floats, Ints

PRIOR_LOG_ODDS = 0.8  # acceptance .69: drafts are tried before they are judged
PRIOR_INFORMATION = 1.0  # behind that level
SMOOTH = 4.0  # information that ties neighbouring positions: their log-odds differ by about a half


def tied(positions: int, level: float, smooth: float) -> Floats:
    """Precision of a prior under which neighbours are alike: what one position shows moves those that nobody saw."""
    precision = np.zeros((positions, positions))
    for j in range(positions - 1):
        precision[j : j + 2, j : j + 2] += smooth * np.array([[1.0, -1.0], [-1.0, 1.0]])
    precision[0, 0] += level
    return precision


class Survival:
    def __init__(self, positions: int, spread: float, keep: float, memory: float) -> None:
        self.positions = positions
        self.memory = memory  # evidence (in units of p (1 - p)) after which old rounds fade
        self.base: Floats = np.full(positions, PRIOR_LOG_ODDS)
        self.information: Floats = np.zeros(positions)
        self.prior = tied(positions, PRIOR_INFORMATION, SMOOTH)
        self.effects = Effects(spread, keep)
        self._index = np.arange(positions)

    def hazards(self, rows: Ints, hope: float = 0.0) -> Floats:
        """[rows, positions]: acceptance at each position, given that it is reached; if what all share is so many of its
        standard deviations better than believed."""
        base = self.base + hope / np.sqrt(self.information + PRIOR_INFORMATION) if hope else self.base
        odds = np.exp(-base) * np.exp(-self.effects.mean[rows])[:, None]  # against; in fewer exponentials than sigmoid
        return np.asarray(1.0 / (1.0 + odds))

    def observe(self, rows: Ints, groups: Groups, verified: Ints, accepted: Ints, soft: Floats) -> None:
        """`soft[r]` is the calibrated confidence of the position after the last verified one where the drafter stopped
        on confidence, NaN elsewhere; it counts only where everything verified was accepted."""
        reached = self._index < np.minimum(accepted + 1, verified)[:, None]
        outcome = (self._index < accepted[:, None]).astype(float)
        imputed = np.flatnonzero(~np.isnan(soft) & (accepted == verified) & (verified < self.positions))
        if len(imputed):
            reached[imputed, verified[imputed]] = True
            outcome[imputed, verified[imputed]] = soft[imputed]
        p = self.hazards(rows)
        weight = p * (1.0 - p) * reached
        residual = (outcome - p) * reached
        self.effects.update(groups, residual.sum(axis=1), weight.sum(axis=1))
        self.information = np.minimum(self.information + weight.sum(axis=0), self.memory)
        step = np.linalg.solve(np.diag(self.information) + self.prior, residual.sum(axis=0))
        self.base = np.minimum(np.maximum(self.base + np.minimum(np.maximum(step, -1.0), 1.0), -7.0), 7.0)

    def snapshot(self) -> dict[str, Any]:
        return {
            "base": self.base.tolist(),
            "information": self.information.tolist(),
            "effects": self.effects.snapshot(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.base = np.array(state["base"], float)
        self.information = np.array(state["information"], float)
        self.effects.restore(state["effects"])
