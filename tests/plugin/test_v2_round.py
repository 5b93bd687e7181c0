"""A drafting on the V2 runner, judged from logits alone: no vLLM, no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from nwor_vllm.plugin.messages import Orders
from nwor_vllm.plugin.v2_round import DraftRound
from nwor_vllm.policy import StopRule

IDS = ["a", "b", "c"]


def logits_of(confidences: Sequence[float], vocab: int = 5) -> torch.Tensor:
    """Rows whose softmax has these maxima."""
    rest = [math.log((1 - c) / (vocab - 1)) if c < 1 else -1e9 for c in confidences]
    rows = torch.tensor(rest, dtype=torch.float32)[:, None].repeat(1, vocab)
    rows[:, 2] = torch.tensor([math.log(c) for c in confidences])
    return rows


def drafted(
    table: Sequence[Sequence[float]], k: int, orders: Orders, sampled: Sequence[int] = (1, 1, 1)
) -> tuple[DraftRound, int]:
    """Run positions until nobody drafts on, as a speculator would; the round and its draft forwards."""
    now = DraftRound(max_requests=4, max_k=6, device=torch.device("cpu"))
    now.begin(IDS, k, orders, torch.tensor(sampled), torch.tensor([0, 2, 0]))
    forwards = 0
    for position, row in enumerate(table[:k]):
        if forwards and now.exhausted():
            break
        forwards += 1
        now.score(logits_of(row), torch.tensor(position), None)
    return now, forwards


def test_a_fixed_draft_keeps_every_slot() -> None:
    now, forwards = drafted([[0.9, 0.3, 0.5]] * 3, 3, Orders())
    report = now.report(forwards=forwards, prefill_rows=10, pads=True)
    assert (forwards, dict(report.lengths)) == (3, {"a": 3, "b": 3, "c": 3})
    assert report.rows_written == 10 - 2 + 3 * 2  # two rejected rows of b are not written
    assert report.rows_avoided == 2


def test_a_slot_below_the_threshold_ends_its_request_and_the_last_one_ends_the_loop() -> None:
    table = [[0.9, 0.3, 0.9], [0.9, 0.9, 0.2], [0.25, 0.9, 0.9], [0.9, 0.9, 0.9], [0.9, 0.9, 0.9]]
    now, forwards = drafted(table, 5, Orders(StopRule(threshold=0.5)))
    report = now.report(forwards=forwards, prefill_rows=3, pads=True)
    assert dict(report.lengths) == {"a": 2, "b": 0, "c": 1}
    assert forwards == 3
    assert [round(c, 3) for c in report.confidence["a"]] == [0.9, 0.9, 0.25]
    assert [round(c, 3) for c in report.confidence["b"]] == [0.3]
    assert report.rows_written + report.rows_avoided == 3 + 3 * 4
    assert report.rows_written == 3 - 2 + (2 + 0 + 1)


def test_survival_stops_what_no_single_slot_would() -> None:
    now, forwards = drafted([[0.8, 0.99, 0.6]] * 6, 6, Orders(StopRule(min_survival=0.5)))
    assert dict(now.report(forwards=forwards, prefill_rows=3, pads=True).lengths) == {"a": 3, "b": 6, "c": 1}


def test_caps_and_bias_are_per_request() -> None:
    rule = StopRule(verify_cost=0.5)
    now, forwards = drafted([[0.9, 0.9, 0.45]] * 4, 4, Orders(rule, {"a": 1}, bias={"c": 3.0}))
    lengths = now.report(forwards=forwards, prefill_rows=3, pads=True).lengths
    assert dict(lengths) == {"a": 1, "b": 4, "c": 4}


def test_an_unfinished_prompt_drafts_nothing_and_is_not_counted() -> None:
    now, forwards = drafted([[0.9, 0.9, 0.9]] * 4, 4, Orders(), sampled=(0, 0, 0))
    report = now.report(forwards=forwards, prefill_rows=9, pads=False)
    assert (forwards, dict(report.lengths)) == (1, {})


def test_the_rule_follows_the_orders_of_each_step() -> None:
    now, _ = drafted([[0.4, 0.4, 0.4]], 2, Orders(StopRule(threshold=0.5)))
    assert now.exhausted()
    now.begin(IDS, 2, Orders(), torch.ones(3), torch.zeros(3))
    now.score(logits_of([0.4, 0.4, 0.4]), torch.tensor(0), None)
    assert not now.exhausted()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_distribution_keeps_nothing_under_a_rule(bad: float) -> None:
    now = DraftRound(max_requests=3, max_k=2, device=torch.device("cpu"))
    now.begin(IDS, 2, Orders(StopRule(threshold=0.1)), torch.ones(3), torch.zeros(3))
    logits = logits_of([0.9, 0.9, 0.9])
    logits[1] = bad
    now.score(logits, torch.tensor(0), None)
    assert now.report(forwards=1, prefill_rows=3, pads=True).lengths["b"] == 0
