from __future__ import annotations

import numpy as np

from nwor_vllm.policy.calibration import Calibration


def test_what_follows_a_draft_that_goes_on_is_as_likely_as_its_confidences_say() -> None:
    """They are very sure or not at all: a mean of their log-odds would say .7 where half of them are kept."""
    rng, calibration = np.random.default_rng(0), Calibration(4, 0.5, 0.98, 150.0)
    history = np.full((16, 4), 0.7)
    for _ in range(200):
        predicted = np.where(rng.random((16, 4)) < 0.5, 0.999, 0.05)
        calibration.learn_following(history, predicted, np.full(16, 4), np.full(16, 3))
    odds = np.log(0.7 / 0.3) + calibration.following
    assert np.abs(1.0 / (1.0 + np.exp(-odds)) - 0.5245).max() < 0.04


def test_a_first_impression_that_ends_drafts_is_forgotten() -> None:
    """Nobody drafts a fourth token any more, as it looked hopeless once: nothing else would ever tell."""
    calibration, history = Calibration(6, 0.5, 0.98, 150.0), np.full((16, 6), 0.7)
    hopeless = np.full((16, 6), 0.95)
    hopeless[:, 3] = 0.05
    for _ in range(40):
        calibration.learn_following(history, hopeless, np.full(16, 4), np.full(16, 3))
    first = calibration.following.copy()
    assert first[3] < -3
    for _ in range(80):
        calibration.learn_following(history, hopeless, np.full(16, 3), np.full(16, 3))
    assert calibration.following[3] > -0.2
    assert calibration.followed[3] < 5
    assert (calibration.following[1:3] >= first[1:3]).all()  # what drafts still show stays
