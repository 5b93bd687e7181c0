"""The plugin in a real engine on the V1 runner, sync and async: same output, true counts, live control."""

from __future__ import annotations

import itertools
import statistics
import time
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.vllm

GREEDY = {"temperature": 0.0, "max_tokens": 24}
RULES = [
    {"policy": "fixed", "early_exit": {"threshold": 0.0, "min_survival": 0.0}},
    {"policy": "fixed", "policy_params": {"k": 2}},
    {"policy": "off"},
    {"policy": "fixed", "early_exit": {"threshold": 0.2}},
    {"policy": "fixed", "early_exit": {"threshold": 0.0, "min_survival": 0.05}},
    {"policy": "goodput", "early_exit": {"threshold": 0.05, "min_survival": 0.0}},
]


def mixed_sampling():
    """One of everything that looks at logits or stops."""
    return [
        {"logprobs": 3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.0, "logprobs": 2},
        {"repetition_penalty": 1.3},
        {"stop_token_ids": list(range(2, 120))},
        {"min_tokens": 10, "stop_token_ids": list(range(2, 400))},
        {"ignore_eos": False},
        {"max_tokens": 1},
        {"prompt_logprobs": 2, "max_tokens": 6},
        {"allowed_token_ids": list(range(5, 60))},
        {"max_tokens": 200},
    ]


def ask(llm, prompts):
    import vllm

    params = [
        vllm.SamplingParams(**({"temperature": 0.0, "max_tokens": 20, "detokenize": False, "ignore_eos": True} | extra))
        for extra in itertools.islice(itertools.cycle(mixed_sampling()), len(prompts))
    ]
    rows = [{"prompt_token_ids": list(p)} for p in prompts]
    found = []
    for out in llm.generate(rows, params, use_tqdm=False):
        done = out.outputs[0]
        ranks = [sorted(position) for position in done.logprobs] if done.logprobs else None
        found.append((tuple(done.token_ids), done.finish_reason, ranks))
    return found


@pytest.fixture(scope="module")
def truth(tiny, token_prompts, engine_settings):
    from nwor_vllm.bench.backends import vllm as backend

    with backend.engine(tiny[0], None, **engine_settings) as llm:
        return backend.generate(llm, token_prompts, **GREEDY), ask(llm, token_prompts)


@pytest.fixture(scope="module", params=["sync", "async"])
def engine(request, tiny, truth, speculation, engine_settings):
    from nwor_vllm.bench.backends import vllm as backend

    settings = engine_settings | {"async_scheduling": request.param == "async", "max_num_batched_tokens": 64}
    with backend.engine(tiny[0], speculation, **settings) as llm:
        yield llm


def test_output_is_the_targets_under_every_rule(engine, truth, token_prompts):
    from nwor_vllm.bench.backends import vllm as backend

    for rule in RULES:
        backend.switch(engine, rule)
        assert backend.generate(engine, token_prompts, **GREEDY) == truth[0], rule
        if rule.get("policy") == "fixed" and "policy_params" not in rule:
            assert backend.counters(engine)["accepted_tokens"] > 0, rule


@pytest.mark.parametrize("rule", [RULES[0], RULES[3], RULES[5]], ids=str)
def test_logprobs_penalties_stops_and_limits(engine, truth, token_prompts, rule):
    from nwor_vllm.bench.backends import vllm as backend

    backend.switch(engine, rule)
    got = ask(engine, token_prompts)
    asynchronous = engine.llm_engine.vllm_config.scheduler_config.async_scheduling
    for index, (a, b) in enumerate(zip(got, truth[1], strict=True)):
        if asynchronous and "min_tokens" in mixed_sampling()[index % len(mixed_sampling())]:
            continue  # stock vLLM counts placeholders as output here, and lets stop tokens in too early
        assert a == b, f"request {index}: {mixed_sampling()[index % len(mixed_sampling())]}"


def test_counts_are_true_under_trimming(engine, token_prompts):
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import control

    backend.switch(engine, RULES[0])
    outputs = backend.generate(engine, token_prompts, **GREEDY)
    full = backend.counters(engine)
    backend.switch(engine, RULES[3])
    backend.generate(engine, token_prompts, **GREEDY)
    cut = backend.counters(engine)
    for counts in (full, cut):
        # Every output token is a prompt's first, a round's bonus, an accepted draft, or comes from a step without one.
        assert counts["accepted_tokens"] <= counts["verified_tokens"] <= counts["drafted_tokens"]
        assert sum(counts["accepted_per_position"]) == counts["accepted_tokens"]
        assert sum(counts["verified_per_position"]) == counts["verified_tokens"]
        assert counts["accepted_tokens"] < sum(map(len, outputs))
    assert full["tokens_stopped_by_confidence"] == 0 and full["draft_forwards_saved"] == 0
    assert cut["tokens_stopped_by_confidence"] > 0
    assert cut["verified_tokens"] < full["verified_tokens"]
    assert cut["draft_forwards"] / cut["steps"] < full["draft_forwards"] / full["steps"]
    assert cut["draft_kv_bytes_avoided"] > 0 and cut["target_kv_bytes_avoided"] > 0
    # A slot is cut for being unlikely, so what is left is accepted more often.
    assert cut["accepted_tokens"] / cut["verified_tokens"] > full["accepted_tokens"] / full["verified_tokens"]
    requests = control.snapshot(engine)["requests"]
    assert sum(r["accepted"] for r in requests.values()) == cut["accepted_tokens"]
    assert len(requests) <= len(token_prompts)


def test_the_policys_own_time_is_not_the_engines(engine, token_prompts, monkeypatch):
    """Where steps wait for it. An asynchronous step does not, so nothing is taken off it."""
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import control

    backend.switch(engine, RULES[0])
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    backend.generate(engine, token_prompts, **GREEDY)
    seen, policy = [], scheduler.nwor_policy
    plan, observe = policy.plan, policy.observe
    monkeypatch.setattr(policy, "plan", lambda *args: time.sleep(0.1) or plan(*args))
    monkeypatch.setattr(policy, "observe", lambda step: time.sleep(0.1) or seen.append(step.seconds) or observe(step))
    control.apply(engine, {"reset": True})
    backend.generate(engine, token_prompts, **GREEDY)
    asynchronous = scheduler.scheduler_config.async_scheduling
    assert len(seen) > 5
    assert (statistics.median(seen) > 0.1) is asynchronous
    assert control.snapshot(engine)["counters"]["step_seconds"] > 0.15 * (len(seen) - 2)


def test_the_policy_is_told_what_kind_of_request_comes(engine, token_prompts, monkeypatch):
    from vllm import SamplingParams, TokensPrompt

    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import control

    backend.switch(engine, RULES[-1])
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    told = {}
    monkeypatch.setattr(scheduler.nwor_policy, "begin", told.__setitem__)
    common = {"max_tokens": 2, "ignore_eos": True, "detokenize": False}
    kinds = {
        "greedy": SamplingParams(temperature=0.0, **common),
        "sampled": SamplingParams(temperature=0.7, **common),
        "code greedy": SamplingParams(temperature=0.0, extra_args={"nwor_kind": "code"}, **common),
        "7 sampled": SamplingParams(temperature=1.0, extra_args={"nwor_kind": 7}, **common),
    }
    prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in token_prompts[: len(kinds)]]
    engine.generate(prompts, list(kinds.values()), use_tqdm=False)
    assert list(told.values()) == list(kinds)
    monkeypatch.undo()
    engine.generate(prompts, list(kinds.values()), use_tqdm=False)
    assert set(kinds) <= set(control.snapshot(engine)["policy"]["slots"]["kinds"])


def test_what_the_policy_sees_ends_where_texts_do(engine, token_prompts, monkeypatch):
    """Every token of a text is its prompt's first or a round's; drafts beyond its end were accepted in vain."""
    from nwor_vllm.bench.backends import vllm as backend

    backend.switch(engine, RULES[0])
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    seen, observe = [], scheduler.nwor_policy.observe
    monkeypatch.setattr(scheduler.nwor_policy, "observe", lambda step: seen.append(step) or observe(step))
    outputs = backend.generate(engine, token_prompts, **GREEDY)
    rounds = [r for step in seen for r in step.rounds]
    made = sum(r.accepted + 1 for r in rounds)
    undrafted = sum(step.requests - len(step.rounds) for step in seen)
    told = sum(map(len, outputs)) - len(outputs)
    assert made <= told
    if scheduler.scheduler_config.async_scheduling:  # steps are under way for requests that have ended
        assert told <= made + undrafted <= told + len(outputs)
    else:
        assert made + undrafted == told
    counted = backend.counters(engine)
    assert counted["accepted_tokens"] > sum(r.accepted for r in rounds)  # the engine's own count has them
    assert all(r.accepted <= r.verified <= r.drafted for r in rounds)
    # Sixteen prompts, some of them in pieces: 64 tokens a step are for all.
    assert len(outputs) <= sum(step.prompts for step in seen) <= 2 * len(outputs)


def test_a_draft_that_came_to_nothing_is_a_round_too(engine, token_prompts, monkeypatch):
    """Without those the others would say that all drafts are as good as theirs."""
    from nwor_vllm.bench.backends import vllm as backend

    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    for threshold in (0.02, 0.1, 0.5):  # the drafter is not sure of much
        backend.switch(engine, {"policy": "fixed", "early_exit": {"threshold": threshold, "min_survival": 0.0}})
        seen = []
        monkeypatch.setattr(scheduler.nwor_policy, "observe", seen.append)
        backend.generate(engine, token_prompts, **GREEDY)
        monkeypatch.undo()
        rounds = [r for step in seen for r in step.rounds]
        verified = [r.verified for r in rounds]
        if scheduler.scheduler_config.async_scheduling:  # one step is under way when a request ends
            assert sum(step.requests - len(step.rounds) for step in seen) <= len(token_prompts)
        else:
            assert all(len(step.rounds) == step.requests for step in seen)
        assert all(r.drafted >= 1 and len(r.confidence) == r.drafted for r in rounds)
        assert backend.counters(engine)["rounds"] >= len(rounds) - verified.count(0)  # the engine's own count
        if 0 in verified and max(verified) > 0:
            return
    pytest.fail("no threshold cut some drafts to nothing and not others")


@pytest.mark.parametrize("asked", [0, 3])
def test_a_drafter_that_says_nothing_may_have_proposed_nothing(asked):
    """n-grams that were not found: who decoded without drafts, although some were asked for, had a round."""
    from nwor_vllm.plugin.scheduler import Elastic
    from nwor_vllm.policy import Round

    scheduler = SimpleNamespace(nwor_drafted={}, nwor_asked=asked, requests={"none", "some", "prompt"})
    tokens, drafts = {"none": 1, "some": 4, "prompt": 30, "gone": 1}, {"some": [5, 6, 7]}
    step = SimpleNamespace(num_scheduled_tokens=tokens, scheduled_spec_decode_tokens=drafts)
    assert Elastic.nwor_unverified(scheduler, step) == ([Round("none", 0, 0, 0)] if asked else [])


WRONG = [
    ({"policy": "goodputt"}, "did you mean 'goodput'"),
    ({"policy": 3}, "policy is 3; expected str"),
    ({"early_exit": {"threshold": 1.5}}, "early_exit.threshold is 1.5; expected a number in 0..1"),
    ({"early_exit": {"min_survival": -1}}, "early_exit.min_survival is -1.0; expected a number in 0..1"),
    ({"early_exit": {"threshold": float("nan")}}, "early_exit.threshold is nan"),
    ({"early_exit": {"treshold": 0.1}}, "unknown setting 'early_exit.treshold'; did you mean 'early_exit.threshold'?"),
    ({"early_exit": 0.5}, "early_exit is 0.5; expected an object"),
    ({"per_request": 1}, "per_request is 1; expected bool"),
    ({"ladder": [1]}, "unknown live setting 'ladder'"),
    ({"polcy": "off"}, "unknown live setting 'polcy'; did you mean 'policy'?"),
    ({"policy": "fixed", "policy_params": {"k": 4}}, "policy_params.k is 4; the ladder has 0, 1, 2, 3, 5"),
    ({"policy": "fixed", "policy_params": {"k": 9}}, "policy_params.k is 9; the ladder has 0, 1, 2, 3, 5"),
    ({"policy": "fixed", "policy_params": {"kk": 4}}, "policy_params.kk"),
    ({"policy": "fixed", "policy_params": [4]}, "policy_params is [4]; expected an object"),
    ({"policy": "off", "reset": "no"}, "reset is 'no'; expected true or false"),
    ({"policy": "off", "restore": 5}, "restore holds no snapshot of policy 'off'"),
    ({"policy": "fixed", "restore": {"k": 4}}, "it drafts 4, and the ladder has 0, 1, 2, 3, 5"),
    ({"policy": "goodput", "restore": {"plan": 1}}, "restore holds no snapshot of policy 'goodput'"),
]


def test_a_change_that_is_wrong_is_refused_in_one_line_and_changes_nothing(engine, truth, token_prompts):
    """Asked for while requests run: what they write is what they would have written."""
    import vllm

    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.errors import ConfigError
    from nwor_vllm.plugin import control

    backend.switch(engine, RULES[3])
    core = engine.llm_engine
    before, policy = control.snapshot(engine), core.engine_core.engine_core.scheduler.nwor_policy
    params = vllm.SamplingParams(**GREEDY, ignore_eos=True, detokenize=False)
    for index, prompt in enumerate(token_prompts):
        core.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
    found, changes = {}, itertools.cycle(WRONG)
    for _ in WRONG:
        change, words = next(changes)
        with pytest.raises(ConfigError) as error:
            control.apply(engine, change)
        assert words in str(error.value) and "\n" not in str(error.value)
        after = control.snapshot(engine)
        assert after["settings"] == before["settings"]
        assert core.engine_core.engine_core.scheduler.nwor_policy is policy
        found |= {out.request_id: tuple(out.outputs[0].token_ids) for out in core.step() if out.finished}
    while core.has_unfinished_requests():
        found |= {out.request_id: tuple(out.outputs[0].token_ids) for out in core.step() if out.finished}
    assert [found[str(index)] for index in range(len(token_prompts))] == truth[0]


def test_what_was_learnt_comes_back_and_another_ladders_snapshot_does_not(engine, truth, token_prompts):
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.errors import ConfigError
    from nwor_vllm.plugin import control
    from nwor_vllm.policy import make_policy

    backend.switch(engine, {"policy": "goodput", "early_exit": {"threshold": 0.0, "min_survival": 0.0}})
    backend.generate(engine, token_prompts, **GREEDY)
    learnt = control.snapshot(engine)["policy"]
    control.apply(engine, {"policy": "off"})
    assert learnt["slots"]["row"]
    learnt["slots"]["told"] = {"waiting": 1}
    restored = control.apply(engine, {"policy": "goodput", "restore": learnt})["policy"]
    slots = restored.pop("slots")
    assert slots["row"] == slots["told"] == {}  # its requests have ended since
    for state in (learnt, restored):  # and so have the rounds that they were in: that tells how requests differ
        del state["walkers"]["ended"], state["walkers"]["over"]
        for part in ("survival", "calibration"):
            for name in ("prior", "apart", "told", "level", "ended"):
                del state[part]["effects"][name]
    assert restored == {name: part for name, part in learnt.items() if name != "slots"}
    with pytest.raises(ConfigError, match="restore holds no snapshot of policy 'goodput' as it is set here"):
        control.apply(engine, {"policy": "goodput", "restore": make_policy("goodput", None, (0, 1, 2)).snapshot()})
    assert backend.generate(engine, token_prompts, **GREEDY) == truth[0]


def no_number(logits):
    import torch

    return torch.full_like(logits, torch.nan)


def no_number_in_some_rows(logits):
    logits = logits.clone()
    logits[::2] = float("nan")
    return logits


def one_that_is_none(logits):
    logits = logits.clone()
    logits[:, 7] = float("nan")
    return logits


def infinite(logits):
    import torch

    return torch.full_like(logits, torch.inf)


@pytest.mark.parametrize("broken", [no_number, no_number_in_some_rows, one_that_is_none, infinite])
@pytest.mark.parametrize("rule", [RULES[0], RULES[3], RULES[4], RULES[5]], ids=str)
def test_a_drafter_without_numbers_changes_no_output(engine, truth, token_prompts, monkeypatch, caplog, broken, rule):
    """At temperature 0, and where the sampler draws from what top_k = 1 leaves, which is the same token."""
    from nwor_vllm.bench.backends import vllm as backend

    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    proposer = engine.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    stock = proposer.model.compute_logits
    monkeypatch.setattr(proposer.model, "compute_logits", lambda hidden: broken(stock(hidden)))
    monkeypatch.setattr(scheduler, "nwor_told", False)
    backend.switch(engine, rule)
    with caplog.at_level("WARNING", "vllm.nwor"):
        assert backend.generate(engine, token_prompts, **GREEDY) == truth[0]
    counts = backend.counters(engine)
    sampled = backend.generate(engine, token_prompts, temperature=1.0, top_k=1, max_tokens=GREEDY["max_tokens"])
    assert sampled == truth[0]
    said = [record.getMessage() for record in caplog.records if record.name == "vllm.nwor"]
    if rule is RULES[0]:  # nothing reads confidences, so nothing is noticed, and nothing may go wrong
        assert said == []
        return
    (said,) = said
    assert said.startswith("nwor: the drafter's logits are not finite, so its drafts end: ")
    if broken is no_number_in_some_rows:
        assert counts["verified_tokens"] > 0
    elif rule is not RULES[5]:
        assert counts["verified_tokens"] == 0


def test_rejected_and_stopped_rows_change_no_acceptance(engine, token_prompts):
    """The rows that write no K/V were of no use: with them written, acceptance is the same at every position."""
    from nwor_vllm.bench.backends import vllm as backend

    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    seen = {}
    for pads in (True, False):
        runner.nwor_pads = pads
        for name, rule in (("full", RULES[0]), ("cut", RULES[4])):
            backend.switch(engine, rule)
            backend.generate(engine, token_prompts, **GREEDY)
            counts = backend.counters(engine)
            seen[pads, name] = counts["accepted_per_position"]
            if name == "cut":
                seen[pads, "written"] = counts["draft_kv_bytes_written"]
    runner.nwor_pads = True
    assert seen[True, "full"] == seen[False, "full"]
    assert seen[True, "cut"] == seen[False, "cut"]
    assert seen[True, "written"] < seen[False, "written"]


def test_aborts_leave_no_block_behind(engine, token_prompts):
    import vllm

    core = engine.llm_engine
    params = vllm.SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, detokenize=False)
    for index, prompt in enumerate(token_prompts):
        core.add_request(f"abort-{index}", {"prompt_token_ids": list(prompt)}, params)
    for step in range(12):
        core.step()
        if step % 2:
            core.abort_request([f"abort-{step // 2}"])
    core.abort_request([f"abort-{i}" for i in range(len(token_prompts))])
    while core.has_unfinished_requests():
        core.step()
    pool = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
