"""The programmed acceptance is what rounds of any length read off the marks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.errors import ConfigError
from nwor_vllm.zoo.script_marks import Regime, ScriptClass, lay_rings, parse_class
from nwor_vllm.zoo.script_shape import FIRST_FREE, NAMED
from nwor_vllm.zoo.scripted import ScriptedPair

FALLING = parse_class("falling=0.9,0.7,0.5,0.3,0.2")


def hazards(pair: ScriptedPair, name: str, k: int) -> list[tuple[float, int]]:
    """Acceptance given reached, and how often it was reached, over one turn of the ring."""
    ring = next(ring for ring in pair.rings if ring.spec.name == name)
    rounds = pair.expected_rounds(pair.prompt(name, 0), ring.size, k)
    reached = [sum(accepted >= position for accepted in rounds) for position in range(k + 1)]
    return [(after / max(1, before), before) for before, after in pairwise(reached)]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_every_draft_length_reads_the_programmed_acceptance(k: int) -> None:
    pair = ScriptedPair(Path("unwritten"), NAMED["llama-3.1-8b"], (FALLING, parse_class("flat=0.6")))
    for name in ("falling", "flat"):
        programmed = pair.expected_acceptance(name, k)
        for (measured, reached), expected in zip(hazards(pair, name, k), programmed, strict=True):
            if reached > 2500:  # below, chance alone is wider than the tolerance
                assert measured == pytest.approx(expected, abs=0.02), (name, k)


def test_full_rounds_keep_the_share_where_chance_would_not() -> None:
    pair = ScriptedPair(Path("unwritten"), NAMED["llama-3.2-1b"], (FALLING,), seed=7)
    for measured, expected in zip(hazards(pair, "falling", 5), (0.9, 0.7, 0.5, 0.3, 0.2), strict=True):
        assert measured[0] == pytest.approx(expected, abs=0.003)


@given(values=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6), k=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_certainty_is_certain(values: list[float], k: int) -> None:
    spec = ScriptClass("sure", (Regime(tuple(values)),))
    pair = ScriptedPair(Path("unwritten"), NAMED["embedded"], (spec,))
    first_error = next((i for i, value in enumerate(pair.expected_acceptance("sure", k)) if value == 0), k)
    assert set(pair.expected_rounds(pair.prompt("sure", 0), 100, k)) == {first_error}


def test_a_regime_switch_changes_the_rounds_at_the_token_it_names() -> None:
    spec = parse_class("drift=1.0@40/0.0@40")
    pair = ScriptedPair(Path("unwritten"), NAMED["embedded"], (spec,))
    assert pair.expected_acceptance("drift", 2, after=39) == (1, 1)
    assert pair.expected_acceptance("drift", 2, after=40) == (0, 0)
    # 10 rounds of 3 drafts and a bonus reach token 40; from there on, one token a round.
    for i in range(5):
        prompt = pair.prompt("drift", i)
        assert pair.expected_rounds(prompt, 60, 3) == [3] * 10 + [0] * 19
        assert pair.expected_acceptance(prompt, 1, after=41) == (0,)


def test_output_counts_upwards_round_the_ring() -> None:
    pair = ScriptedPair(Path("unwritten"), NAMED["embedded"], (FALLING, parse_class("b=0.5")))
    ring = pair.rings[1]
    end = ring.start + ring.size - 1
    assert pair.expected_output([end - 1], 3) == [end, ring.start, ring.start + 1]
    prompt = pair.prompt("b", 3, length=5, of=8)
    assert prompt[1:] == pair.expected_output(prompt[:1], 4)
    assert len({tuple(pair.prompt("b", i, of=8)) for i in range(8)}) == 8


def test_marks_depend_on_the_seed_alone() -> None:
    rings = [lay_rings([FALLING], 4096, 0.2, seed) for seed in (1, 1, 2)]
    assert rings[0] == rings[1] != rings[2]


def test_blur_is_the_share_of_confidences_that_lie() -> None:
    ring = lay_rings([parse_class("a=0.5,0.5")], 20000, 0.25, 0)[0]
    lies = sum((wrong ^ doubt).bit_count() for wrong, doubt in zip(ring.wrong, ring.doubt, strict=True))
    assert lies / (2 * ring.size) == pytest.approx(0.25, abs=0.01)


def test_parse_class() -> None:
    assert parse_class("0.9,0.5", 3) == ScriptClass("class3", (Regime((0.9, 0.5)),))
    assert parse_class("x=0.9@64/0.3,0.1@32") == ScriptClass("x", (Regime((0.9,), 64), Regime((0.3, 0.1), 32)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.2", "1.2 is outside 0..1"),
        ("a=nan", "nan is outside 0..1"),
        ("a=0.5,,0.2", "cannot read"),
        ("a=", "cannot read"),
        ("=0.5", "needs a name"),
        ("a=0.9/0.5@10", "give each regime a length"),
        ("a=0.9@0", "at least 1 token"),
    ],
)
def test_bad_classes(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_class(text)


def test_rings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="vocab 200 is too small, class 'a' needs a ring of 300 tokens"):
        lay_rings([parse_class("a=0.9@200/0.1@100")], 200, 0.0, 0)
    with pytest.raises(ConfigError, match="class names must differ"):
        lay_rings([FALLING, FALLING], 4096, 0.0, 0)
    with pytest.raises(ConfigError, match="at least one class"):
        lay_rings([], 4096, 0.0, 0)
    assert lay_rings([parse_class("a=0.9@200/0.1@100")], FIRST_FREE + 650, 0.0, 0)[0].size == 600
