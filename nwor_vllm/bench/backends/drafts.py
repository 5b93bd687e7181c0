"""Rounds of a real engine, taken down: the draft at every position of every output, and the steps as they were timed.

A walk that verifies none of it commits one token a step, so a fresh
draft is seen at every position; a walk that verifies runs rounds as a server would. The drafter's K/V of committed
text is fed from the target's own states whatever was drafted before, so a draft depends on the text alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from nwor_vllm.bench import provenance
from nwor_vllm.bench.backends.vllm import engine
from nwor_vllm.policy import Plan, Round, Step

Tokens = tuple[int, ...]


@dataclass
class Watch:
    """Stands in for the policy: follows the plans it is given; keeps every step with the plan it drafted by."""

    plans: Iterator[Plan]
    name: str = "watch"
    now: Plan = field(default_factory=lambda: Plan(0))
    seen: list[tuple[Plan, Step]] = field(default_factory=list)

    def begin(self, request_id: str, kind: str) -> None:
        pass

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan:
        self.now = next(self.plans)
        return self.now

    def observe(self, step: Step) -> None:
        self.seen.append((self.now, step))

    def forget(self, request_id: str) -> None:
        pass

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Draft:
    at: int  # output tokens committed before it
    tokens: Tokens
    confidence: tuple[float, ...]


@dataclass
class Walk:
    """One pass over the prompts: by prompt index, what came out, what was drafted, and the rounds verified."""

    texts: dict[int, Tokens] = field(default_factory=dict)
    drafts: dict[int, list[Draft]] = field(default_factory=dict)
    rounds: dict[int, list[Round]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


@contextmanager
def watched(target: str, method: str, drafter: str, k: int, max_num_seqs: int, **settings: Any) -> Iterator[Any]:
    """An engine that drafts up to `k` and shows the drafter's confidences."""
    speculative = {"method": method, "model": provenance.model_path(drafter), "num_speculative_tokens": k}
    given: dict[str, Any] = {
        "max_num_seqs": max_num_seqs, "max_model_len": 1024, "async_scheduling": False,
        "additional_config": {"nwor": {"policy": "fixed", "ladder": list(range(k + 1))}},
    }  # fmt: skip
    with engine(Path(provenance.model_path(target)), speculative, **(given | settings)) as llm:
        yield llm


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def walk(
    llm: Any, prompts: Sequence[Tokens], sampling: Sequence[Mapping[str, Any]], k: int, batch: int, verify: bool
) -> Walk:
    """Every prompt once, `batch` in flight. Without `verify` the drafts are taken down and dropped."""
    import vllm

    scheduler, core, out = scheduler_of(llm), llm.llm_engine, Walk()
    watch = scheduler.nwor_policy = Watch(repeat(Plan(k)))
    names: dict[str, int] = {}
    stock = scheduler.update_draft_token_ids

    def take(drafts: Any) -> None:
        for request_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            request, shown = scheduler.requests.get(request_id), scheduler.nwor_drafted.get(request_id)
            if request is None or request.is_finished() or request.is_prefill_chunk or shown is None:
                continue
            draft = Draft(request.num_output_tokens, tuple(tokens), shown.confidence)
            out.drafts.setdefault(_index(request_id), []).append(draft)
        if not verify:
            drafts.draft_token_ids = [[] for _ in drafts.req_ids]
        stock(drafts)

    scheduler.update_draft_token_ids = take
    try:
        waiting = list(range(len(prompts)))[::-1]
        flying = 0
        while waiting or flying:
            while waiting and flying < batch:
                index = waiting.pop()
                names[f"watch-{index}"] = index
                params = vllm.SamplingParams(detokenize=False, **sampling[index])
                core.add_request(f"watch-{index}", {"prompt_token_ids": list(prompts[index])}, params)
                flying += 1
            for output in core.step():
                if output.finished:
                    flying -= 1
                    out.texts[names[output.request_id]] = tuple(output.outputs[0].token_ids)
    finally:
        del scheduler.update_draft_token_ids
    out.steps = [step for _, step in watch.seen]
    for step in out.steps:
        for r in step.rounds:
            out.rounds.setdefault(_index(r.request_id), []).append(r)
    return out


def burst(
    llm: Any, prompts: Iterator[Tokens], batch: int, plans: Iterator[Plan], steps: int, **sampling: Any
) -> list[tuple[Plan, Step]]:
    """At least `steps` decode steps of `batch` requests, each by the next plan; then everything is dropped."""
    import vllm

    scheduler, core = scheduler_of(llm), llm.llm_engine
    watch = scheduler.nwor_policy = Watch(plans)
    params = vllm.SamplingParams(ignore_eos=True, detokenize=False, **sampling)
    flying: set[str] = set()
    found: list[tuple[Plan, Step]] = []
    made = 0
    while len(found) < steps:
        while len(flying) < batch:
            name, made = f"burst-{made}", made + 1
            core.add_request(name, {"prompt_token_ids": list(next(prompts))}, params)
            flying.add(name)
        flying -= {output.request_id for output in core.step() if output.finished}
        found = [x for x in watch.seen if x[1].requests == batch and not x[1].prefill_tokens and x[1].seconds > 0]
    core.abort_request(list(flying))
    while core.has_unfinished_requests():
        core.step()
    return found


def _index(request_id: str) -> int:
    """The engine core knows a request by the frontend's id and a random suffix."""
    return int(request_id.split("-")[1])
