"""The distribution check accepts what is right and rejects what is slightly wrong."""

import itertools
import random

from nwor_vllm.bench import distribution

CONDITIONAL = {(): [0.5, 0.3, 0.2]} | {(t,): [0.6 - 0.2 * t, 0.3, 0.1 + 0.2 * t] for t in range(3)}
TRUTH = distribution.joint(CONDITIONAL, 2)


def draw(n, seed, truth=TRUTH):
    rng = random.Random(seed)
    return rng.choices(list(truth), weights=list(truth.values()), k=n)


def test_joint_is_a_distribution():
    assert abs(sum(TRUTH.values()) - 1) < 1e-12
    assert abs(TRUTH[(1, 2)] - 0.3 * 0.3) < 1e-12
    assert len(TRUTH) == 9


def test_right_samples_pass_and_their_scores_are_standard_normal():
    scores = [z for seed in range(200) for z in distribution.z_scores(draw(4000, seed), TRUTH).values()]
    assert max(map(abs, scores)) < 4.5
    mean = sum(scores) / len(scores)
    spread = (sum((z - mean) ** 2 for z in scores) / len(scores)) ** 0.5
    assert abs(mean) < 0.15 and 0.85 < spread < 1.15


def test_a_small_bias_is_seen():
    biased = dict(TRUTH)
    biased[(0, 0)] += 0.03
    biased[(2, 2)] -= 0.03
    scores = distribution.z_scores(draw(20000, 1, biased), TRUTH)
    assert scores["jointly"] > 6


def test_a_bias_between_positions_is_seen_jointly_only():
    independent = {(a, b): sum(TRUTH[a, x] for x in range(3)) * sum(TRUTH[x, b] for x in range(3))
                   for a, b in itertools.product(range(3), repeat=2)}  # fmt: skip
    scores = distribution.z_scores(draw(20000, 1, independent), TRUTH)
    assert abs(scores["position 1"]) < 3.5 and abs(scores["position 2"]) < 3.5
    assert scores["jointly"] > 6


def test_a_token_that_cannot_be_is_seen():
    assert distribution.z_of({(9,): 50, (0,): 950}, {(0,): 1000.0}) > 6
