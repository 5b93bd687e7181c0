from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from nwor_vllm.bench import cli
from nwor_vllm.bench.sim import oracle
from nwor_vllm.bench.sim.curves import CURVES, Curve, fit
from nwor_vllm.bench.sim.replay import Load, replay, replay_fixed
from nwor_vllm.bench.sim.synthetic import DOMAINS, WORTHLESS, Domain, generate
from nwor_vllm.bench.traces import Trace
from nwor_vllm.policy import make_policy
from nwor_vllm.policy.fixed import FixedParams

CURVE = CURVES["h200-8b-eagle"]
SMALL = Curve("small", 1.0, 0.05, 0.03, 0.2, 0.01, additive=True)


def tiny(seed: int, requests: int, length: int, k_max: int) -> Trace:
    rng = np.random.default_rng(seed)
    positions = requests * length
    return Trace(
        starts=np.arange(requests + 1) * length,
        accepted=rng.integers(0, k_max + 1, positions),
        confidence=np.full((positions, k_max), 0.5),
        categories=("x",) * requests,
    )


def brute_force(trace: Trace, curve: Curve, batch: int) -> float:
    """Least seconds to finish `batch` requests that start together, over every choice of lengths in every step."""
    memo: dict[tuple[int, ...], float] = {}

    def rest(at: tuple[int, ...]) -> float:
        running = [r for r in range(batch) if at[r] < trace.starts[r + 1]]
        if not running:
            return 0.0
        if at not in memo:
            options = [
                range(min(int(trace.accepted[at[r]]), int(trace.starts[r + 1]) - at[r] - 1) + 1) for r in running
            ]
            best = np.inf
            for lengths in itertools.product(*options):
                after = list(at)
                for r, k in zip(running, lengths, strict=True):
                    after[r] += k + 1
                n = len(running)
                best = min(best, float(curve.seconds(n, n + sum(lengths), max(lengths))) + rest(tuple(after)))
            memo[at] = best
        return memo[at]

    return rest(tuple(int(s) for s in trace.starts[:batch]))


@pytest.mark.parametrize("seed", range(20))
def test_o3_at_batch_1_is_the_brute_force_optimum(seed: int) -> None:
    trace = tiny(seed, 1, 9, 3)
    rate = oracle.exact_single(Load(trace, (0,), 1, 9), SMALL)
    assert 9 / rate == pytest.approx(brute_force(trace, SMALL, 1))


@pytest.mark.parametrize("seed", range(6))
def test_clairvoyance_in_a_batch_is_near_the_joint_optimum_and_never_above(seed: int) -> None:
    """Two requests that start and end together leave no queue, so the joint optimum is computable."""
    trace = tiny(seed, 2, 8, 3)
    best = 16 / brute_force(trace, SMALL, 2)
    # The load ends when all tokens are out; requests that refill after that are not counted.
    load = Load(trace, (0, 1), 2, 16)
    rates = oracle.fixed_rates(load, SMALL, (0, 1, 2, 3))
    assert max(rates.values()) <= best * 1.35  # refilled slots may help a little at the end of so short a load
    assert oracle.o3(load, SMALL, rates) >= 0.9 * best


@pytest.mark.parametrize("batch", [1, 8])
def test_oracles_are_ordered(batch: int) -> None:
    trace = generate(DOMAINS[1], 24, 60, 8, 3)
    load = Load(trace, tuple(range(24)), batch, 1500)
    rates = oracle.fixed_rates(load, CURVE, (0, 1, 2, 3, 5, 8))
    assert oracle.o3(load, CURVE, rates) >= max(rates.values())
    assert oracle.o2(load, CURVE, (0, 1, 2, 3, 5, 8)) == max(rates.values())  # one batch size: a table is one length


def test_o2_beats_o1_when_the_batch_size_moves() -> None:
    trace = generate(DOMAINS[0], 200, 60, 8, 3)
    load = Load(trace, tuple(range(200)), 1, 12000, batches=(1, 128), period=2000)
    lengths = (0, 1, 2, 3, 5, 8)
    assert oracle.o2(load, CURVE, lengths) > 1.005 * max(oracle.fixed_rates(load, CURVE, lengths).values())


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_policy_replays_as_the_short_cut_does(k: int, batch: int) -> None:
    trace = generate(DOMAINS[2], 12, 40, 8, 5)
    load = Load(trace, tuple(range(12)), batch, 600)
    slow = replay(make_policy("fixed", FixedParams(k), (0, 2, 5, 8)), load, CURVE)
    fast = replay_fixed(load, CURVE, k)
    assert (slow.tokens, slow.steps, slow.rounds) == (fast.tokens, fast.steps, fast.rounds)
    assert slow.seconds == pytest.approx(fast.seconds)


def test_replay_is_lossless_every_output_position_is_emitted_once() -> None:
    trace = generate(DOMAINS[0], 6, 40, 8, 5)
    out = replay(
        make_policy("goodput", None, (0, 1, 3, 8)), Load(trace, tuple(range(6)), 1, int(trace.starts[-1])), CURVE
    )
    assert out.tokens == int(trace.starts[-1])


def test_synthetic_acceptance_and_confidence_are_what_they_claim() -> None:
    domain = Domain("d", 0.7, between=0.5, within=1.6, depth_loss=0.0)
    trace = generate(domain, 200, 100, 6, 0)
    first = (trace.accepted >= 1).mean()
    assert first == pytest.approx(0.7, abs=0.03)
    shown, hit = trace.confidence[:, 0], trace.accepted >= 1
    rng = np.random.default_rng(0)
    good, bad = rng.choice(shown[hit], 20000), rng.choice(shown[~hit], 20000)
    assert 0.72 < (good > bad).mean() < 0.9
    assert (np.diff(trace.starts) > 0).all()


def test_goodput_wins_where_it_must_and_loses_nothing_where_it_cannot() -> None:
    lengths = (0, 1, 2, 3, 5, 8)
    trace = generate(DOMAINS[0], 40, 100, 8, 1)
    load = Load(trace, tuple(range(40)), 1, 3000)
    best = max(oracle.fixed_rates(load, CURVE, lengths).values())
    assert replay(make_policy("goodput", None, lengths), load, CURVE).rate > 1.0 * best
    poor = generate(WORTHLESS, 40, 100, 8, 1)
    load = Load(poor, tuple(range(40)), 8, 6000)
    nothing = replay_fixed(load, CURVE, 0).rate
    assert replay(make_policy("goodput", None, lengths), load, CURVE).rate > 0.98 * nothing
    assert replay(make_policy("acceptance", None, lengths), load, CURVE).rate < 0.95 * nothing


def test_fit_recovers_an_additive_curve() -> None:
    rows = [
        (n, n * (1 + k), k, 0, float(SMALL.seconds(n, n * (1 + k), k))) for n in (1, 2, 4, 8, 16) for k in (0, 1, 3, 8)
    ]
    again = fit(rows, "again")
    for n, verified, steps, _, seconds in rows:
        assert float(again.seconds(n, verified, steps)) == pytest.approx(seconds, rel=1e-3)


def test_command_replays_a_trace(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    from pathlib import Path

    from nwor_vllm.bench import traces

    path = Path(str(tmp_path)) / "t.npz"
    traces.save(generate(DOMAINS[3], 10, 40, 5, 0), path)
    assert cli.main(["simulate", "--trace", str(path), "--batch", "2", "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["over_o3"] <= 1.0
    assert cli.main(["simulate", "--trace", str(path), "--policy", "goodputt"]) == 2
    assert "did you mean 'goodput'" in capsys.readouterr().err
    assert cli.main(["simulate", "--trace", str(path), "--params", '{"spreed": 1}']) == 2
    assert "policy_params.spread" in capsys.readouterr().err
