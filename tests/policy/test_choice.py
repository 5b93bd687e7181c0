from __future__ import annotations

import numpy as np
import pytest

from nwor_vllm.policy.choice import Chooser
from nwor_vllm.policy.cost import Cost, Timed
from nwor_vllm.policy.shadow import Walkers

RUNGS = np.array([0, 1, 2, 3, 5, 8])
BASE, DRAFT = 0.01, 0.0015


def build() -> Chooser:
    """For one request, drafts of .0015 s each beside steps of .01 s."""
    cost, rng = Cost(), np.random.default_rng(0)
    for k in rng.choice(RUNGS, 400).tolist():
        cost.observe([Timed(1, 1 + k, k, 0, 0, BASE + DRAFT * k)])
    return Chooser(RUNGS, cost, Walkers(RUNGS))


def survival(hazard: float) -> np.ndarray:
    return hazard ** np.arange(1.0, 9.0)[None, :]


def chosen(chooser: Chooser, hazard: float, doubt: float = 0.0, advantage: float = 1.0, most: float = 99.0) -> int:
    return int(RUNGS[chooser.choose(survival(hazard), 0, False, most, doubt, advantage).best])


def test_it_takes_the_best_ratio_of_tokens_to_seconds() -> None:
    chooser = build()
    for hazard in (0.05, 0.5, 0.7, 0.95):
        tokens = 1.0 + np.append(0.0, np.cumsum(survival(hazard)))[RUNGS]
        rates = tokens / (BASE + DRAFT * RUNGS)
        found = chooser.choose(survival(hazard), 0, False, 99.0, 0.0, 1.0)
        assert rates[found.best] > 0.99 * rates.max()
        assert found.rate == pytest.approx(rates[found.best], rel=0.03)
        assert found.worth == found.rate  # no prompts, no texts' ends


def test_steps_of_prompts_make_long_drafts_dearer() -> None:
    chooser = build()
    free = chosen(chooser, 0.9)
    chooser.walkers.tokens, chooser.walkers.waits = 800.0, 200.0
    found = chooser.choose(survival(0.9), 0, False, 99.0, 0.0, 1.0)
    assert RUNGS[found.best] < free
    tokens = 1.0 + float(survival(0.9)[0, : RUNGS[found.best]].sum())
    assert found.worth == pytest.approx(found.rate * (1.0 + 0.25 * tokens))
    rates = [
        x / (t * (1.0 + 0.25 * x))
        for x, t in ((1 + sum(0.9**j for j in range(1, k + 1)), BASE + DRAFT * k) for k in RUNGS)
    ]
    assert rates[found.best] > 0.99 * max(rates)


def test_a_drafter_must_read_the_prompts_and_zero_need_not() -> None:
    chooser = build()
    assert chosen(chooser, 0.35) > 0
    chooser.walkers.tokens, chooser.walkers.waits = 800.0, 20.0
    chooser.walkers.prompts, chooser.walkers.prompt_tokens = 20, 2000
    assert chooser.walkers.fed == pytest.approx(2.5)
    cost = chooser.cost
    for i in range(400):
        k, prompt = (0, 2)[i % 2], 60 * (i % 4 < 2)
        cost.observe([Timed(1, 1 + k, k, 0, 0, BASE + DRAFT * k + (1e-4 + 8e-4 * (k > 0)) * prompt, prompt)])
    assert 4e-4 < cost.prompt_token < 1e-3  # some of it is taken for the draft's own
    found = chooser.choose(survival(0.35), 0, False, 99.0, 0.0, 1.0)
    assert found.best == 0
    assert found.zero == 1.0
    assert chosen(chooser, 0.9) > 1  # what is fixed does not make good drafts shorter
    free = chooser.choose(survival(0.9), 0, False, 99.0, 0.0, 1.0)
    chooser.walkers.prompt_tokens = 0
    found = chooser.choose(survival(0.9), 0, False, 99.0, 0.0, 1.0)
    assert found.best == free.best
    assert free.zero == pytest.approx(found.zero * (1.0 + 2.5 * cost.prompt_token * found.rate))


def test_zero_is_doubted_by_what_drafts_would_bring_and_by_what_judging_gains() -> None:
    chooser = build()
    assert chosen(chooser, 0.12) == 0
    assert chosen(chooser, 0.12, doubt=0.5) > 0
    assert chosen(chooser, 0.001, doubt=0.5) == 0  # drafts that bring nothing are given up at once
    assert chosen(chooser, 0.12, advantage=1.3) > 0


def test_no_length_verifies_more_than_it_may() -> None:
    assert chosen(build(), 0.95, most=4.0) == 3
