"""Random traffic on the embedded pair, settings switched live: no crash, nothing leaked, no output changed.

A run is made of episodes, each drawn from FUZZ_SEED and its own number alone, the engine's clock included: a failure
says how to repeat its episode. FUZZ_STEPS engine steps are run under each scheduler, from episode FUZZ_FIRST on.
"""

from __future__ import annotations

import itertools
import os
import random
import types

import pytest

pytestmark = pytest.mark.vllm

SEED = int(os.environ["FUZZ_SEED"])
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
STEPS = int(os.environ.get("FUZZ_STEPS", "1000"))
EPISODE = 500  # engine steps
LONGEST, MOST_WAITING, K = 80, 12, 8
DRAFTERS = {"draft_model": "draft", "eagle": "eagle", "eagle3": "eagle3"}
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
# What looks at logits, at tokens or at a grammar. Every one of them keeps its first tokens when its length is cut.
KINDS = {
    "plain": {"ignore_eos": True},
    "ends": {},
    "regex": {"regex": "([a-z]{2,8} )+"},
    "json": {"json": OBJECT},
    "penalties": {"ignore_eos": True, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "stops": {"ignore_eos": True, "stop_token_ids": list(range(300, 340))},
    "logprobs": {"ignore_eos": True, "logprobs": 2},
    "sampled": {"ignore_eos": True, "temperature": 1.0, "top_k": 1},  # through the sampling code, to the same end
    "drawn": {"ignore_eos": True, "temperature": 0.9},  # nothing to compare with: only its length is known
}
VOCAB = 1536
SMALL = {  # the longest prompt and answer fit: what reaches vLLM's limit is docs/serving.md's second fault
    "max_model_len": 288, "max_num_seqs": 6, "block_size": 32, "disable_log_stats": False, "skip_tokenizer_init": False
}  # fmt: skip
# Six drafts of eight do not fit a step's tokens, six requests do not fit the cache.
TIGHT = {"max_num_batched_tokens": 48, "enable_prefix_caching": True, "num_gpu_blocks_override": 14}


def params(kind, length):
    import vllm
    from vllm.sampling_params import StructuredOutputsParams

    given = dict(KINDS[kind])
    grammar = {name: given.pop(name) for name in ("regex", "json") if name in given}
    if grammar:
        given["structured_outputs"] = StructuredOutputsParams(**grammar)
    return vllm.SamplingParams(**{"temperature": 0.0, "max_tokens": length, "detokenize": False} | given)


@pytest.fixture(scope="module")
def prompts():
    from nwor_vllm import zoo
    from nwor_vllm.bench import verify_identity

    return verify_identity.chats(zoo.path("target"))


@pytest.fixture(scope="module")
def truth(prompts):
    """What the target says alone, by prompt and kind."""
    from nwor_vllm import zoo
    from nwor_vllm.bench.backends import vllm as backend

    asked = list(itertools.product(range(len(prompts)), KINDS))
    with backend.engine(zoo.path("target"), None, **SMALL | {"async_scheduling": False}) as llm:
        rows = [{"prompt_token_ids": list(prompts[p])} for p, _ in asked]
        found = llm.generate(rows, [params(kind, LONGEST) for _, kind in asked], use_tqdm=False)
    return {what: tuple(out.outputs[0].token_ids) for what, out in zip(asked, found, strict=True)}


# Of each policy, besides what it does when nothing is said.
PARAMETERS = {
    "fixed": [{"k": k, "watch": w} for k in (0, 0, 1, 2, 3, 5, 8) for w in (False, True)],
    "off": [],
    "acceptance": [{"biased": True, "alpha": 0.5}, {"initial": 0.0, "thresholds": [0.1, 0.9]}],
    "throughput": [{"probe_interval": 0}, {"candidates": [1, 8], "warmup_cycles": 1, "cooldown_cycles": 0}],
    "feedback": [{"target": 0.9, "window": 1}, {"kp": 50.0, "initial": 0.0}],
    "goodput": [
        {"guard": False, "confidence": False}, {"per_request": False, "probe_interval": 1},
        {"memory": 2.0, "keep": 0.5, "cost_interval": 1}, {"spread": 5.0, "probe_interval": 2},
    ],
}  # fmt: skip
WRONG = [
    {"policy": "fixd"}, {"policy": 3}, {"policy": "fixed", "policy_params": {"k": 4}}, {"policy_params": [8]},
    {"policy": "feedback", "policy_params": {"window": -1}}, {"early_exit": {"threshold": 1.5}}, {"early_exit": 0.5},
    {"early_exit": {"min_survival": float("nan")}}, {"per_request": "yes"}, {"ladder": [0, 8]}, {"reset": 1},
    {"policy": "off", "restore": {"k": "many"}}, {"policy": "goodput", "restore": {"slots": 1}},
]  # fmt: skip


class Traffic:
    """One episode: who arrives, gives up, what is switched and what time seems to pass."""

    def __init__(self, llm, prompts, truth, episode):
        self.rng = random.Random(f"{SEED} {episode}")
        self.llm, self.prompts, self.truth, self.episode = llm, prompts, truth, episode
        self.core = llm.llm_engine
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.waiting = {}
        self.seen = dict.fromkeys((*KINDS, *PARAMETERS, "aborts", "thresholds", "restored", "refused"), 0)
        self.deck, self.learnt = [], {}
        # Prices of a target step and of a draft token: what the policy believes to pay decides what it drafts.
        self.prices = self.rng.choice([1.0, 5.0, 20.0]) * 1e-3, self.rng.choice([0.02, 0.5, 4.0]) * 1e-3

    def run(self, clock):
        import torch

        from nwor_vllm.plugin import control

        rng = self.rng
        torch.manual_seed(rng.randrange(2**31))
        control.apply(self.llm, {"policy": "goodput", "reset": True})
        for turn in itertools.count():
            if self.scheduler.nwor_counters.steps >= EPISODE:
                break
            if rng.random() < 0.05:
                self.switch()
            if not self.waiting or (len(self.waiting) < MOST_WAITING and rng.random() < 0.3):
                self.arrive(f"{self.episode}-{turn}")
            if rng.random() < 0.02:
                self.abort([rng.choice(list(self.waiting))])
                self.seen["aborts"] += 1
            self.step()
            clock.now += (self.prices[0] + self.prices[1] * self.scheduler.nwor_plan.k) * rng.uniform(0.5, 1.5)
            if rng.random() < 0.01:
                clock.now += rng.choice([-1.0, 10.0])  # suspended, or set back
        self.abort(list(self.waiting))
        for _ in range(1000):
            if not self.core.has_unfinished_requests():
                break
            self.core.step()
        self.is_empty()

    def switch(self):
        """Another policy, thresholds, what was learnt before, or something that is refused and changes nothing."""
        from nwor_vllm.errors import ConfigError
        from nwor_vllm.plugin import control

        rng, before = self.rng, control.snapshot(self.llm)
        if rng.random() < 0.15:
            policy = self.scheduler.nwor_policy
            with pytest.raises(ConfigError):
                control.apply(self.llm, rng.choice(WRONG))
            assert control.snapshot(self.llm) == before and self.scheduler.nwor_policy is policy
            self.seen["refused"] += 1
            return
        set_now = before["settings"]
        self.learnt[set_now["policy"]] = {"policy_params": set_now["policy_params"], "restore": before["policy"]}
        if not self.deck:  # every policy comes up before one comes up again; None changes thresholds alone
            self.deck = rng.sample([*PARAMETERS, None], len(PARAMETERS) + 1)
        threshold, survival = (rng.choice([0.0, 0.0, rng.random(), rng.random() ** 3]) for _ in range(2))
        exits = {"threshold": threshold, "min_survival": survival, "policy_rule": rng.random() < 0.5}
        change = {"early_exit": exits, "per_request": rng.random() < 0.5}
        policy = self.deck.pop()
        if policy is not None:
            change |= {"policy": policy, "policy_params": rng.choice([{}, *PARAMETERS[policy]])}
            if policy in self.learnt and rng.random() < 0.5:
                change |= self.learnt[policy]
                self.seen["restored"] += 1
            self.seen[policy] += 1
        self.seen["thresholds"] += max(threshold, survival) > 0
        control.apply(self.llm, change)

    def arrive(self, name):
        rng = self.rng
        prompt, kind, length = rng.randrange(len(self.prompts)), rng.choice(list(KINDS)), rng.randrange(1, LONGEST)
        self.core.add_request(name, {"prompt_token_ids": list(self.prompts[prompt])}, params(kind, length))
        self.waiting[name] = (prompt, kind, length)

    def abort(self, names):
        self.core.abort_request(names)
        for name in names:
            del self.waiting[name]

    def step(self):
        for out in self.core.step():
            if out.request_id not in self.waiting:
                continue
            prompt, kind, length = self.waiting[out.request_id]
            told = tuple(out.outputs[0].token_ids)
            due = told[:length] if kind == "drawn" else self.truth[prompt, kind][:length]
            assert told == due[: len(told)], f"request {out.request_id}, {kind}"
            assert all(0 <= token < VOCAB for token in told), f"request {out.request_id}, {kind}"
            assert not out.finished or kind != "drawn" or len(told) == length, f"request {out.request_id}, {kind}"
            if out.finished:
                assert told == due, f"request {out.request_id}, {kind}: {len(told)} tokens of {len(due)}"
                del self.waiting[out.request_id]
                self.seen[kind] += 1

    def is_empty(self):
        """Nothing is left of requests that are gone."""
        scheduler, runner = self.scheduler, self.core.model_executor.driver_worker.worker.model_runner
        assert not self.core.has_unfinished_requests() and not scheduler.requests
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
        assert self.llm.reset_prefix_cache()
        # Told with the next step, so the last ones may still be there.
        assert len(scheduler.nwor_drafted) <= SMALL["max_num_seqs"]
        assert len(runner.nwor_lengths) <= SMALL["max_num_seqs"]
        assert len(runner.nwor_catch_up.steps) <= SMALL["block_size"]
        slots = getattr(scheduler.nwor_policy, "slots", None)
        assert slots is None or len(slots.row) + len(slots.told) <= MOST_WAITING


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_random_traffic(prompts, truth, asynchronous, monkeypatch):
    from nwor_vllm import zoo
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import scheduler

    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(scheduler, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    drafter = list(DRAFTERS)[(SEED + asynchronous) % len(DRAFTERS)]
    speculation = {"method": drafter, "model": str(zoo.path(DRAFTERS[drafter])), "num_speculative_tokens": K}
    seen, lengths = {}, {}
    with backend.engine(zoo.path("target"), speculation, **SMALL | TIGHT | {"async_scheduling": asynchronous}) as llm:
        for episode in range(FIRST, FIRST + max(1, STEPS // EPISODE)):
            traffic = Traffic(llm, prompts, truth, episode)
            try:
                traffic.run(clock)
            except BaseException as error:
                error.add_note(
                    f"repeat it with FUZZ_SEED={SEED} FUZZ_FIRST={episode} FUZZ_STEPS={EPISODE} pytest "
                    f"'tests/plugin/test_fuzz.py::test_random_traffic[{'async' if asynchronous else 'sync'}]'"
                )
                raise
            counts = backend.counters(llm)
            seen = {name: seen.get(name, 0) + n for name, n in traffic.seen.items()}
            for k, n in counts["length_histogram"].items():
                lengths[k] = lengths.get(k, 0) + n
            print(f"{drafter} seed {SEED} episode {episode}: {counts['steps']} steps; so far {seen}", flush=True)
        print(f"steps by draft length {lengths}, {backend.preemptions(llm)} preemptions", flush=True)
        if STEPS < 2 * EPISODE:
            return  # to repeat an episode, not to cover everything
        assert all(seen.values()), f"not met in this run: {[name for name, n in seen.items() if not n]}"
        assert "0" in lengths and len(lengths) >= 4, lengths
        assert backend.preemptions(llm) > 0 and backend.prefix_hits(llm) > 0
        with backend.keep_unverified(), pytest.raises(AssertionError, match="request"):  # this harness would notice
            Traffic(llm, prompts, truth, FIRST).run(clock)
