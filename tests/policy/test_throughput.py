from __future__ import annotations

import math

import pytest

from nwor_vllm.errors import ConfigError
from nwor_vllm.policy.base import Round, Step
from nwor_vllm.policy.throughput import Throughput, ThroughputParams

LADDER = (0, 1, 3, 8)


def step(k: int, accepted: int, seconds: float = 1.0) -> Step:
    return Step([Round("a", k, k, min(accepted, k))], k, k, seconds, 1, 1 + k)


def test_warm_up_tries_every_candidate() -> None:
    policy = Throughput(ThroughputParams(), LADDER)
    tried = []
    for _ in range(6):
        k = policy.plan(["a"]).k
        tried.append(k)
        policy.observe(step(k, 3, 1.0 + 0.1 * k))
    assert sorted(tried) == [1, 1, 3, 3, 8, 8]
    assert policy.plan(["a"]).k == 3  # 4 tokens in 1.3 s beats 4 in 1.8 and 2 in 1.1


def test_an_unscored_current_candidate_is_left() -> None:
    policy = Throughput(ThroughputParams(warmup_cycles=1, required_streak=1, cooldown_cycles=0), LADDER)
    for k in (8, 3, 1):
        policy.observe(step(k, 3, math.nan if k == 8 else 1.0))
    policy.current = 8
    assert policy.score(8) == -math.inf
    policy.observe(step(8, 3, math.nan))
    assert policy.current != 8


def test_probes_do_not_reset_the_count_of_low_acceptances() -> None:
    policy = Throughput(ThroughputParams(warmup_cycles=1, probe_interval=1, low_accept_streak=3), LADDER)
    for k in (8, 3, 1):
        policy.observe(step(k, 8, 1.0))
    assert policy.current == 8
    policy.observe(step(policy.plan(["a"]).k, 0))
    before = policy.low
    probe = policy.plan(["a"]).k
    assert policy.probing
    policy.observe(step(probe, 8))
    assert policy.low == before == 1


def test_low_acceptance_falls_back_to_the_shortest() -> None:
    policy = Throughput(ThroughputParams(warmup_cycles=1, probe_interval=0), LADDER)
    for k in (8, 3, 1):
        policy.observe(step(k, 8, 1.0))
    for _ in range(2):
        policy.observe(step(8, 0))
    assert policy.current == 1


def test_candidates_outside_the_ladder_are_refused() -> None:
    with pytest.raises(ConfigError, match="candidates has 5"):
        Throughput(ThroughputParams(candidates=(1, 5)), LADDER)
