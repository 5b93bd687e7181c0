"""Bare vLLM engines for `nwor verify`: started, asked for token ids, stopped; and the mistakes a check must notice."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nwor_vllm.errors import ConfigError
from nwor_vllm.plugin import compat, control
from nwor_vllm.plugin.draft_round import DraftRound
from nwor_vllm.plugin.drafter_v2 import ElasticDrafter
from nwor_vllm.policy import Step

Tokens = tuple[int, ...]


@contextmanager
def engine(target: Path, speculative: Mapping[str, Any] | None, **settings: Any) -> Iterator[Any]:
    """An `LLM` in this process, with the plugin where it speculates. Only one lives at a time.

    Started as a user does: what the plugin has to put right it must put right by itself, or the check would hide it.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    if settings.get("async_scheduling"):
        compat.allow_async_on_cpu()  # the one thing that no user can ask for: vLLM would schedule synchronously
    given: dict[str, Any] = {
        "model": str(target),
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
        "speculative_config": dict(speculative) if speculative else None,
        "additional_config": {"nwor": {"policy": "fixed"}} if speculative else {},
    }
    llm = vllm.LLM(**(given | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def demand(llm: Any, runner: str, asynchronous: bool) -> None:
    """What an engine cannot do it may leave out in silence: what was not run must not count as proven."""
    config = llm.llm_engine.vllm_config
    got = ("v2" if config.use_v2_model_runner else "v1", bool(config.scheduler_config.async_scheduling))
    if got != (runner, asynchronous):
        raise ConfigError(
            f"vLLM runs this on its {got[0].upper()} runner with {'a' if got[1] else ''}synchronous scheduling instead"
        )


def generate(llm: Any, prompts: Sequence[Tokens], **sampling: Any) -> list[Tokens]:
    import vllm

    params = vllm.SamplingParams(**({"detokenize": False, "ignore_eos": True} | sampling))
    rows = [{"prompt_token_ids": list(p)} for p in prompts]
    return [tuple(o.token_ids) for out in llm.generate(rows, params, use_tqdm=False) for o in out.outputs]


def probabilities(llm: Any, prompts: Sequence[Tokens], vocab: int) -> list[list[float]]:
    """The model's own distribution after each prompt, at temperature 1."""
    import vllm

    params = vllm.SamplingParams(max_tokens=1, logprobs=vocab, detokenize=False, temperature=1.0, ignore_eos=True)
    rows = [{"prompt_token_ids": list(p)} for p in prompts]
    found = []
    for out in llm.generate(rows, params, use_tqdm=False):
        given = out.outputs[0].logprobs[0]
        logits = torch.tensor([given[t].logprob if t in given else -torch.inf for t in range(vocab)])
        found.append(torch.softmax(logits.double(), dim=0).tolist())
    return found


def preemptions(llm: Any) -> int:
    return _count(llm, "vllm:num_preemptions")


def prefix_hits(llm: Any) -> int:
    """Prompt tokens that were found in the prefix cache."""
    return _count(llm, "vllm:prefix_cache_hits")


def _count(llm: Any, name: str) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == name)


def switch(llm: Any, rule: Mapping[str, Any]) -> None:
    control.apply(llm, {**rule, "reset": True})


def price(llm: Any, seconds: Callable[[Step], float]) -> None:
    """From now on the engine's policy, until it is switched, believes that steps take what `seconds` says."""
    policy = llm.llm_engine.engine_core.engine_core.scheduler.nwor_policy
    observe = policy.observe
    policy.observe = lambda step: observe(dataclasses.replace(step, seconds=seconds(step)))


def counters(llm: Any) -> dict[str, Any]:
    found: dict[str, Any] = control.snapshot(llm)["counters"]
    return found


@contextmanager
def keep_by_drawn_token(threshold: float) -> Iterator[None]:
    """The wrong rule: a slot is kept for the probability of the token that was drawn. It biases what is sampled."""
    right, right_v2 = DraftRound.lengths, ElasticDrafter.nwor_settle

    def wrong(self: DraftRound) -> Sequence[int]:
        kept = list(right(self))
        for position, (tokens, probs) in enumerate(zip(self.tokens, self.probs, strict=True)):
            chances = probs.gather(1, tokens[:, None].long())[:, 0].tolist()
            kept = [min(n, position) if chance < threshold else n for n, chance in zip(kept, chances, strict=True)]
        return kept

    def wrong_v2(self: Any) -> Any:
        """At temperature 1, where cached draft logits are those that were drawn from."""
        report = right_v2(self)
        if report is None or not report.lengths:
            return report
        n, kept = len(self.nwor.ids), dict(report.lengths)
        probs = self.draft_logits[self.idx_mapping[:n].long()].float().softmax(dim=-1)
        chances = probs.gather(2, self.draft_tokens[:n, :, None].long().clamp(min=0))[:, :, 0].tolist()
        for request_id, row in zip(self.nwor.ids, chances, strict=True):
            unlikely = next((position for position, chance in enumerate(row) if chance < threshold), len(row))
            if request_id in kept:
                kept[request_id] = min(kept[request_id], unlikely)
        return dataclasses.replace(report, lengths=kept)

    DraftRound.lengths = wrong  # type: ignore[method-assign]
    ElasticDrafter.nwor_settle = wrong_v2  # type: ignore[method-assign]
    try:
        yield
    finally:
        DraftRound.lengths = right  # type: ignore[method-assign]
        ElasticDrafter.nwor_settle = right_v2  # type: ignore[method-assign]


@contextmanager
def keep_unverified() -> Iterator[None]:
    """A lossy rule for greedy decoding: the first draft token of a round is kept without asking the target."""
    v1: Any = importlib.import_module("vllm.v1.sample.rejection_sampler")
    v2: Any = sys.modules.get("vllm.v1.worker.gpu.spec_decode.rejection_sampler")  # loaded where V2 engines run
    right, right_v2 = v1.rejection_sample, getattr(v2, "rejection_sample", None)

    def wrong_v1(draft_token_ids: Any, num_draft_tokens: Any, *rest: Any, **kwargs: Any) -> Any:
        output = right(draft_token_ids, num_draft_tokens, *rest, **kwargs)
        row_start = 0
        for row, n in enumerate(num_draft_tokens):
            if n:
                output[row, 0] = draft_token_ids[row_start]
            row_start += n
        return output

    def wrong_v2(target: Any, draft: Any, inputs: Any, starts: Any, *rest: Any, **kwargs: Any) -> Any:
        """`inputs`: each request's last token and then its drafts, from `starts` on."""
        assert right_v2 is not None
        output, count = right_v2(target, draft, inputs, starts, *rest, **kwargs)
        for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            if end - start > 1:
                output[row, 0] = inputs[start + 1]
        return output, count

    v1.rejection_sample = wrong_v1
    if v2 is not None:
        v2.rejection_sample = wrong_v2
    try:
        yield
    finally:
        v1.rejection_sample = right
        if v2 is not None:
            v2.rejection_sample = right_v2
