"""The V2 model runner: hands each step's orders to the drafter, trims what is verified, reports what was drafted.

Under synchronous scheduling the scheduler is told how many tokens each draft has. Under asynchronous scheduling the
next step was planned before they existed, with `k` placeholders each: the worker verifies fewer, in its own copy of the
step, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from nwor_vllm.config import load
from nwor_vllm.plugin import compat
from nwor_vllm.plugin.drafter_v2 import ElasticDrafter, ElasticStandalone, ElasticTargetDependent, elastic
from nwor_vllm.plugin.graph_memory import GraphMemory
from nwor_vllm.plugin.messages import DraftReport, orders_of


class ElasticRunner(GraphMemory):
    nwor_lengths: dict[str, int]  # what each request may verify of its last draft; absent: all of it
    nwor_report: DraftReport | None
    nwor_cut: dict[str, int]
    nwor_rows: list[int]  # [draft-layer KV rows written, avoided] since the start

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.nwor_cut = {}
        if kwargs.get("dummy_run"):
            return super().execute_model(scheduler_output, *args, **kwargs)
        self.nwor_settle()
        drafter: ElasticDrafter = self.speculator
        drafter.nwor_orders = orders_of(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self.nwor_lengths.pop(request_id, None)
        drafter.nwor_forget(scheduler_output)
        if drafter.nwor_async:
            scheduler_output, self.nwor_cut = trimmed(scheduler_output, self.nwor_lengths)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def nwor_settle(self) -> None:
        drafter: ElasticDrafter = self.speculator
        report = drafter.nwor_settle()
        if report is None:
            return
        self.nwor_rows[0] += drafter.nwor_fed_rows
        drafter.nwor_fed_rows = 0
        for request_id in drafter.nwor.ids:
            self.nwor_lengths.pop(request_id, None)
        self.nwor_lengths.update(report.lengths)
        self.nwor_report = report
        self.nwor_rows[0] += report.rows_written
        self.nwor_rows[1] += report.rows_avoided

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if not self.speculator.nwor_async:
            self.nwor_settle()  # the scheduler asks for the drafts next; asynchronous ones are read a step later
        report, self.nwor_report = self.nwor_report, None
        if self.nwor_cut:
            report = dataclasses.replace(report or DraftReport(0, 0), cut=self.nwor_cut)
        return output if output is None or report is None else compat.attach(output, report)

    def take_draft_token_ids(self) -> Any:
        drafts = super().take_draft_token_ids()
        if drafts is not None and not self.speculator.nwor_async:
            drafts.draft_token_ids = [
                tokens[: self.nwor_lengths.get(request_id, len(tokens))]
                for request_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
            ]
        return drafts


def trimmed(step: Any, lengths: Mapping[str, int]) -> tuple[Any, dict[str, int]]:
    """The step without the slots its drafts gave up, and how many those were. Its scheduler takes them for rejected."""
    planned = step.scheduled_spec_decode_tokens
    cut = {i: len(t) - lengths[i] for i, t in planned.items() if lengths.get(i, len(t)) < len(t)}
    if not cut:
        return step, cut
    tokens, drafts = dict(step.num_scheduled_tokens), dict(planned)
    for request_id, n in cut.items():
        tokens[request_id] -= n
        drafts[request_id] = drafts[request_id][:-n]
        if not drafts[request_id]:
            del drafts[request_id]
    return dataclasses.replace(
        step,
        num_scheduled_tokens=tokens,
        scheduled_spec_decode_tokens=drafts,
        total_num_scheduled_tokens=step.total_num_scheduled_tokens - sum(cut.values()),
    ), cut


@functools.cache
def _elastic_runner(stock: type[Any]) -> type[Any]:
    return type(f"Elastic{stock.__name__}", (ElasticRunner, stock), {})


def adopt(runner: Any) -> None:
    """Put our classes in front of the runner's and its speculator's, if its engine asks for it."""
    config = load(runner.vllm_config.additional_config, os.environ)
    speculator = getattr(runner, "speculator", None)
    if config is None or speculator is None:
        return
    dependent, standalone = compat.v2_speculators()
    mixin: type[ElasticDrafter]
    if isinstance(speculator, dependent):
        mixin = ElasticTargetDependent
    elif isinstance(speculator, standalone):
        mixin = ElasticStandalone
    else:
        compat.log.info("nwor: %s drafts in one pass: only its length is chosen", type(speculator).__name__)
        return
    stock: Any = type(speculator)
    speculator.__class__ = elastic(mixin, stock)
    # A KV connector may still read the step's slots after the target's forward.
    moved = runner.vllm_config.kv_transfer_config is not None
    pads = config.no_write_on_reject and not moved and compat.has("no write on reject on the V2 runner")
    speculator.nwor_attach(
        pads=pads,
        pad_rejected=compat.v2_pad_rejected() if pads else None,
        exits=compat.has("early exit on the V2 runner"),
        catches_up=compat.has("no draft forward at K = 0 on the V2 runner"),
    )
    stock = type(runner)
    runner.__class__ = _elastic_runner(stock)
    runner.nwor_lengths, runner.nwor_cut, runner.nwor_rows, runner.nwor_report = {}, {}, [0, 0], None


def adapt(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        adopt(self)

    return init
