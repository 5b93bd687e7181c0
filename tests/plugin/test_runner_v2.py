"""Trimming an asynchronous step in the worker's own copy."""

from __future__ import annotations

from dataclasses import dataclass, field

from nwor_vllm.plugin.runner_v2 import trimmed


@dataclass
class PlannedStep:
    """The three fields of vLLM's SchedulerOutput that a draft's length shows in."""

    num_scheduled_tokens: dict[str, int]
    scheduled_spec_decode_tokens: dict[str, list[int]]
    total_num_scheduled_tokens: int
    finished_req_ids: set[str] = field(default_factory=set)


def step() -> PlannedStep:
    return PlannedStep({"a": 4, "b": 4, "c": 9}, {"a": [-1] * 3, "b": [-1] * 3}, 17, {"z"})


def test_each_request_keeps_its_length_and_the_original_is_untouched() -> None:
    planned = step()
    out, cut = trimmed(planned, {"a": 1, "b": 0, "c": 5, "gone": 0})
    assert cut == {"a": 2, "b": 3}
    assert out.num_scheduled_tokens == {"a": 2, "b": 1, "c": 9}
    assert out.scheduled_spec_decode_tokens == {"a": [-1]}
    assert out.total_num_scheduled_tokens == sum(out.num_scheduled_tokens.values()) == 12
    assert out.finished_req_ids == {"z"}
    assert planned == step()


def test_a_step_with_nothing_to_trim_is_passed_on_as_it_is() -> None:
    planned = step()
    assert trimmed(planned, {"a": 3, "b": 7}) == (planned, {})
    assert trimmed(planned, {})[0] is planned
