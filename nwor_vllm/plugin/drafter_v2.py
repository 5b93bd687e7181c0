"""Drafting on the V2 model runner: every speculator drafts the step's K and stops when nobody needs another token.

A speculator keeps its stock class as base; ours is put in front of it. What it may trim depends on the engine:

exact   a request keeps what its stop rule kept, and the draft loop ends with the last request. The lengths must reach
        the host before the next step: synchronous scheduling, or a drafter that runs without CUDA graphs.
native  vLLM's adaptive verification trims on the device; we choose K, which is what drafting costs.
length  only K.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nwor_vllm.plugin.v2_draft import NO_RULE, DraftReport, Drafts, DraftStopped
from nwor_vllm.policy.base import StopRule

_StockSpeculator: Any = object  # the vLLM class that `elastic` puts behind the mixin


@dataclasses.dataclass
class DraftPlan:
    """What the coming `propose` may do; written before every step."""

    rule: StopRule = NO_RULE
    caps: Mapping[str, int] = dataclasses.field(default_factory=dict)


class ElasticDrafter(_StockSpeculator):  # type: ignore[misc]
    """What autoregressive speculators share."""

    def nwor_attach(self, *, asynchronous: bool, pads: bool, pad_rejected: Callable[..., None]) -> None:
        self.nwor = Drafts(self.max_num_reqs, self.num_speculative_steps, self.device)
        self.nwor_plan = DraftPlan()
        self.nwor_async = asynchronous
        self.nwor_pads = pads
        self.nwor_pad_rejected = pad_rejected
        self.nwor_mode = "exact"
        self.nwor_stops = False  # whether this round's lengths will be honoured: only then may rows be left undrafted
        self.nwor_round: Callable[[], DraftReport] | None = None
        self.nwor_rejected_rows = torch.zeros(1, dtype=torch.int64, device=self.device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        super().init_cudagraph_manager(cudagraph_mode)
        manager = getattr(self, "decode_cudagraph_manager", None)
        self.nwor_mode = self._nwor_resolve_mode(graphs=bool(manager is not None and manager.cudagraph_mode))

    def _nwor_resolve_mode(self, graphs: bool) -> str:
        if self.enable_adaptive_verification:
            return "native"
        parallel = self.vllm_config.parallel_config
        one_stage = parallel.pipeline_parallel_size == 1 and self.dp_size == 1 and self.pcp_manager is None
        if self.use_local_argmax_reduction or self.draft_watermarker is not None or not one_stage:
            return "length"
        return "length" if self.nwor_async and graphs else "exact"

    def nwor_begin(self, input_batch: Any, num_sampled: Any, num_rejected: Any, k: int) -> None:
        plan, ids = self.nwor_plan, input_batch.req_ids
        may_stop = plan.rule.active or input_batch.has_prefill or any(plan.caps.get(i, k) < k for i in ids)
        # Grammar bitmasks are laid out for the scheduled drafts before the worker can trim them.
        held = self.nwor_async and (input_batch.has_structured_output_reqs or not may_stop)
        self.nwor_stops = self.nwor_mode == "exact" and not held
        self.nwor.begin(ids, k, plan.rule, plan.caps, num_sampled, num_rejected)
        self.nwor_may_stop = self.nwor_stops and may_stop

    def nwor_end(self, prefill_rows: int, steps_run: int) -> None:
        drafts = self.nwor
        drafts.live = False
        if self.nwor_stops:
            self.nwor_round = functools.partial(
                drafts.report, steps_run=steps_run, prefill_rows=prefill_rows, pads=self.nwor_pads
            )
        else:
            rows = prefill_rows + len(drafts.ids) * (steps_run - 1)
            self.nwor_round = functools.partial(DraftReport, drafts.k, steps_run, rows_written=rows)

    def nwor_check(self) -> None:
        """Before a draft forward beyond the first."""
        if self.nwor_may_stop and self.nwor.exhausted():
            raise DraftStopped

    def sample_draft(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.nwor.live and self.nwor.k == 0:  # the forward fed the drafter's KV; nobody will look at its token
            return self.draft_tokens[: hidden_states.shape[0], 0]
        return super().sample_draft(hidden_states, *args, **kwargs)

    def _maybe_predict_acceptance(self, logits: Any, idx_mapping: Any, draft_step: Any) -> None:
        super()._maybe_predict_acceptance(logits, idx_mapping, draft_step)
        if self.nwor_mode != "exact" or (self.nwor.live and not self.nwor_stops):
            return
        alive = self.nwor.score(logits, draft_step)
        if self.nwor_pads:
            # vLLM's own mark for a row that the drafter must not act on: no K/V write, no cached draft logits.
            self.idx_mapping[: alive.shape[0]].masked_fill_(~alive, -1)


class ElasticTargetDependent(ElasticDrafter):
    """EAGLE, EAGLE-3, MTP: the draft prefill reuses the target's batch."""

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        inputs = (input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states)
        if kwargs.get("dummy_run"):
            return super().propose(*inputs, num_sampled, num_rejected, *args, **kwargs)
        k, n = kwargs.get("num_speculative_tokens", self.num_speculative_steps), input_batch.num_reqs
        self.nwor_begin(input_batch, num_sampled, num_rejected, k)
        if self.nwor_pads:
            # The target has read its slots; what is left of them serves the draft prefill only.
            last = input_batch.query_start_loc[1 : n + 1] - num_rejected[:n] - 1
            self.nwor_pad_rejected(self.block_tables.slot_mappings, input_batch.query_start_loc, last, n)
        self.nwor_steps = max(k, 1)
        try:
            return super().propose(*inputs, num_sampled, num_rejected, *args, **kwargs)
        finally:
            self.nwor_end(input_batch.num_tokens, self.nwor_steps)

    def _multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        self._nwor_loop(super()._multi_step_decode, args, kwargs)

    def _fused_multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        self._nwor_loop(super()._fused_multi_step_decode, args, kwargs)

    def _nwor_loop(self, loop: Callable[..., None], args: Any, kwargs: Any) -> None:
        try:
            loop(*args, **kwargs)
        except DraftStopped:
            self.nwor_steps = 1 + self.nwor.forwards

    def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
        if self.nwor.live:  # not while graphs are captured or warmed up
            self.nwor_check()
            self.nwor.forwards += 1
        super()._generate_draft(*args, **kwargs)


class ElasticStandalone(ElasticDrafter):
    """`draft_model`: a drafter of its own, that upstream lets draft num_speculative_tokens whatever the step says."""

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        rest = (attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, num_rejected, *args)
        if kwargs.get("dummy_run"):
            return super().propose(input_batch, *rest, **kwargs)
        most, n = self.num_speculative_steps, input_batch.num_reqs
        k = kwargs.get("num_speculative_tokens", most)
        self.nwor_begin(input_batch, num_sampled, num_rejected, k)
        # The draft loop reads the batch's own mapping; give it the static one, where stopped rows are marked.
        self.idx_mapping[:n].copy_(input_batch.idx_mapping)
        batch = dataclasses.replace(input_batch, idx_mapping=self.idx_mapping[:n])
        self.num_speculative_steps = max(k, 1)
        try:
            super().propose(batch, *rest, **kwargs)
        finally:
            self.num_speculative_steps = most
            self.nwor_end(input_batch.num_tokens + n, self.nwor.forwards)
        return self.draft_tokens[:n]

    def _multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._multi_step_decode(*args, **kwargs)
        except DraftStopped:
            return

    def _run_model(self, *args: Any, **kwargs: Any) -> Any:
        drafts = self.nwor
        if drafts.live:
            if drafts.forwards:
                self.nwor_check()
            elif self.nwor_pads:
                rows = self.expanded_slot_mappings, self.input_buffers.query_start_loc, self.last_token_indices
                self.nwor_pad_rejected(*rows, len(drafts.ids))
            drafts.forwards += 1
        return super()._run_model(*args, **kwargs)


@functools.cache
def elastic(mixin: type[ElasticDrafter], stock: type[Any]) -> type[Any]:
    return type(f"Elastic{stock.__name__}", (mixin, stock), {})
