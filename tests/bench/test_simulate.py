from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nwor_vllm.bench import cli, traces
from nwor_vllm.bench.sim import curves, oracle, suite, workloads
from nwor_vllm.bench.sim.curves import CURVES, Measured, Roofline, fit
from nwor_vllm.bench.sim.load import Lanes, Load
from nwor_vllm.bench.sim.replay import replay, replay_fixed
from nwor_vllm.bench.sim.synthetic import DOMAINS, WORTHLESS, Domain, generate
from nwor_vllm.bench.traces import Trace
from nwor_vllm.policy import Plan, Policy, Step, StopRule, make_policy
from nwor_vllm.policy.fixed import FixedParams
from nwor_vllm.policy.stop import evaluate

CURVE = CURVES["h200-8b-eagle"]
SMALL = Roofline("small", 1.0, 0.05, 0.03, 0.2, 0.01, additive=True)
BENT = Roofline("bent", 1.0, 0.05, 0.4, 0.15, 0.01, pad=2)


def tiny(seed: int, requests: int, length: int, k_max: int) -> Trace:
    rng = np.random.default_rng(seed)
    positions = requests * length
    return Trace(
        starts=np.arange(requests + 1) * length,
        accepted=rng.integers(0, k_max + 1, positions),
        confidence=np.full((positions, k_max), 0.5),
        categories=("x",) * requests,
    )


def brute_force(trace: Trace, curve: Roofline, batch: int) -> float:
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


def joint_optimum(trace: Trace, curve: Roofline, batch: int, tokens: int) -> float:
    """The best rate of clients that begin again when their text ends, over every choice of lengths in every step."""

    def surplus(price: float) -> float:
        memo: dict[tuple[int, ...], float] = {}

        def rest(at: tuple[int, ...], left: int) -> float:
            if left <= 0:
                return 0.0
            if (*at, left) not in memo:
                best = -np.inf
                options = [range(min(int(trace.accepted[p]), ends[p] - p - 1) + 1) for p in at]
                for lengths in itertools.product(*options):
                    after = (p + k + 1 for p, k in zip(at, lengths, strict=True))
                    then = tuple(a if a < ends[p] else starts[p] for a, p in zip(after, at, strict=True))
                    gain = batch + sum(lengths)
                    value = gain - price * times[sum(lengths), max(lengths)] + rest(then, left - gain)
                    best = max(best, value)
                memo[(*at, left)] = best
            return memo[(*at, left)]

        return rest(tuple(trace.starts[:batch].tolist()), tokens)

    sizes = np.diff(trace.starts)
    starts, ends = np.repeat(trace.starts[:-1], sizes).tolist(), np.repeat(trace.starts[1:], sizes).tolist()
    k = trace.k_max
    times = {(v, d): float(curve.seconds(batch, batch + v, d)) for v in range(batch * k + 1) for d in range(k + 1)}
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize("curve", [SMALL, BENT], ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(4))
def test_in_a_batch_the_schedule_found_is_near_the_joint_optimum_and_never_above(seed: int, curve: Roofline) -> None:
    trace = tiny(seed, 2, 7, 3)
    optimum = joint_optimum(trace, curve, 2, 28)
    found = oracle.clairvoyant(Load(trace, (0, 1), 2, 28, together=True), curve)
    assert 0.94 * optimum < found <= optimum * (1 + 1e-6)


@pytest.mark.parametrize("curve", [SMALL, BENT], ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_passes_the_bound(seed: int, curve: Roofline) -> None:
    """Requests that start together and are not replaced: what is left alone at the end only costs more."""
    trace = tiny(seed, 2, 9, 3)
    assert oracle.bound(Load(trace, (0, 1), 2, 18), curve) >= 18 / brute_force(trace, curve, 2) * (1 - 1e-9)


def test_the_bound_is_tight_where_all_requests_are_alike() -> None:
    trace = Trace(np.arange(5) * 20, np.full(80, 3), np.full((80, 4), 0.9), ("x",) * 4)
    load = Load(trace, (0, 1, 2, 3), 4, 80, together=True)
    best = max(oracle.fixed_rates(load, SMALL, (0, 1, 2, 3, 4)).values())
    assert oracle.bound(load, SMALL) == pytest.approx(best)
    assert oracle.clairvoyant(load, SMALL) == pytest.approx(best)


@pytest.mark.parametrize("batch", [1, 8])
def test_oracles_are_ordered(batch: int) -> None:
    trace = generate(DOMAINS[1], 24, 60, 8, 3)
    load = Load(trace, tuple(range(24)), batch, 1500)
    lengths = (0, 1, 2, 3, 5, 8)
    rates = oracle.fixed_rates(load, CURVE, lengths)
    assert oracle.o3(load, CURVE, rates) >= max(rates.values())
    assert oracle.bound(load, CURVE) >= 0.99 * oracle.o3(load, CURVE, rates)
    assert oracle.o2(load, CURVE, lengths, rates) == max(rates.values())  # one batch size: a table is one length


@pytest.mark.parametrize("batch", [1, 3])
def test_the_best_rule_is_the_best_of_all_served_one_by_one(batch: int) -> None:
    trace = generate(DOMAINS[2], 12, 40, 6, 1)
    load = Load(trace, tuple(range(12)), batch, 400, together=True)

    def serve(cap: int, threshold: float) -> float:
        texts = [
            [p for r in range(c, 12, batch) for p in range(*trace.starts[r : r + 2].tolist())] for c in range(batch)
        ]
        at, tokens, seconds = [0] * batch, 0, 0.0
        while tokens < load.tokens:
            verified, drafted = 0, 0
            for c, text in enumerate(texts):
                end = next(e for e in trace.starts[1:] if e > text[at[c]])
                sure = itertools.takewhile(lambda s: s >= threshold, np.cumprod(trace.confidence[text[at[c]]]))
                kept = min(len(list(sure)), cap)
                verified, drafted = verified + kept, max(drafted, min(kept + 1, cap))
                gain = min(kept, int(trace.accepted[text[at[c]]]), int(end) - text[at[c]] - 1) + 1
                at[c] = (at[c] + gain) % len(text)
                tokens += gain
            seconds += float(SMALL.seconds(batch, batch + verified, drafted, drafted))
        return tokens / seconds

    best = max(serve(cap, threshold) for cap in (2, 3, 6) for threshold in oracle.THRESHOLDS)
    assert oracle.best_rule(load, SMALL, (0, 1, 2, 3, 6)) == pytest.approx(best)


def test_o2_beats_o1_when_the_batch_size_moves() -> None:
    trace = generate(DOMAINS[0], 200, 60, 8, 3)
    load = Load(trace, tuple(range(200)), 1, 12000, batches=(1, 128), period=2000)
    lengths = (0, 1, 2, 3, 5, 8)
    rates = oracle.fixed_rates(load, CURVE, lengths)
    assert oracle.o2(load, CURVE, lengths, rates) > 1.005 * max(rates.values())


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


def test_clients_serve_their_texts_end_to_end() -> None:
    trace = generate(DOMAINS[2], 6, 40, 8, 5)
    lanes = Lanes(Load(trace, (3, 1, 4, 0), 2, 100))
    lengths = np.diff(trace.starts)
    first = lanes.position[lanes.first[0] : lanes.last[0]]
    assert first[: lengths[3]].tolist() == list(range(trace.starts[3], trace.starts[4]))
    assert first[lengths[3]] == trace.starts[4]  # dealt in turn: client 0 has requests 3 and 4
    assert (lanes.kept <= lanes.room).all()
    assert lanes.room[lanes.last - 1].tolist() == [0, 0]


def test_clients_are_not_all_at_the_same_place_of_their_texts() -> None:
    trace = generate(DOMAINS[2], 4, 40, 8, 5)
    lengths = np.diff(trace.starts)
    lanes = Lanes(Load(trace, (0, 1, 2, 3), 4, 100))
    assert (lanes.start - lanes.first).tolist() == [0, lengths[1] // 4, lengths[2] // 2, 3 * lengths[3] // 4]
    lanes = Lanes(Load(trace, (0, 1, 2, 3), 4, 100, together=True))
    assert lanes.start.tolist() == lanes.first.tolist()


class Scripted:
    """A policy with one plan, that keeps what it is told."""

    name = "scripted"

    def __init__(self, plan: Plan) -> None:
        self.next, self.steps, self.gone = plan, [], []

    def begin(self, request_id: str, kind: str) -> None:
        pass

    def plan(self, requests, context_tokens=0):
        return self.next

    def observe(self, step: Step) -> None:
        self.steps.append(step)

    def forget(self, request_id: str) -> None:
        self.gone.append(request_id)


@pytest.mark.parametrize("batch", [2, 16])  # judged in plain Python, and with numpy
def test_replay_applies_the_stop_rule_as_it_is_stated(batch: int) -> None:
    trace = generate(DOMAINS[2], 20, 40, 8, 5)
    rule = StopRule(verify_cost=0.3, draft_cost=0.2, calibration=((0.1, 0.9),))
    load = Load(trace, tuple(range(20)), batch, 40, together=True)
    policy = Scripted(Plan(8, {"1": 2}, rule, {"2": 0.5}))
    replay(policy, load, CURVE)
    step, lanes = policy.steps[0], Lanes(load)
    caps, bias = np.full(batch, 8), np.zeros(batch)
    caps[0], bias[1] = 2, 0.5
    steps, kept = evaluate(rule, 8, caps, bias, trace.confidence[lanes.position[lanes.first]])
    assert step.draft_steps == steps
    assert [r.verified for r in step.rounds] == kept.tolist()
    assert step.verified_tokens == batch + kept.sum()


def test_unwatched_drafts_show_no_confidence_and_cost_no_judging() -> None:
    trace = generate(DOMAINS[2], 20, 40, 8, 5)
    load = Load(trace, tuple(range(20)), 2, 200)
    plain, watched = Scripted(Plan(3, watch=False)), Scripted(Plan(3))
    less, more = replay(plain, load, CURVE), replay(watched, load, CURVE)
    assert {r.confidence for s in plain.steps for r in s.rounds} == {()}
    assert any(r.confidence for s in watched.steps for r in s.rounds)
    assert more.seconds - less.seconds == pytest.approx(3 * CURVE.judge * more.steps)


def test_a_text_that_ends_is_no_evidence_about_the_drafts_beyond_it() -> None:
    trace = Trace(np.array([0, 3, 6]), np.full(6, 5), np.full((6, 5), 0.9), ("x", "x"))
    policy = Scripted(Plan(5))
    out = replay(policy, Load(trace, (0, 1), 1, 6), CURVE)
    assert [(r.verified, r.accepted) for s in policy.steps for r in s.rounds] == [(2, 2), (2, 2)]
    assert out.tokens == 6
    assert out.verified == 10  # what the engine verifies all the same
    assert policy.gone == ["1", "2", "3"]  # and who still ran at the end


def test_bursts_change_how_many_run() -> None:
    trace = generate(DOMAINS[2], 60, 40, 8, 5)
    load = Load(trace, tuple(range(60)), 2, 3000, batches=(2, 12), period=500)
    policy = Scripted(Plan(2))
    slow, fast = replay(policy, load, CURVE), replay_fixed(load, CURVE, 2)
    running = [s.requests for s in policy.steps]
    assert min(running) == 2
    assert max(running) == 12
    assert (slow.tokens, slow.steps, slow.rounds) == (fast.tokens, fast.steps, fast.rounds)


class BadClock:
    """A policy behind a clock that stands still, runs backwards, or slept for ten minutes, every few steps."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.wrong = policy, itertools.cycle((600.0, -3.0, 0.0, math.nan, 1e-9, math.inf))
        self.begin, self.plan, self.forget, self.seen = policy.begin, policy.plan, policy.forget, 0

    def observe(self, step: Step) -> None:
        self.seen += 1
        self.policy.observe(replace(step, seconds=next(self.wrong)) if self.seen % 5 == 0 else step)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["goodput", "throughput", "acceptance", "feedback"])
def test_a_clock_that_is_wrong_every_fifth_step_is_survived(name: str, batch: int) -> None:
    lengths = (0, 1, 3, 8)
    trace = generate(DOMAINS[1], 40, 60, 8, 3)
    load = Load(trace, tuple(range(40)), batch, 1500 * max(1, batch // 3))
    right = replay(make_policy(name, None, lengths), load, CURVE)
    wrong = replay(BadClock(make_policy(name, None, lengths)), load, CURVE)
    assert wrong.rate > (0.95 if name == "goodput" else 0.5) * right.rate


def test_an_unsteady_machine_costs_little() -> None:
    """What lengths cost while others used the machine must not decide for long: .943 without the pace, .974 with it."""
    curve, pool = curves.find("plain"), workloads.recorded()
    ratios = []
    for name, batch in (("json@0", 32), ("json@0.7", 32), ("json@0", 128)):
        for seed in range(3):
            work = workloads.Workload("stationary", name, batch)
            load = workloads.load_of(work, seed, suite.tokens_of(batch), pool)
            best = max(oracle.fixed_rates(load, curve, suite.LENGTHS).values())
            policy = make_policy("goodput", None, suite.LENGTHS)
            ratios.append(replay(policy, load, curve, seed, unsteady=True).rate / best)
    assert suite.geomean(ratios) > 0.96


def test_fit_follows_measured_rows() -> None:
    sizes, lengths = (1, 2, 4, 8, 16), (0, 1, 3, 8)
    rows = [
        (n, n * (1 + v), d, d, 0, float(SMALL.seconds(n, n * (1 + v), d)))
        for n in sizes
        for v in lengths
        for d in lengths
    ]
    rng = np.random.default_rng(0)
    rows = [(*row[:5], row[5] * (5 if rng.random() < 0.05 else 1)) for row in rows]  # hiccups of the machine
    curve = fit(rows, "again")
    for n in (1, 3, 8, 12, 24):
        for k in lengths:
            assert float(curve.seconds(n, n * (1 + k), k)) == pytest.approx(
                float(SMALL.seconds(n, n * (1 + k), k)), rel=0.02
            )
    grid = curve.seconds(8, 8 * (1 + np.arange(16)), np.arange(16)[:, None])
    assert (np.diff(grid, axis=0) >= 0).all()
    assert (np.diff(grid, axis=1) >= 0).all()
    assert isinstance(curve, Measured)


def test_the_suite_says_what_policy_and_oracles_reach() -> None:
    pool = {name: trace for name, trace in workloads.synthetic().items() if name in (workloads.EASY, workloads.HARD)}
    chosen = [w for w in workloads.workloads(pool, (1,)) if w.kind in ("mixed", "switch", "misleading")]
    rows = suite.run([suite.Task(w, 0, CURVE, "fixed", {"k": 3}) for w in chosen], pool, 1)
    assert [r["name"] for r in rows] == [w.name for w in chosen]
    for row in rows:
        assert row["over_bound"] <= row["over_o3"] <= 1.0 + 1e-9
        assert row["over_o1"] <= 1.0 + 1e-9
    figures = suite.summary(rows)
    assert figures["mixed_over_o1"] == min(row["over_o1"] for row in rows[:2])
    assert figures["worst_over_no_spec"] < 0.9  # three drafts a round, hardly one kept
    assert figures["oracles"]["o3_over_o1_moving"].keys() == {"mixed 1", "switch 1"}


def test_command_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.npz"
    traces.save(generate(DOMAINS[3], 10, 40, 5, 0), path)
    assert cli.main(["simulate", "--trace", str(path), "--cost", "h200-8b-eagle", "--batch", "2", "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["over_o3"] <= 1.0
    assert cli.main(["simulate", "--trace", str(path), "--policy", "goodputt"]) == 2
    assert "did you mean 'goodput'" in capsys.readouterr().err
    assert cli.main(["simulate", "--trace", str(path), "--params", '{"spreed": 1}']) == 2
    assert "policy_params.spread" in capsys.readouterr().err


def test_files_are_served_mixed_so_that_policy_and_oracles_see_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the files, the first ones alone would be served, and the clairvoyant be paid for all."""
    easy, hard = (next(d for d in DOMAINS if d.name == name) for name in ("code", "creative"))
    for domain in (easy, hard):
        traces.save(generate(domain, 60, 80, 10, 0), tmp_path / f"{domain.name}.npz")
    shares = []
    for names in (("code", "creative"), ("creative", "code")):
        files = [str(tmp_path / f"{name}.npz") for name in names]
        assert cli.main(["simulate", "--trace", *files, "--batch", "1", "--json"]) == 0
        (cell,) = json.loads(capsys.readouterr().out)["cells"]
        shares.append(cell["over_o3"])
        assert cell["rule_over_o1"] >= 1.0
    assert abs(shares[0] - shares[1]) < 0.08
