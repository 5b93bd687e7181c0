"""The schedulers with a policy in them: one mixin over vLLM's synchronous and asynchronous scheduler.

A step is planned when vLLM looks its draft length up, and observed when its output comes back. Lengths and outcomes
never decide what is sampled: a wrong plan costs time, not output.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from nwor_vllm.config import NworConfig, load
from nwor_vllm.plugin import compat
from nwor_vllm.plugin.combine import theirs_in
from nwor_vllm.plugin.configure import ladder_of
from nwor_vllm.plugin.control import answer, serve_control
from nwor_vllm.plugin.counters import Counters, RequestCounts
from nwor_vllm.plugin.kv_bytes import row_bytes
from nwor_vllm.plugin.messages import NO_RULE, DraftReport, Orders, orders_of, report_of
from nwor_vllm.plugin.metrics import Publisher, file_of, launcher
from nwor_vllm.policy import Plan, Policy, Round, Step, kind_of, make_policy

_StockScheduler: Any = object  # the vLLM class that stands behind the mixin


def kind(request: Any) -> str:
    """What the policy is told of a vLLM request: greedy or sampled, and its label (`extra_args={"nwor_kind": "code"}`,
    over HTTP `vllm_xargs`) or its adapter's name."""
    params, adapter = request.sampling_params, request.lora_request
    if params is None:  # a pooling model's
        return ""
    label = (params.extra_args or {}).get("nwor_kind") or (adapter.lora_name if adapter is not None else "")
    return kind_of(params.temperature, str(label)[:64])


class _Lookup:
    """Stands where vLLM keeps its table of draft lengths by batch size."""

    def __init__(self, scheduler: Elastic) -> None:
        self.scheduler = scheduler

    def __getitem__(self, batch_size: int) -> int:
        return self.scheduler.nwor_decide()


@dataclasses.dataclass(slots=True)
class _Drafted:
    """What one request's pending draft was, until its verification comes back."""

    drafted: int
    confidence: tuple[float, ...]


class Elastic(_StockScheduler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compat.apply("engine")
        config = load(self.vllm_config.additional_config, os.environ)
        self.nwor_k_max = self.num_spec_tokens
        self.nwor_dynamic = self.dynamic_sd_lookup is not None  # type: ignore[has-type]
        self.nwor_config = config or NworConfig()
        self.nwor_policy = self.nwor_make(self.nwor_config)
        if self.nwor_dynamic:
            self.dynamic_sd_lookup = _Lookup(self)
        self.nwor_counters = Counters(*row_bytes(self.kv_cache_config, self.vllm_config))
        self.nwor_plan = Plan(self.nwor_k_max)
        self.nwor_drafted: dict[str, _Drafted] = {}
        self.nwor_asked = 0  # the drafter's last order
        self.nwor_requests = RequestCounts()
        self.nwor_rounds: list[Round] = []
        self.nwor_started = self.nwor_ended = time.perf_counter()
        self.nwor_busy = self.nwor_told = False
        self.nwor_thought = 0.0  # seconds that the policy took since the last step's end
        engine = self.vllm_config.parallel_config.data_parallel_index
        self.nwor_publisher = Publisher(file_of(launcher(), engine))
        serve_control()

    def nwor_make(self, config: NworConfig) -> Policy:
        ladder = ladder_of(config, self.num_spec_tokens) if self.nwor_dynamic else (self.num_spec_tokens,)
        return self.nwor_begin(make_policy(config.policy, config.params(), ladder, config.cost_profile))

    def nwor_begin(self, policy: Policy) -> Policy:
        """A policy that comes while requests run."""
        for request in self.requests.values():
            policy.begin(request.request_id, kind(request))
        return policy

    # Planning

    def nwor_decide(self) -> int:
        running = self.running
        context = sum([r.num_computed_tokens for r in running])
        before = time.perf_counter()
        self.nwor_plan = self.nwor_policy.plan([r.request_id for r in running], context)
        self.nwor_thought += time.perf_counter() - before
        return min(self.nwor_plan.k, int(self.num_spec_tokens))

    def nwor_orders(self) -> Orders:
        exits, given = self.nwor_config.early_exit, self.nwor_plan.stop
        stop = given if given is not None and exits.policy_rule else NO_RULE
        if exits.threshold > stop.threshold or exits.min_survival > stop.min_survival:
            stop = dataclasses.replace(
                stop,
                threshold=max(stop.threshold, exits.threshold),
                min_survival=max(stop.min_survival, exits.min_survival),
            )
        caps = self.nwor_plan.caps if self.nwor_config.per_request else {}
        return Orders(stop, caps, self.nwor_plan.bias, observe=self.nwor_plan.watch)

    def add_request(self, request: Any) -> None:
        self.nwor_policy.begin(request.request_id, kind(request))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.nwor_started = time.perf_counter()
        if not self.nwor_busy:
            self.nwor_thought = 0.0
        step = super().schedule(*args, **kwargs)
        step.nwor_k, step.nwor_counted = step.num_spec_tokens_to_schedule, self.nwor_counters.number
        if step.nwor_k and step.num_scheduled_tokens:
            step.nwor = orders = self.nwor_orders()
            self.nwor_shorten(step, orders.caps)
        for request_id in step.finished_req_ids:
            self.nwor_policy.forget(request_id)
            self.nwor_drafted.pop(request_id, None)
        return step

    def nwor_shorten(self, step: Any, caps: Mapping[str, int]) -> None:
        """Asynchronous steps carry placeholders for drafts to come: as many as the request may have."""
        if not self.scheduler_config.async_scheduling:
            return
        for request_id, cap in caps.items():
            request = self.requests.get(request_id)
            if request is not None and request_id in step.num_scheduled_tokens and len(request.spec_token_ids) > cap:
                request.spec_token_ids = request.spec_token_ids[:cap]

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        caps = self.nwor_plan.caps if self.nwor_config.per_request else {}
        for index, request_id in enumerate(draft_token_ids.req_ids) if caps else ():
            if request_id in caps:
                draft_token_ids.draft_token_ids[index] = draft_token_ids.draft_token_ids[index][: caps[request_id]]
        super().update_draft_token_ids(draft_token_ids)

    # Observing

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        request_id, invalid = kwargs["request_id"], kwargs["num_invalid_spec_tokens"]
        drafted = verified = kwargs["num_draft_tokens"] - (invalid.get(request_id, 0) if invalid else 0)
        draft = self.nwor_drafted.get(request_id)
        confidence: tuple[float, ...] = ()
        if draft is not None:
            drafted, confidence = max(draft.drafted, verified), draft.confidence
        self.nwor_rounds.append(Round(request_id, drafted, verified, kwargs["num_accepted_tokens"], confidence))
        return super().make_spec_decoding_stats(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = report_of(model_runner_output)
        if report is not None and report.cut:
            invalid = dict(scheduler_output.num_invalid_spec_tokens or {})
            for request_id, n in report.cut.items():
                invalid[request_id] = max(invalid.get(request_id, 0), n)
            scheduler_output.num_invalid_spec_tokens = invalid
        self.nwor_rounds, unverified = [], self.nwor_unverified(scheduler_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if scheduler_output.num_scheduled_tokens:
            self.nwor_observe(scheduler_output, report, [*self.nwor_within(outputs), *unverified])
        return outputs

    def nwor_unverified(self, step: Any) -> list[Round]:
        """Rounds of those whose draft came to nothing: vLLM has no numbers for them, and without them the others' would
        say that all drafts are as good as theirs. Some drafters do not say how long theirs were."""
        tokens, drafts, ours = step.num_scheduled_tokens, step.scheduled_spec_decode_tokens, self.nwor_drafted
        asked: Iterable[str] = ours or (tokens if self.nwor_asked else ())
        return [
            Round(i, ours[i].drafted, 0, 0, ours[i].confidence) if ours else Round(i, 0, 0, 0)
            for i in asked
            if tokens.get(i) == 1 and not drafts.get(i) and i in self.requests
        ]

    def nwor_within(self, outputs: Mapping[int, Any]) -> list[Round]:
        """The rounds without what lies beyond a text's end: accepted in vain, it makes long drafts look better."""
        ended = {
            out.request_id: len(out.new_token_ids)
            for client in outputs.values()
            for out in client.outputs
            if out.finish_reason is not None
        }
        if not ended:
            return self.nwor_rounds
        rounds = list(self.nwor_rounds)
        for i, done in enumerate(rounds):
            tokens = ended.get(done.request_id)
            if tokens is not None and tokens <= done.accepted:
                last = max(tokens - 1, 0)
                rounds[i] = done._replace(verified=min(done.verified, last), accepted=last)
        return rounds

    def nwor_observe(self, step: Any, report: DraftReport | None, rounds: list[Round]) -> None:
        """`rounds`: what the policy sees of them. The counters have vLLM's."""
        now = time.perf_counter()
        start = self.nwor_ended if self.nwor_busy else max(self.nwor_ended, self.nwor_started)
        self.nwor_ended, self.nwor_busy = now, bool(self.running)
        k = step.nwor_k
        # Lessons come in lumps, and the step that happens to wait for one is no dearer by them. Asynchronous steps
        # do not wait.
        thought = 0.0 if self.scheduler_config.async_scheduling else self.nwor_thought
        cut = report.cut if report is not None else {}
        drafts, tokens = step.scheduled_spec_decode_tokens, step.num_scheduled_tokens
        decoding = len(tokens)
        if step.total_num_scheduled_tokens > decoding:
            decoding = sum([n == 1 + len(drafts.get(i, ())) for i, n in tokens.items()])
        trimmed = sum(cut.values()) if cut else 0
        verified = decoding + sum([len(t) for t in drafts.values()]) - trimmed
        draft_steps = min(report.forwards, k) if report is not None else k
        measured = Step(
            rounds=self.nwor_rounds,
            k=k,
            draft_steps=draft_steps,
            seconds=now - start - thought,
            requests=decoding,
            verified_tokens=verified,
            context_tokens=sum([r.num_computed_tokens for r in self.running]),
            prefill_tokens=max(step.total_num_scheduled_tokens - trimmed - verified, 0),
            judged_steps=draft_steps if report is not None and report.confidence else 0,
            prompts=len(tokens) - decoding,
        )
        seen = measured if rounds == self.nwor_rounds else dataclasses.replace(measured, rounds=rounds)
        self.nwor_policy.observe(seen)
        self.nwor_thought = time.perf_counter() - now
        self.nwor_asked = k
        skipped = self.nwor_take(report) if report is not None else 0
        if step.nwor_counted == self.nwor_counters.number:  # not in flight when the counters were reset
            self.nwor_counters.step(measured, thought)
            self.nwor_requests.add(self.nwor_rounds)
            if report is not None:
                self.nwor_counters.report(report, skipped, orders_of(step).caps)
        if self.nwor_publisher.due(self.nwor_busy):
            self.nwor_publish()

    def nwor_publish(self) -> None:
        policy = self.nwor_policy
        self.nwor_publisher.publish(self.nwor_counters.snapshot(), policy.metrics(), policy.name)

    def nwor_take(self, report: DraftReport) -> int:
        """The drafts that the next step verifies; how many rows it will not verify."""
        self.nwor_drafted = {}
        skipped = 0
        for request_id, length in report.lengths.items():
            if request_id in self.requests:
                confidence = report.confidence.get(request_id, ())
                self.nwor_drafted[request_id] = _Drafted(max(length, len(confidence)), confidence)
                skipped += report.k - length
                if 0.0 in confidence and not self.nwor_told:  # no distribution has such a maximum
                    self.nwor_told = True
                    compat.log.warning("nwor: the drafter's logits are not finite, so its drafts end: %s", request_id)
        return skipped

    def nwor_control(self, change: dict[str, Any]) -> dict[str, Any]:
        return answer(self, change)

    def shutdown(self) -> None:
        super().shutdown()
        self.nwor_publisher.close()
        compat.log.info("nwor: %s", self.nwor_counters.snapshot())


def adapt_boundaries(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Around a function of a prompt's length that vLLM calls for every request in every step."""
    return functools.lru_cache(maxsize=4096)(stock)


@functools.cache
def __getattr__(name: str) -> Any:
    """In front of a scheduler of the user's own, where that is one of vLLM's underneath."""
    theirs = theirs_in(__name__, name)
    if issubclass(theirs, Elastic):
        return theirs
    if not issubclass(theirs, Scheduler):
        where = f"{theirs.__module__}.{theirs.__name__}"
        compat.log.warning("nwor: %s is no subclass of vLLM's Scheduler: draft lengths and counters are off", where)
        return theirs
    return type(name, (Elastic, theirs), {"__module__": __name__})


class ElasticScheduler(Elastic, Scheduler):  # type: ignore[misc]
    """Synchronous; also `--scheduler-cls nwor_vllm.plugin.scheduler.ElasticScheduler`."""


class ElasticAsyncScheduler(Elastic, AsyncScheduler):  # type: ignore[misc]
    """Asynchronous; also `--scheduler-cls nwor_vllm.plugin.scheduler.ElasticAsyncScheduler`."""
