"""The headline's arithmetic, on rates whose answer is known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from nwor_vllm import zoo
from nwor_vllm.errors import ConfigError, CorruptFileError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "elastic_vs_fixed.py"


@pytest.fixture(scope="module")
def headline() -> Any:
    spec = importlib.util.spec_from_file_location("elastic_vs_fixed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rates(headline: Any) -> dict[str, list[float]]:
    """Blocks differ by a drift that all arms share: paired ratios are exact all the same."""
    speed = dict.fromkeys(headline.arms(), 100.0) | {"fixed_3": 150.0, "fixed_5": 140.0, "goodput": 165.0}
    drift = (1.0, 0.8, 1.3, 0.9, 1.1, 1.0)
    return {arm: [value * d for d in drift] for arm, value in speed.items()}


def test_best_fixed_in_hindsight_and_paired_ratios(headline: Any) -> None:
    summary = headline.summarise(rates(headline))
    assert summary["best_fixed"] == "fixed_3"
    goodput = summary["arms"]["goodput"]
    assert goodput["over_best_fixed"]["ratio"] == pytest.approx(1.1)
    assert goodput["over_best_fixed"]["low"] == pytest.approx(1.1)
    assert goodput["over_no_speculation"]["ratio"] == pytest.approx(1.65)


def test_the_table_shows_every_cell(headline: Any) -> None:
    cell = {"workload": "mixed", "temperature": 0.8, "concurrency": 4}
    done = {"cell": cell, "summary": headline.summarise(rates(headline))}
    results = {"command": "c", "target": "wide", "drafter": "eagle", "hardware": {}, "cells": {json.dumps(cell): done}}
    row = next(line for line in headline.markdown(results).splitlines() if line.startswith("| mixed"))
    assert [part.strip() for part in row.strip("|").split("|")][:4] == ["mixed", "0.8", "4", "3"]
    assert "1.650 (1.65-1.65)" in row and "1.100 (1.10-1.10)" in row


def test_every_fixed_arm_is_on_the_ladder(headline: Any) -> None:
    for arm in headline.arms():
        if arm.startswith("fixed_"):
            assert headline.setting(arm)["policy_params"]["k"] in headline.LADDER


def test_every_domain_is_asked_for_greedy_and_for_sampled_texts(headline: Any) -> None:
    from nwor_vllm import zoo

    seen = set()
    cell = {"workload": headline.BOTH, "temperature": 0.8, "requests": len(zoo.DOMAINS)}
    for block in (-1, 0):
        rows = zoo.prompts("all", 2 * cell["requests"], 1)[cell["requests"] * (block + 1) :]
        found = headline.temperatures(cell, block)
        seen |= {(row["domain"], t) for row, t in zip(rows, found, strict=False)}
    assert seen == {(domain, t) for domain in zoo.DOMAINS for t in (0.0, 0.8)}
    assert set(headline.temperatures(cell | {"workload": "mixed"}, 0)) == {0.8}


def test_the_regime_switches_in_the_middle(headline: Any) -> None:
    found = [headline.texts(headline.SWITCH, 2, 1, block, 4) for block in range(-1, 4)]
    assert found[:3] == [headline.texts("code", 2, 1, block, 4) for block in (-1, 0, 1)]
    assert found[3:] == [headline.texts("creative", 2, 1, block, 4) for block in (2, 3)]


def test_small_blocks_together_are_mixed(headline: Any) -> None:
    seen = [text for block in range(-1, 7) for text in headline.texts("mixed", 2, 1, block, 7)]
    assert sorted(seen) == sorted(row["prompt"] for row in zoo.prompts("all", 16, 1))


def test_arms_take_turns(headline: Any) -> None:
    """One request in flight: every request is a turn of all arms; several: three for each are. Orders are reversed in
    turn, and no arm is always first."""
    names, requests = headline.arms(), 8
    for block in (-1, 0, 1):
        single = list(headline.turns(names, block, requests, 1))
        assert [range(requests)[mine] for _, mine, _ in single] == [range(i, i + 1) for i in range(requests)]
        several = list(headline.turns(names, block, 20, 2))
        assert [range(20)[mine] for _, mine, _ in several] == [range(6), range(6, 12), range(12, 18), range(18, 20)]
        assert [number for number, _, _ in several] == [4 * block + i for i in range(4)]
        assert all(sorted(order) == sorted(names) for _, _, order in single)
    numbers = [number for block in (-1, 0, 1) for number, _, _ in headline.turns(names, block, requests, 1)]
    assert numbers == list(range(-requests, 2 * requests))
    orders = [order for _, _, order in headline.turns(names, 0, requests, 1)]
    assert orders[1] == orders[0][::-1]
    assert len({order[0] for order in orders}) > 2


def test_results_of_other_code_are_not_mixed(headline: Any, tmp_path: Path) -> None:
    fresh = {"version": 1, "target": "t", "drafter": "d", "table": [], "versions": {}, "code": "a", "cells": {}}
    path = tmp_path / "r.json"
    assert headline.load(path, fresh) == fresh
    path.write_text(json.dumps({**fresh, "code": "b"}))
    with pytest.raises(ConfigError, match="other code"):
        headline.load(path, fresh)
    path.write_text("{")
    with pytest.raises(CorruptFileError, match=r"r\.json"):
        headline.load(path, fresh)
