from __future__ import annotations

import math

import numpy as np
import pytest

from nwor_vllm.policy.cost import Cost, Timed, features


def teach(cost: Cost, truth: object, steps: int, seed: int = 0, hiccups: float = 0.0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        k = int(rng.integers(0, 9))
        seconds = truth(8, 8 * (1 + k), k) * math.exp(0.03 * rng.normal())  # type: ignore[operator]
        cost.observe([Timed(8, 8 * (1 + k), k, 0, 0, 60.0 if rng.random() < hiccups else seconds)])


def today(cost: Cost, requests: int, verified: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What steps take at the machine's pace of now."""
    return cost.predict(requests, verified, steps) * math.exp(cost.pace.now)


def linear(n: int, verified: int, steps: int) -> float:
    return 4e-3 + 2e-5 * verified + 4e-4 * steps


@pytest.mark.parametrize("hiccups", [0.0, 0.02])
def test_learns_step_times_even_when_some_take_a_minute(hiccups: float) -> None:
    cost = Cost()
    teach(cost, linear, 600, hiccups=hiccups)
    k = np.arange(0.0, 9.0)
    expected = np.array([linear(8, 8 * (1 + int(x)), int(x)) for x in k])
    assert today(cost, 8, 8 * (1 + k), k) == pytest.approx(expected, rel=0.06)


def test_learns_the_bend_of_a_roofline() -> None:
    def roof(n: int, verified: int, steps: int) -> float:
        return max(4e-3, 2e-4 * verified) + 3e-4 * steps

    cost = Cost()
    teach(cost, roof, 800)
    k = np.arange(0.0, 9.0)
    expected = np.array([roof(8, 8 * (1 + int(x)), int(x)) for x in k])
    assert today(cost, 8, 8 * (1 + k), k) == pytest.approx(expected, rel=0.06)


def test_follows_a_machine_that_gets_slower() -> None:
    cost = Cost()
    teach(cost, linear, 400)
    teach(cost, lambda n, v, d: 2 * linear(n, v, d), 1500, seed=1)
    assert float(today(cost, 8, np.array([32.0]), np.array([3.0]))[0]) == pytest.approx(2 * linear(8, 32, 3), rel=0.15)


def test_useless_clocks_teach_nothing() -> None:
    cost = Cost()
    for seconds in (0.0, -1.0, math.nan, math.inf):
        cost.observe([Timed(8, 32, 3, 0, 0, seconds)])
    assert not cost.known


def test_weights_never_go_negative_and_more_drafts_never_cost_less() -> None:
    cost = Cost()
    teach(cost, lambda n, v, d: 5e-3 - 1e-4 * d, 300)  # a machine that lies
    assert (cost.weights >= 0).all()
    base = features(8, np.full(9, 9.0), np.arange(9.0)) @ cost.weights
    assert (np.diff(base) >= 0).all()


def test_a_profile_starts_it_warm() -> None:
    cost = Cost()
    cost.seed([(n, n * (1 + k), k, 0, 0, linear(n, n * (1 + k), k)) for n in (1, 8, 32) for k in (0, 1, 3, 8)] * 4)
    assert float(today(cost, 8, np.array([32.0]), np.array([3.0]))[0]) == pytest.approx(linear(8, 32, 3), rel=0.03)


def test_judging_is_told_from_drafting_by_steps_without_it() -> None:
    rng, cost = np.random.default_rng(0), Cost()
    for i in range(600):
        k, judged = int(rng.integers(0, 9)), i % 4 > 0
        seconds = linear(1, 1 + k, k) + 3e-4 * k * judged
        cost.observe([Timed(1, 1 + k, k, k * judged, 0, seconds * math.exp(0.03 * rng.normal()))])
    plain, judged = cost.predict(1, np.full(2, 6.0), np.full(2, 5.0), 0.0, np.array([0.0, 5.0]))
    assert judged - plain == pytest.approx(5 * 3e-4, rel=0.25)


def test_steps_beside_a_prefill_tell_what_drafting_costs() -> None:
    """Two lengths, one of them never without somebody's prompt beside it."""
    rng, cost = np.random.default_rng(0), Cost()
    for i in range(400):
        k, prompt = ((1, 0), (5, 40 + i % 100), (1, 70))[i % 3]
        seconds = linear(8, 8 * (1 + k), k) + (5e-4 + 5e-5 * prompt if prompt else 0.0)
        cost.observe([Timed(8, 8 * (1 + k), k, 0, 0, seconds * math.exp(0.03 * rng.normal()), prompt)])
    got = today(cost, 8, np.array([16.0, 48.0]), np.array([1.0, 5.0]))
    assert got == pytest.approx([linear(8, 16, 1), linear(8, 48, 5)], rel=0.05)


@pytest.mark.parametrize("zeros", [0, 20])
def test_what_a_drafter_takes_to_read_prompts_is_told_by_steps_without_drafts(zeros: int) -> None:
    """Steps that draft nothing let it wait. Where there are none, a tenth of what prompts cost is taken for it."""
    rng, cost = np.random.default_rng(0), Cost()
    for i in range(400):
        k, prompt = 3 if not zeros or i % zeros else 0, (60 + i % 80) * (i % 3 > 0)
        seconds = linear(8, 8 * (1 + k), k) + (5e-5 + 2e-5 * (k > 0)) * prompt
        cost.observe([Timed(8, 8 * (1 + k), k, 0, 0, seconds * math.exp(0.03 * rng.normal()), prompt)])
    assert cost.prompt_token == pytest.approx(2e-5, rel=0.4) if zeros else 2e-6 < cost.prompt_token < 1.5e-5
    got = cost.prefill(np.full(2, 100.0), np.array([False, True]))
    assert got[1] == pytest.approx(7e-3, rel=0.15)
    assert got[1] - got[0] == pytest.approx(100 * cost.prompt_token)


def test_the_path_without_any_verification_is_a_step_of_its_own() -> None:
    rng, cost = np.random.default_rng(0), Cost()
    for i in range(400):
        before, k = ((3, 3), (3, 3), (3, 0), (0, 0), (0, 3))[i % 5]  # a visit of zero
        seconds = linear(8, 8 * (1 + before), k) + 2e-3 * (before > 0)
        cost.observe([Timed(8, 8 * (1 + before), k, 0, 0, seconds * math.exp(0.03 * rng.normal()))])
    got = today(cost, 8, np.array([8.0, 32.0]), np.array([0.0, 3.0]))
    assert got == pytest.approx([linear(8, 8, 0), linear(8, 32, 3) + 2e-3], rel=0.05)


def test_a_kind_of_step_that_was_believed_free_is_learnt_all_the_same() -> None:
    cost = Cost()
    for draft_steps, seconds in ((1, 1e-4), (1, 1.0), (0, 1.0)):
        cost.observe([Timed(1, 0, draft_steps, 0, 0, seconds)])
    assert np.isfinite(cost.weights).all()
    assert np.isfinite(cost.predict(1, np.array([1.0, 4.0]), np.array([0.0, 3.0]))).all()


def test_a_burst_of_slowness_is_not_the_price_of_the_sizes_that_ran_in_it() -> None:
    cost, rng = Cost(), np.random.default_rng(0)

    def step(k: int, pace: float) -> float:
        seconds = pace * linear(8, 8 * (1 + k), k) * math.exp(0.03 * rng.normal())
        return float(cost.observe([Timed(8, 8 * (1 + k), k, 0, 0, seconds)])[0])

    for _ in range(15):
        for k in (0, 1, 2, 3, 5, 8):
            step(k, 1.0)
    found = [step(3 if i % 2 else 5, 1.8) for i in range(40)]
    assert sum(factor > 1.4 for factor in found) >= 30
    for _ in range(30):
        step(8, 1.0)
    k = np.array([3.0, 5.0, 8.0])
    expected = np.array([linear(8, 8 * (1 + int(x)), int(x)) for x in k])
    predicted = cost.predict(8, 8 * (1 + k), k)
    assert predicted / predicted[2] == pytest.approx(expected / expected[2], rel=0.1)


def test_the_more_times_scatter_the_more_visits_make_a_size_special() -> None:
    """A length that was run four times, each a fifth slower than its neighbours say it is."""

    def believed(scatter: float, seed: int) -> float:
        cost, rng = Cost(), np.random.default_rng(seed)
        for step in range(400):
            k = 7 if step % 75 == 24 and step > 100 else int(rng.choice([0, 1, 2, 3, 4, 5, 10]))
            slow = 1.2 if k == 7 else math.exp(scatter * rng.normal())
            cost.observe([Timed(1, 1 + k, k, 0, 0, linear(1, 1 + k, k) * slow)])
        return math.log(cost.sizes.factor[0, 12])  # of eight verified tokens

    certain, scattered = (np.mean([believed(scatter, seed) for seed in range(6)]) for scatter in (0.01, 0.15))
    assert certain > 0.05
    assert scattered < 0.7 * certain


@pytest.mark.parametrize("seed", range(4))
def test_visits_add_up_however_rare_they_are(seed: int) -> None:
    """A size off the line, run one step in sixty: what it takes is believed after thirty visits as after thirty in a
    row."""
    cost, rng = Cost(), np.random.default_rng(seed)
    for step in range(1800):
        k = 8 if step % 60 == 59 else (3, 5)[step % 2]
        seconds = linear(16, 16 * (1 + k), k) * (0.8 if k == 8 else 1.0) * math.exp(0.05 * rng.normal())
        cost.observe([Timed(16, 16 * (1 + k), k, 0, 0, seconds)])
    found = today(cost, 16, np.array([64.0, 144.0]), np.array([3.0, 8.0]))
    true = linear(16, 64, 3), linear(16, 144, 8)
    assert found[1] / found[0] == pytest.approx(0.8 * true[1] / true[0], rel=0.1)


def run(
    cost: Cost, rng: np.random.Generator, lengths: list[int], steps: int, slow: float = 1.0, dear: float = 1.0
) -> None:
    """Sixteen requests; drafts of more than five tokens are judged, trimmed a little, and `dear` times as dear."""
    for _ in range(steps):
        k = int(rng.choice(lengths))
        judged = k if k > 5 else 0
        verified = 16 * (1 + k) - (int(rng.integers(0, 12)) if judged else 0)
        seconds = linear(16, verified, k) * slow * (dear if judged else 1.0) * math.exp(0.05 * rng.normal())
        cost.observe([Timed(16, verified, k, judged, 0, seconds)])


def ratio(cost: Cost) -> float:
    """Of a judged step of eight to a plain one of five, over the true one of `linear`."""
    judged = cost.predict(16, np.array([144.0]), np.array([8.0]), 0, 8)
    plain = cost.predict(16, np.array([96.0]), np.array([5.0]))
    return float(judged[0] / linear(16, 144, 8) / (plain[0] / linear(16, 96, 5)))


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_time_that_ends_with_the_kinds_that_knew_it_does_not_last(seed: int) -> None:
    cost, rng = Cost(), np.random.default_rng(seed)
    run(cost, rng, [6, 7, 8, 9], 20)
    run(cost, rng, [0, 3, 5, 8], 60)
    run(cost, rng, [5], 160)
    run(cost, rng, [5], 30, slow=1.4)
    assert cost.pace.now > 0.2
    run(cost, rng, [6, 7, 8, 9, 10], 60)
    assert abs(cost.pace.now) < 0.2
    assert ratio(cost) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("seed", range(3))
def test_lengths_that_are_dearer_than_believed_are_no_slow_machine(seed: int) -> None:
    cost, rng = Cost(), np.random.default_rng(seed)
    run(cost, rng, [0, 3, 5], 200)
    run(cost, rng, [6, 7, 8, 9, 10], 40, dear=1.4)
    assert abs(cost.pace.now) < 0.1
    assert ratio(cost) > 1.2


def test_what_was_dear_in_slow_times_is_believed_until_few_visits_say_otherwise() -> None:
    cost, rng, k = Cost(), np.random.default_rng(0), np.array([3.0, 8.0])

    def step(k: int, pace: float) -> None:
        seconds = pace * linear(16, 16 * (1 + k), k) * math.exp(0.03 * rng.normal())
        cost.observe([Timed(16, 16 * (1 + k), k, 0, 0, seconds)])

    def dearer() -> float:
        three, eight = cost.predict(16, 16 * (1 + k), k)
        return float(eight / three) / (linear(16, 144, 8) / linear(16, 64, 3))

    for i in range(40):
        step((8, 5, 10)[i % 3], 1.5)
    for _ in range(400):
        step(3, 1.0)
    assert dearer() > 1.2
    for _ in range(8):
        step(8, 1.0)
        for _ in range(20):
            step(3, 1.0)
    assert dearer() == pytest.approx(1.0, abs=0.07)


def test_a_price_is_doubted_the_more_the_longer_nobody_paid_it() -> None:
    cost = Cost()
    doubts = []
    for phase, steps in ((8, 60), (3, 60), (3, 600), (8, 5)):
        for _ in range(steps):
            cost.observe([Timed(16, 16 * (1 + phase), phase, 0, 0, linear(16, 16 * (1 + phase), phase))])
        doubts.append(float(cost.doubt(16, np.array([144.0]), np.array([8.0]), 0.0)[0]))
    assert doubts[0] < doubts[1] < doubts[2] > 2 * doubts[3]


def test_a_profile_gives_the_shape_and_the_first_live_steps_the_pace() -> None:
    cost, k = Cost(), np.array([0.0, 1.0, 3.0, 8.0])
    cost.seed([(n, n * (1 + d), d, 0, 0, linear(n, n * (1 + d), d)) for n in (1, 8, 32) for d in (0, 1, 3, 8)])
    assert cost.known
    for _ in range(8):  # today the machine takes half as long again, and only one length was drafted
        cost.observe([Timed(8, 32, 3, 0, 0, 1.5 * linear(8, 32, 3))])
    expected = np.array([1.5 * linear(8, 8 * (1 + int(d)), int(d)) for d in k])
    assert today(cost, 8, 8 * (1 + k), k) == pytest.approx(expected, rel=0.03)
    nothing = Cost()
    nothing.seed([])
    assert not nothing.known


def test_an_absurdly_short_first_time_is_no_step() -> None:
    cost = Cost()
    rng = np.random.default_rng(0)
    for step in range(40):
        k = int(rng.integers(0, 9))
        seconds = 1e-9 if step % 5 == 4 else 1.0 + 0.1 * k + 0.01 * (1 + k)
        cost.observe([Timed(1, 1 + k, k, 0, 0, seconds)])
    found = cost.lengths(1, np.array([0.0, 3.0, 8.0]))[0]
    assert np.abs(np.log(found / [1.01, 1.34, 1.89])).max() < 0.15
