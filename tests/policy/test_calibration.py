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
