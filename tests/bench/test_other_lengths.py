"""What the policy believes of lengths that it does not draft, against serving them."""

from __future__ import annotations

import numpy as np
import pytest

from nwor_vllm.bench.sim import suite, workloads
from nwor_vllm.bench.sim.curves import find
from nwor_vllm.bench.sim.replay import replay, replay_fixed
from nwor_vllm.policy import make_policy


@pytest.mark.parametrize(("batch", "most", "of_naive"), [(1, 0.025, 0.5), (8, 0.04, 0.9)])
def test_other_lengths_are_told_from_these_rounds(batch: int, most: float, of_naive: float) -> None:
    """At batch 8 the policy often drafts three: text with a period of a multiple of four hides what is hard from it."""
    pool, curve, walked, own = workloads.recorded(), find("plain"), [], []
    for work in workloads.workloads(pool, (batch,)):
        if work.name not in ("json@0.7", "code@1", "retrieval@0.7", "mixed"):
            continue
        load = workloads.load_of(work, 0, suite.tokens_of(batch), pool)
        policy = make_policy("goodput", None, suite.LENGTHS)
        replay(policy, load, curve)
        walkers = policy.walkers  # type: ignore[attr-defined]
        for place, k in enumerate(suite.LENGTHS[1:], 1):
            served = replay_fixed(load, curve, k)
            truth = np.log(served.tokens / served.rounds)
            walked.append(np.log(walkers.tokens / walkers.rounds[place]) - truth)
            own.append(np.log(walkers.kept[place] / walkers.count) - truth)
    off, naive = (float(np.sqrt(np.mean(np.square(x)))) for x in (walked, own))
    assert off < most
    assert off < of_naive * naive
