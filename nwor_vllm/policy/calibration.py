"""What the drafter's confidence is worth: an online logistic per draft position, and how good it is.

P(accepted | reached, confidence c) = sigmoid(a_j + b_j * log_odds(c) + phi_r): one Newton step per engine step on
discounted evidence, with (0, 1), that is "the confidence is right", as the prior. phi_r is the request's own shift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nwor_vllm.policy.requests import Effects, Groups
from nwor_vllm.policy.stop import Floats, Ints, log_odds, sigmoid
from nwor_vllm.policy.survival import tied

BINS = 20
LEAST, MOST = np.array([-6.0, 0.0]), np.array([6.0, 3.0])  # of (a, b); more confidence never means less
LEVEL = (2.0, 4.0)  # information behind the prior (a, b) = (0, 1), worth a handful of rounds
FOLLOWED = 50.0  # evidence behind what follows a draft that goes on, before old rounds fade
SMOOTH = (4.0, 16.0)  # and what ties the a and the b of neighbouring positions


class Calibration:
    def __init__(self, positions: int, spread: float, keep: float, memory: float) -> None:
        self.positions, self.memory = positions, memory
        self.weights: Floats = np.tile([0.0, 1.0], (positions, 1))
        self.information: Floats = np.zeros((positions, 3))  # sums of w, w x, w x^2
        self.following: Floats = np.zeros(positions)  # log-odds by which a row still drafting beats its history
        self.followed: Floats = np.zeros(positions)  # evidence of that
        self.effects = Effects(spread, keep)
        self.histogram: Floats = np.zeros((3, BINS))  # accepted, rejected, sum of predictions by predicted value
        self._index = np.arange(positions)
        self.prior = np.zeros((2 * positions, 2 * positions))
        self.prior[:positions, :positions] = tied(positions, LEVEL[0], SMOOTH[0])
        self.prior[positions:, positions:] = tied(positions, LEVEL[1], SMOOTH[1])

    def predict(self, rows: Ints, confidence: Floats) -> Floats:
        """[rows, positions]: calibrated acceptance; NaN confidence counts as 0."""
        w = self.weights
        return sigmoid(w[:, 0] + w[:, 1] * log_odds(confidence) + self.effects.mean[rows][:, None])

    def observe(self, rows: Ints, groups: Groups, verified: Ints, accepted: Ints, confidence: Floats) -> None:
        reached = self._index < np.minimum(accepted + 1, verified)[:, None]
        reached &= ~np.isnan(confidence)
        if not reached.any():
            return
        outcome = (self._index < accepted[:, None]) & reached
        x = log_odds(confidence)
        p = sigmoid(self.weights[:, 0] + self.weights[:, 1] * x + self.effects.mean[rows][:, None])
        self._count(p[reached], outcome[reached])
        residual = (outcome - p) * reached
        weight = p * (1.0 - p) * reached
        self.effects.update(groups, residual.sum(axis=1), weight.sum(axis=1))
        self._newton(residual, weight, x)

    def _newton(self, residual: Floats, weight: Floats, x: Floats) -> None:
        wx = weight * x
        gained = np.stack([weight.sum(axis=0), wx.sum(axis=0), (wx * x).sum(axis=0)], axis=1)
        fade = np.minimum(1.0, self.memory / (self.information[:, 0] + gained[:, 0] + 1e-9))
        self.information = (self.information + gained) * fade[:, None]
        k = self.positions
        precision = self.prior.copy()
        for row, column, sums in ((0, 0, 0), (0, k, 1), (k, 0, 1), (k, k, 2)):
            precision[row + self._index, column + self._index] += self.information[:, sums]
        gradient = np.concatenate([residual.sum(axis=0), (residual * x).sum(axis=0)])
        step = np.linalg.solve(precision, gradient).reshape(2, k).T
        weights = self.weights + np.minimum(np.maximum(step, -0.5), 0.5)
        self.weights = np.minimum(np.maximum(weights, LEAST), MOST)

    def learn_following(self, history: Floats, predicted: Floats, drafted: Ints, verified: Ints) -> None:
        """Rows that kept slot j and drafted j + 1: how much likelier than by `history` was that next draft to be kept?
        As often as confidence says on the whole: a mean of log-odds would say more, as sure drafts are very sure. Rows
        that kept slot j and went no further make it forgotten: else a first impression that ends drafts would stay."""
        on = self._index <= verified[:, None]
        shown, ended = on & (self._index < drafted[:, None]), on & (self._index == drafted[:, None])
        odds = np.exp(-self.following) * (1.0 / history - 1.0)
        expected = 1.0 / (1.0 + odds)
        doubt = expected * (1.0 - expected)
        forgotten = FOLLOWED / (FOLLOWED + (doubt * ended).sum(axis=0))
        self.following = self.following * forgotten
        weight = (doubt * shown).sum(axis=0)
        self.followed = np.minimum(self.followed * forgotten + weight, FOLLOWED)
        step = ((predicted - expected) * shown).sum(axis=0) / (self.followed + LEVEL[0])
        self.following = np.minimum(np.maximum(self.following + step, -4.0), 4.0)

    def _count(self, p: Floats, outcome: Any) -> None:
        cell = np.minimum((p * BINS).astype(np.int64), BINS - 1)
        self.histogram *= math.exp(-len(p) / 20000.0)
        self.histogram[0] += np.bincount(cell[outcome], minlength=BINS)
        self.histogram[1] += np.bincount(cell[~outcome], minlength=BINS)
        self.histogram[2] += np.bincount(cell, weights=p, minlength=BINS)

    def error(self) -> float:
        """Expected calibration error; NaN before any evidence."""
        total = self.histogram[:2].sum()
        if total == 0:
            return math.nan
        return float(np.abs(self.histogram[0] - self.histogram[2]).sum() / total)

    def auc(self) -> float:
        """Probability that an accepted draft was predicted above a rejected one; NaN while one kind is missing."""
        good, bad = self.histogram[0], self.histogram[1]
        if good.sum() == 0 or bad.sum() == 0:
            return math.nan
        below = np.cumsum(bad) - bad
        return float((good * (below + 0.5 * bad)).sum() / (good.sum() * bad.sum()))

    def snapshot(self) -> dict[str, Any]:
        return {
            "weights": self.weights.tolist(),
            "information": self.information.tolist(),
            "following": self.following.tolist(),
            "followed": self.followed.tolist(),
            "histogram": self.histogram.tolist(),
            "effects": self.effects.snapshot(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.weights = np.array(state["weights"], float)
        self.information = np.array(state["information"], float)
        self.following = np.array(state["following"], float)
        self.followed = np.array(state["followed"], float)
        self.histogram = np.array(state["histogram"], float)
        self.effects.restore(state["effects"])
