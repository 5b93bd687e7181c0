"""A free K = 0: the drafter's K/V catches up, so that acceptance after re-entry is as if drafting had never paused."""

from __future__ import annotations

import types

import pytest

pytestmark = pytest.mark.vllm


def decode(llm, prompts, pauses, max_tokens=60, every=0):
    """Run step by step; `pauses` are the steps at which nothing is drafted. A prompt comes `every` so many steps, or
    all come at once. Tokens, and counts."""
    import vllm

    from nwor_vllm.plugin import control

    core = llm.llm_engine
    params = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    control.apply(llm, {"policy": "fixed", "policy_params": {"k": 3}, "reset": True})
    done, step, paused, come = {}, 0, False, 0
    while core.has_unfinished_requests() or come < len(prompts):
        while come < len(prompts) and step >= come * every:
            core.add_request(f"r{come}", {"prompt_token_ids": list(prompts[come])}, params)
            come += 1
        if (step in pauses) != paused:
            paused = step in pauses
            control.apply(llm, {"policy": "fixed", "policy_params": {"k": 0 if paused else 3}})
        for out in core.step():
            if out.finished:
                done[out.request_id] = tuple(out.outputs[0].token_ids)
        step += 1
    return [done[f"r{i}"] for i in range(len(prompts))], control.snapshot(llm)["counters"]


@pytest.fixture(scope="module", params=["sync", "async", "cached"])
def engine(request, tiny, speculation, engine_settings):
    from nwor_vllm.bench.backends import vllm as backend

    settings = engine_settings | {
        "async_scheduling": request.param != "sync",
        "enable_prefix_caching": request.param == "cached",
        "block_size": 32,
        "max_num_batched_tokens": 160,
    }
    with backend.engine(tiny[0], speculation, **settings) as llm:
        yield llm


@pytest.mark.parametrize("pauses", [range(4, 12), range(3, 50), [5, 6, 9, 10, 11, 14]], ids=["once", "long", "often"])
def test_acceptance_after_a_pause_is_that_of_a_drafter_that_was_fed_all_along(engine, token_prompts, pauses):
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    catch_up = runner.nwor_catch_up
    assert catch_up is not None
    got = decode(engine, token_prompts, pauses)
    runner.nwor_catch_up = None  # stock: the draft prefill runs at every step
    fed = decode(engine, token_prompts, pauses)
    runner.nwor_catch_up = catch_up
    assert got[0] == fed[0]
    assert got[1]["accepted_per_position"] == fed[1]["accepted_per_position"]
    assert got[1]["accepted_tokens"] > 0
    assert got[1]["draft_forwards"] < fed[1]["draft_forwards"]


@pytest.mark.parametrize("pauses", [range(9), range(40), [0, 1, 4, 5, 6, 8]], ids=["first", "long", "often"])
def test_prompts_wait_for_the_first_draft_too(engine, token_prompts, pauses):
    """Prompts come while nothing is drafted, some in chunks; where prefixes are cached they are fed at once."""
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    catch_up, waited = runner.nwor_catch_up, []
    skip = catch_up.skip
    catch_up.skip = lambda *args: waited.append(args[4] is not None) or skip(*args)
    prompts = [*token_prompts, (token_prompts[0] * 60)[:190]]
    got = decode(engine, prompts, pauses, every=2)
    del catch_up.skip
    runner.nwor_catch_up = None
    fed = decode(engine, prompts, pauses, every=2)
    runner.nwor_catch_up = catch_up
    assert got[0] == fed[0]
    assert got[1]["accepted_per_position"] == fed[1]["accepted_per_position"]
    assert got[1]["accepted_tokens"] > 0
    assert got[1]["draft_forwards"] < fed[1]["draft_forwards"]
    assert any(waited) == (not catch_up.shared)


def test_a_drafter_that_missed_its_rows_would_have_been_noticed(engine, token_prompts, monkeypatch):
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    whole = decode(engine, token_prompts, range(4, 30))
    monkeypatch.setattr(runner.nwor_catch_up, "replay", lambda ids, batch: runner.nwor_catch_up.forget(ids) or 0)
    holes = decode(engine, token_prompts, range(4, 30))
    assert holes[0] == whole[0]
    assert holes[1]["accepted_tokens"] < whole[1]["accepted_tokens"]


def test_nothing_is_kept_of_requests_that_are_gone(engine, token_prompts):
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    decode(engine, token_prompts, range(2, 500))
    decode(engine, token_prompts[:1], [])
    assert runner.nwor_catch_up.steps == []


def test_a_step_after_a_request_ended_has_row_numbers_of_its_own():
    """Steps of the same requests share them. Those left behind by a request that ended are not the next step's."""
    import torch

    from nwor_vllm.plugin.catch_up import CatchUp

    cache = types.SimpleNamespace(enable_prefix_caching=False)
    catch_up = CatchUp(types.SimpleNamespace(vllm_config=types.SimpleNamespace(cache_config=cache)))
    for ids in (["a", "b", "c"], ["a", "b", "c"], ["a", "c"], ["c", "a"]):
        if ids == ["a", "c"]:
            catch_up.forget(["b"])
        catch_up.skip(ids, torch.zeros(len(ids)), torch.zeros(len(ids)), None)
    numbers = [{i: rows.start for i, rows in step.rows.items()} for step in catch_up.steps]
    assert numbers == [{"a": 0, "c": 2}] * 2 + [{"a": 0, "c": 1}, {"c": 0, "a": 1}]
    assert catch_up.steps[0].rows is catch_up.steps[1].rows
