from __future__ import annotations

import numpy as np
import pytest

from nwor_vllm.policy.calibration import Calibration
from nwor_vllm.policy.requests import KINDS, Effects, Groups, Slots
from nwor_vllm.policy.survival import Survival

TRUTH = np.array([0.85, 0.75, 0.6, 0.5, 0.4])


def rounds(rng: np.random.Generator, n: int, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hits = rng.random((n, len(TRUTH))) < TRUTH
    run = np.where(hits.all(axis=1), len(TRUTH), np.argmin(hits, axis=1))
    return lengths, np.minimum(run, lengths)


def test_hazards_are_unbiased_whatever_lengths_are_drafted() -> None:
    """Censoring by the draft length and by rejections leaves the estimate at the truth, run after run."""
    errors = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        survival = Survival(5, spread=1e-6, keep=1.0, memory=1e9)
        for _ in range(300):
            verified, accepted = rounds(rng, 16, rng.integers(0, 6, 16))
            survival.observe(
                np.zeros(16, np.int64), Groups(np.zeros(16, np.int64)), verified, accepted, np.full(16, np.nan)
            )
        errors.append(survival.hazards(np.array([0]))[0] - TRUTH)
    mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0, ddof=1) / np.sqrt(8)
    assert np.all(np.abs(mean) < 4 * spread + 0.005)


def test_the_naive_ratio_is_biased_so_the_test_can_tell() -> None:
    rng = np.random.default_rng(0)
    verified, accepted = rounds(rng, 20000, rng.integers(1, 6, 20000))
    naive = accepted.sum() / verified.sum()
    reached = np.minimum(accepted + 1, verified).sum()
    assert naive < accepted.sum() / reached - 0.1


def test_stopping_on_confidence_does_not_flatter_deep_positions() -> None:
    """Half the positions are hopeless and the drafter sees it: what it does not verify counts with its confidence."""
    rng = np.random.default_rng(1)
    with_soft, without = (Survival(2, 1e-6, 1.0, 1e9) for _ in range(2))
    rows = np.zeros(32, np.int64)
    for _ in range(400):
        chance = np.where(rng.random((32, 2)) < 0.5, 0.9, 0.1)
        keep = chance > 0.5
        verified = np.where(~keep[:, 0], 0, np.where(keep[:, 1], 2, 1))
        hits = rng.random((32, 2)) < chance
        run = np.where(hits.all(axis=1), 2, np.argmin(hits, axis=1))
        accepted = np.minimum(run, verified)
        soft = np.where(verified < 2, chance[np.arange(32), np.minimum(verified, 1)], np.nan)
        with_soft.observe(rows, Groups(rows), verified, accepted, soft)
        without.observe(rows, Groups(rows), verified, accepted, np.full(32, np.nan))
    assert with_soft.hazards(rows[:1])[0] == pytest.approx([0.5, 0.5], abs=0.04)
    assert without.hazards(rows[:1])[0, 0] > 0.8


def test_a_request_learns_its_own_offset() -> None:
    rng = np.random.default_rng(2)
    survival = Survival(4, spread=1.0, keep=0.98, memory=150)
    rows = np.array([1, 2])
    for _ in range(60):
        hits = rng.random((2, 4)) < np.array([[0.95], [0.2]])
        run = np.where(hits.all(axis=1), 4, np.argmin(hits, axis=1))
        survival.observe(rows, Groups(rows), np.array([4, 4]), run, np.full(2, np.nan))
    good, poor = survival.hazards(rows)[:, 0]
    assert good > 0.8
    assert poor < 0.45


@pytest.mark.parametrize("truth", [0.0, 0.5, 1.5])
def test_how_much_requests_differ_is_learnt_from_those_that_end(truth: float) -> None:
    rng, spread = np.random.default_rng(4), 1.0
    effects = Effects(spread, keep=1.0)
    rows = np.arange(1, 9)
    for _ in range(60):
        effects.begin(Slots(), rows.tolist())
        mine = truth * rng.normal(size=len(rows))
        for _ in range(30):  # rounds of one draft, base log-odds 0
            p = 1 / (1 + np.exp(-effects.mean[rows]))
            hit = rng.random(len(rows)) < 1 / (1 + np.exp(-mine))
            effects.update(Groups(rows), hit - p, p * (1 - p))
        effects.end(rows.tolist())
    assert np.sqrt(effects.prior) == pytest.approx(max(truth, np.sqrt(0.05)), abs=0.25)


def test_kinds_that_differ_begin_where_those_before_them_ended() -> None:
    rng, slots, truth = np.random.default_rng(5), Slots(), {"greedy": 1.0, "sampled": -1.0, "": 0.0}
    effects = Effects(1.0, keep=0.98)
    for turn in range(30):
        names = {f"{kind} {turn}": kind for kind in truth}
        for name, kind in names.items():
            slots.begin(name, kind)
        rows, fresh = slots.rows(list(names))
        effects.begin(slots, fresh)
        mine = np.array(list(truth.values())) + 0.3 * rng.normal(size=len(rows))
        for _ in range(30):
            p = 1 / (1 + np.exp(-effects.mean[rows]))
            hit = rng.random(len(rows)) < 1 / (1 + np.exp(-mine))
            effects.update(Groups(rows), hit - p, p * (1 - p))
        effects.end([slots.forget(name) for name in names])
    level = [effects.level[slots.kinds[kind]] for kind in truth]
    assert level == pytest.approx([1.0, -1.0, 0.0], abs=0.35)
    assert effects.prior < 0.4  # what is left: they are more alike within a kind


def test_a_single_kind_is_no_kind() -> None:
    effects = Effects(1.0, keep=0.98)
    effects.mean[1:9] = 0.7
    effects.var[1:9] = 0.1
    effects.end(list(range(1, 9)))
    assert effects.level[0] == 0.0


def test_kinds_beyond_those_there_is_room_for_are_like_requests_of_no_kind() -> None:
    slots = Slots()
    for i in range(2 * KINDS):
        slots.begin(str(i), f"label {i}")
    rows, _ = slots.rows(["0", str(2 * KINDS - 1)])
    assert slots.kind[rows].tolist() == [1, 0]
    for i in range(2 * KINDS):
        slots.forget(str(i))
    assert slots.told == {}


def test_requests_that_show_nothing_change_nothing_however_many_there_are() -> None:
    effects = Effects(1.0, keep=0.98)
    for _ in range(400):
        effects.end(list(range(1, 60)) * 20)
    assert effects.prior == pytest.approx(1.0)


def test_calibration_finds_a_timid_drafter_and_says_so() -> None:
    rng = np.random.default_rng(3)
    calibration = Calibration(1, spread=1e-6, keep=1.0, memory=1e9)
    rows, full = np.zeros(64, np.int64), np.ones(64, np.int64)
    for _ in range(400):
        odds = rng.normal(0.5, 2.0, 64)
        truth = 1 / (1 + np.exp(-odds))
        shown = 1 / (1 + np.exp(-(0.5 * odds + 0.4)))
        hit = (rng.random(64) < truth).astype(np.int64)
        calibration.observe(rows, Groups(rows), full, hit, shown[:, None])
    a, b = calibration.weights[0]
    assert b == pytest.approx(2.0, abs=0.1)
    assert a == pytest.approx(-0.8, abs=0.1)
    assert calibration.error() < 0.03
    assert 0.8 < calibration.auc() < 0.95
