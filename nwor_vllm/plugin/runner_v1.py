"""The V1 model runner: opens a draft round per step, hands ragged drafts on, trims what asynchronous steps verify.

Under synchronous scheduling the drafts go back as ragged lists. Under asynchronous scheduling the next step was planned
before they existed, with `k` placeholders each: the worker verifies fewer, in its own copy of the step, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch

from nwor_vllm.config import NworConfig, load
from nwor_vllm.kernels import StopState
from nwor_vllm.plugin import compat
from nwor_vllm.plugin.catch_up import CatchUp, shifted, usable
from nwor_vllm.plugin.draft_round import IDLE, DraftRound
from nwor_vllm.plugin.drafter_v1 import elastic
from nwor_vllm.plugin.graph_memory import GraphMemory
from nwor_vllm.plugin.judge import Scratch
from nwor_vllm.plugin.messages import DraftReport, Orders, orders_of

SKIPPED = DraftReport(0, 0)  # nothing to draft, and no forward of the drafter
_StockRunner: Any = object  # the vLLM class that `adapt` puts behind the mixin


class ElasticRunner(GraphMemory):
    nwor_config: NworConfig
    nwor_trims: bool  # asynchronous steps can be trimmed in the worker
    nwor_pads: bool
    nwor_state: StopState | Scratch
    nwor_last: DraftReport | None = None
    nwor_lengths: dict[str, int]  # draft tokens each request kept, where that is fewer than its placeholders
    nwor_cut: dict[str, int]
    nwor_rows: list[int]  # [draft-layer KV rows written, avoided] since the start

    nwor_catch_up: Any  # a CatchUp, or None where steps without a draft feed the drafter as in stock vLLM

    def propose_draft_token_ids(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.nwor_catch_up is not None and self.nwor_idle(scheduler_output):
            return self.nwor_skip(scheduler_output, *args)
        ids, k = list(self.input_batch.req_ids), scheduler_output.num_spec_tokens_to_schedule
        orders = orders_of(scheduler_output)
        held = self.use_async_scheduling
        if held and not self.nwor_trims:
            orders = Orders(observe=orders.observe)
        # Grammar bitmasks are laid out for the placeholders, before the worker can trim them.
        whole = [row for row, i in enumerate(ids) if self._nwor_structured(i)] if held else ()
        dead = self.discard_request_mask.np[: len(ids)].tolist()
        now = self.drafter.nwor = DraftRound(ids, k, orders, self.nwor_state, dead, whole, self.nwor_pads)
        if self.nwor_catch_up is not None and self.nwor_catch_up.steps:
            self.nwor_replay(now.ids, args[-2])
        drafts = super().propose_draft_token_ids(scheduler_output, *args, **kwargs)
        lengths = now.lengths() if now.tokens else ()
        self.nwor_last = report = now.report(lengths)
        self.nwor_lengths = dict(report.lengths) if held else {}
        if lengths and not held:
            drafts = [row[:n] for row, n in zip(drafts.tolist(), lengths, strict=True)]
        self.nwor_rows[0] += report.rows_written
        self.nwor_rows[1] += report.rows_avoided
        return drafts

    def nwor_idle(self, step: Any) -> bool:
        """Nothing to draft, and nothing to feed the drafter but one token of each request, or prompts that can wait."""
        if step.num_spec_tokens_to_schedule:
            return False
        rows = step.total_num_scheduled_tokens
        whole = not step.scheduled_spec_decode_tokens  # no row may turn out to be rejected
        return bool(rows == len(step.num_scheduled_tokens) or (whole and self.nwor_catch_up.takes(rows)))

    def nwor_skip(self, step: Any, sampled: Any, _: Any, hidden: Any, __: Any, aux: Any, *rest: Any) -> Any:
        """What is left of a drafting when nothing is drafted: the sampled tokens, for the steps to come."""
        # Every tensor operation counts here: away from the model's loops one costs several times what it does in them.
        ids, drafter, catch_up = self.input_batch.req_ids, self.drafter, self.nwor_catch_up
        n, rows, tokens, counts = len(ids), step.total_num_scheduled_tokens, sampled, None
        ends = None if rows == n else [*itertools.accumulate(step.num_scheduled_tokens[i] for i in ids)]
        if True in self.discard_request_mask.np[:n].tolist():
            tokens, counts = drafter.prepare_next_token_ids_padded(
                sampled, self.requests, self.input_batch, self.discard_request_mask.gpu
            )
        if self.valid_sampled_token_count_event is not None:
            counts = torch.ones_like(tokens[:, 0]) if counts is None else counts  # one valid token each
            self._copy_valid_sampled_token_count(tokens.flatten(), counts)
        if not drafter.pass_hidden_states_to_model:
            tokens, hidden = self.input_ids.gpu[:rows].clone(), None
        elif ends is not None:
            tokens = shifted(self.input_ids.gpu[:rows], tokens, rest[-2].query_start_loc[1 : n + 1])
        if hidden is not None:
            if self.use_aux_hidden_state_outputs:
                hidden = torch.cat([h[:rows] for h in aux], dim=-1)
            elif len(hidden) > rows or not drafter.nwor_host:  # a CUDA graph's next replay writes into it
                hidden = hidden[:rows].clone()
        catch_up.skip(ids, tokens, self._get_positions(rows).clone(), hidden, ends)
        self.nwor_last = SKIPPED
        if catch_up.due:
            self.nwor_replay(ids, rest[-2])
            self.nwor_last = DraftReport(0, 1)
        if self.use_async_scheduling:
            return torch.empty(n, 0, dtype=torch.int64, device=self.device)
        return [[] for _ in ids]

    def nwor_replay(self, ids: list[str], batch: Any) -> None:
        now, self.drafter.nwor = self.drafter.nwor, IDLE  # not part of the round
        self.nwor_rows[0] += self.nwor_catch_up.replay(ids, batch)
        self.drafter.nwor = now

    def _nwor_structured(self, request_id: str) -> bool:
        params = self.requests[request_id].sampling_params
        return params is not None and params.structured_outputs is not None

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.nwor_cut = {}
        self.nwor_planned: dict[str, int] = {}
        if self.use_async_scheduling and self.nwor_lengths:
            scheduler_output = self._nwor_trim(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _nwor_trim(self, step: Any) -> Any:
        planned = step.scheduled_spec_decode_tokens
        cut = {
            i: len(t) - self.nwor_lengths[i] for i, t in planned.items() if self.nwor_lengths.get(i, len(t)) < len(t)
        }
        if not cut:
            return step
        tokens, drafts = dict(step.num_scheduled_tokens), dict(planned)
        for request_id, n in cut.items():
            tokens[request_id] -= n
            drafts[request_id] = drafts[request_id][:-n]
            if not drafts[request_id]:
                del drafts[request_id]
        self.nwor_cut, self.nwor_planned = cut, {i: len(t) for i, t in planned.items()}
        trimmed = dataclasses.replace(
            step,
            num_scheduled_tokens=tokens,
            scheduled_spec_decode_tokens=drafts,
            total_num_scheduled_tokens=step.total_num_scheduled_tokens - sum(cut.values()),
        )
        trimmed.nwor = orders_of(step)
        return trimmed

    def _update_states(self, scheduler_output: Any) -> Any:
        if self.nwor_catch_up is not None:
            step = scheduler_output
            new = [r.req_id for r in step.scheduled_new_reqs]
            if gone := [*new, *step.finished_req_ids, *step.scheduled_cached_reqs.resumed_req_ids]:
                self.nwor_catch_up.forget(gone)
        correct = super()._update_states(scheduler_output)
        # The scheduler advanced every request by its placeholders; what it takes back is counted from there.
        for request_id in self.nwor_cut:
            if request_id in self.requests:
                self.requests[request_id].prev_num_draft_len = self.nwor_planned[request_id]
        return correct

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.nwor_last, self.nwor_lengths = None, {}
        output = super().sample_tokens(grammar_output)
        report = self.nwor_last
        if self.nwor_cut:
            report = dataclasses.replace(report or DraftReport(0, 0), cut=self.nwor_cut)
        return output if report is None else compat.attach(output, report)


class PlainSteps(_StockRunner):  # type: ignore[misc]
    """Steps that verify no drafts do what they would do without speculation."""

    nwor_plain: dict[int, Any]  # what vLLM works out for a batch without drafts, by its size
    nwor_last: DraftReport | None

    def _calc_spec_decode_metadata(self, num_draft_tokens: Any, cu_num_scheduled_tokens: Any) -> Any:
        n = len(num_draft_tokens)
        if cu_num_scheduled_tokens[-1] != n:
            return super()._calc_spec_decode_metadata(num_draft_tokens, cu_num_scheduled_tokens)
        if n not in self.nwor_plain:  # one token of each request
            self.nwor_plain[n] = super()._calc_spec_decode_metadata(num_draft_tokens, cu_num_scheduled_tokens)
        return self.nwor_plain[n]

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None  # nothing to reject
        return super()._sample(logits, spec_decode_metadata)

    def take_draft_token_ids(self) -> Any:
        return None if self.nwor_last is SKIPPED else super().take_draft_token_ids()


@functools.cache
def _elastic_runner(stock: type[Any], *mixins: type[Any]) -> type[Any]:
    return type(f"Elastic{stock.__name__}", (*mixins, stock), {})


def adopt(runner: Any) -> None:
    """Put our classes in front of the runner's and its drafter's, if its engine asks for it."""
    config = load(runner.vllm_config.additional_config, os.environ)
    drafter: Any = getattr(runner, "drafter", None)
    if config is None or not hasattr(drafter, "propose") or not hasattr(drafter, "needs_extra_input_slots"):
        return
    classes: tuple[Any, Any] = (type(drafter), type(runner))
    mixins = (ElasticRunner, PlainSteps) if compat.has("steps without drafts on the V1 runner") else (ElasticRunner,)
    drafter.__class__, runner.__class__ = elastic(classes[0]), _elastic_runner(classes[1], *mixins)
    runner.nwor_config = config
    runner.nwor_trims = compat.has("trimming under asynchronous scheduling on the V1 runner")
    runner.nwor_pads = config.no_write_on_reject and compat.has("no write on reject on the V1 runner")
    k_max = runner.speculative_config.num_speculative_tokens
    drafter.nwor_host = host = runner.device.type == "cpu"
    drafter.nwor_draws = getattr(drafter, "_enable_probabilistic_draft_probs", True)
    runner.nwor_state = Scratch() if host else StopState.create(runner.max_num_reqs, k_max, runner.device)
    runner.nwor_catch_up = CatchUp(drafter) if usable(runner) else None
    runner.nwor_lengths, runner.nwor_cut, runner.nwor_rows, runner.nwor_plain = {}, {}, [0, 0], {}


def adapt(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        adopt(self)

    return init
