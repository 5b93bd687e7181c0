"""Random traffic, aborts and live switches: no crash, no block lost, no output changed. FUZZ_STEPS sets its length."""

from __future__ import annotations

import os
import random

import pytest

pytestmark = pytest.mark.vllm

STEPS = int(os.environ.get("FUZZ_STEPS", "1500"))
LONGEST = 80


def random_setting(rng):
    exits = {"threshold": rng.choice([0.0, 0.0, 0.1, 0.3]), "min_survival": rng.choice([0.0, 0.0, 0.05])}
    change = {"early_exit": exits | {"policy_rule": rng.random() < 0.5}, "per_request": rng.random() < 0.5}
    policy = rng.choice(["fixed", "off", "goodput", None])
    if policy == "fixed":
        change["policy_params"] = {"k": rng.choice([0, 1, 2, 3, 5])}
    return change if policy is None else change | {"policy": policy}


@pytest.fixture(scope="module")
def truth(tiny, token_prompts, engine_settings):
    from nwor_vllm.bench.backends import vllm as backend

    with backend.engine(tiny[0], None, **engine_settings) as llm:
        return backend.generate(llm, token_prompts, temperature=0.0, max_tokens=LONGEST)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_random_traffic(tiny, truth, token_prompts, speculation, engine_settings, asynchronous):
    import vllm

    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import control

    rng = random.Random(7 + asynchronous)
    settings = engine_settings | {
        "async_scheduling": asynchronous,
        "max_num_batched_tokens": 48,
        "enable_prefix_caching": True,
        "block_size": 32,
        "num_gpu_blocks_override": 14,
    }
    with backend.engine(tiny[0], speculation, **settings) as llm:
        core = llm.llm_engine
        waiting, compared, finished = {}, 0, 0
        for step in range(STEPS):
            if rng.random() < 0.02:
                control.apply(llm, random_setting(rng))
            if len(waiting) < 12 and rng.random() < 0.3:
                prompt, length = rng.randrange(len(token_prompts)), rng.randrange(1, LONGEST)
                name = f"{step}"
                params = vllm.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
                core.add_request(name, {"prompt_token_ids": list(token_prompts[prompt])}, params)
                waiting[name] = (prompt, length)
            if waiting and rng.random() < 0.02:
                name = rng.choice(list(waiting))
                core.abort_request([name])
                del waiting[name]
            for out in core.step():
                if out.finished and out.request_id in waiting:
                    prompt, length = waiting.pop(out.request_id)
                    assert tuple(out.outputs[0].token_ids) == truth[prompt][:length], f"step {step}"
                    compared += 1
                    finished += length
        core.abort_request(list(waiting))
        while core.has_unfinished_requests():
            core.step()
        assert compared > STEPS / 100 and finished > 0
        scheduler = core.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
        assert not scheduler.requests and len(scheduler.nwor_drafted) <= 12
        assert backend.preemptions(llm) > 0
