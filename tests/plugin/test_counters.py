"""What is counted: every step once, and by the counters that were in force when it was planned."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm

GREEDY = {"temperature": 0.0, "max_tokens": 24}
EARLY = {"policy": "fixed", "early_exit": {"threshold": 0.2}}
WHOLE = {"policy": "fixed", "early_exit": {"threshold": 0.0}}


def test_a_step_in_flight_when_the_counters_are_reset_is_not_counted(
    tiny, speculation, engine_settings, token_prompts, monkeypatch
):
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin.counters import Counters

    def counted(llm, stop):
        backend.switch(llm, EARLY)
        backend.generate(llm, token_prompts[:1], **GREEDY, stop_token_ids=stop)  # one more step was planned by then
        backend.switch(llm, WHOLE)
        backend.generate(llm, token_prompts, **GREEDY)
        return backend.counters(llm)

    with backend.engine(tiny[0], speculation, **engine_settings | {"async_scheduling": True}) as llm:
        stop = backend.generate(llm, token_prompts[:1], **GREEDY)[0][12:13]
        counts = counted(llm, stop)
        assert counts["draft_forwards_saved"] == counts["tokens_stopped_by_confidence"] == 0
        init = Counters.__init__
        monkeypatch.setattr(Counters, "__init__", lambda self, *a: (init(self, *a), setattr(self, "number", 0))[0])
        blind = counted(llm, stop)
        assert blind["steps"] == counts["steps"] + 1
        assert blind["draft_forwards_saved"] > 0
