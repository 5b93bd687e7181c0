"""What scheduler and workers tell each other: orders ride on a step's input, the report on its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nwor_vllm.policy import StopRule

NO_RULE = StopRule()


@dataclass(frozen=True, slots=True)
class Orders:
    """What the drafter may do in the coming step, beyond the step's draft length."""

    stop: StopRule = NO_RULE
    caps: Mapping[str, int] = field(default_factory=dict)
    bias: Mapping[str, float] = field(default_factory=dict)  # on the log-odds of a request's calibrated confidences
    observe: bool = False  # report confidences even where nothing can stop


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One drafting as it went, for all requests of the batch."""

    k: int
    forwards: int  # draft forwards really run, the draft prefill included
    lengths: Mapping[str, int] = field(default_factory=dict)  # draft tokens kept, by request that drafts
    confidence: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of the tokens drafted for the request
    rows_written: int = 0  # draft-layer KV rows, per layer
    rows_avoided: int = 0
    cut: Mapping[str, int] = field(default_factory=dict)  # placeholders of THIS step that the worker did not verify


NO_ORDERS = Orders()


def orders_of(scheduler_output: Any) -> Orders:
    orders: Orders = getattr(scheduler_output, "nwor", NO_ORDERS)
    return orders


def report_of(model_runner_output: Any) -> DraftReport | None:
    return getattr(model_runner_output, "nwor", None)
