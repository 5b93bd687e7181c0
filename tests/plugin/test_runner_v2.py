"""Trimming an asynchronous step in the worker's own copy, and what an engine's settings allow to be trimmed at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from nwor_vllm.plugin.drafter_v2 import ElasticDrafter
from nwor_vllm.plugin.graph_memory import GraphMemory
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


class Captures:
    """vLLM's runner, as far as it captures graphs: only machines with a GPU do."""

    vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens_per_batch_size=[(1, 1, 8), (2, 2, 0)])
    )

    def capture_model(self, *, profile_only: bool = False) -> int:
        return 5 if profile_only else 3 << 20


def test_the_memory_of_captured_graphs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    runner = type("Runner", (GraphMemory, Captures), {})()
    with caplog.at_level("INFO", "vllm.nwor"):
        assert runner.capture_model(profile_only=True) == 5 and runner.nwor_graph_bytes is None
        assert runner.capture_model() == runner.nwor_graph_bytes == 3 << 20
    assert [r.getMessage() for r in caplog.records] == ["nwor: CUDA graphs take 3 MiB; draft lengths: 0, 8"]


def speculator(**settings: Any) -> Any:
    """The settings of a speculator that decide; on a machine without a GPU no engine has CUDA graphs."""
    usual = {"nwor_exits": True, "nwor_async": False, "enable_adaptive_verification": False, "dp_size": 1}
    usual |= {"pcp_manager": None, "use_local_argmax_reduction": False, "draft_watermarker": None}
    parallel = SimpleNamespace(pipeline_parallel_size=settings.pop("pipeline", 1))
    return SimpleNamespace(**(usual | settings), vllm_config=SimpleNamespace(parallel_config=parallel))


@pytest.mark.parametrize(
    ("settings", "graphs", "mode", "words"),
    [
        ({}, False, "exact", "their loop ends with the last"),
        ({}, True, "exact", "draft loops inside CUDA graphs run to the step's length"),
        ({"nwor_async": True}, False, "exact", "their loop ends with the last"),
        ({"nwor_async": True}, True, "length", "speculative_config.enable_adaptive_verification would trim"),
        ({"nwor_async": True, "enable_adaptive_verification": True}, True, "native", "nwor chooses the draft length"),
        ({"pipeline": 2}, False, "length", "(pipeline parallelism)"),
        ({"dp_size": 2}, False, "length", "(data parallelism)"),
        ({"nwor_exits": False}, False, "length", "(a hook is missing)"),
    ],
)
def test_the_log_says_what_is_trimmed_and_why_not_more(
    settings: dict[str, Any], graphs: bool, mode: str, words: str
) -> None:
    found, why = ElasticDrafter.nwor_resolve(speculator(**settings), graphs)
    assert found == mode and words in why
