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
from collections.abc import Callable
from typing import Any

import torch

from nwor_vllm.plugin import compat
from nwor_vllm.plugin.catch_up import shifted
from nwor_vllm.plugin.catch_up_v2 import CatchUpV2, Fed, usable
from nwor_vllm.plugin.messages import NO_ORDERS, DraftReport, Orders
from nwor_vllm.plugin.v2_round import DraftRound


class DraftStopped(Exception):
    """Nobody needs another draft token: leave the loop."""


class ElasticDrafter(Fed):
    """What autoregressive speculators share."""

    def nwor_attach(
        self, *, pads: bool, pad_rejected: Callable[..., None] | None, exits: bool, catches_up: bool
    ) -> None:
        self.nwor = DraftRound(self.max_num_reqs, self.num_speculative_steps, self.device)
        self.nwor_orders: Orders = NO_ORDERS
        self.nwor_async = bool(self.scheduler_config.async_scheduling)
        self.nwor_pads = pads
        self.nwor_pad_rejected = pad_rejected if pads else None
        self.nwor_exits = exits
        self.nwor_catch_up = CatchUpV2(self) if catches_up and usable(self) else None
        self.nwor_most: int = self.num_speculative_steps
        self.nwor_mode = "length"
        self.nwor_stops = False  # this round's lengths will be honoured: only then may rows be left undrafted
        self.nwor_may_stop = False
        self.nwor_pending: Callable[[], DraftReport] | None = None  # the last round, not yet read from the device

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        super().init_cudagraph_manager(cudagraph_mode)
        manager = getattr(self, "decode_cudagraph_manager", None)
        self.nwor_mode, why = self.nwor_resolve(graphs=manager is not None and bool(manager.cudagraph_mode))
        compat.log.info("nwor: V2 drafting is %s: %s", self.nwor_mode, why)

    def nwor_resolve(self, graphs: bool) -> tuple[str, str]:
        if self.enable_adaptive_verification:
            return "native", "vLLM's adaptive verification trims, nwor chooses the draft length"
        parallel = self.vllm_config.parallel_config
        obstacles = {
            "a hook is missing": not self.nwor_exits,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "data parallelism": self.dp_size > 1,
            "prefill context parallelism": self.pcp_manager is not None,
            "use_local_argmax_reduction": self.use_local_argmax_reduction,
            "watermarking": self.draft_watermarker is not None,
            "asynchronous scheduling with CUDA graphs; speculative_config.enable_adaptive_verification would trim": (
                self.nwor_async and graphs
            ),
        }
        for why, true in obstacles.items():
            if true:
                return "length", f"drafts are not trimmed ({why})"
        if graphs:
            return "exact", "drafts are trimmed one by one; draft loops inside CUDA graphs run to the step's length"
        return "exact", "drafts are trimmed one by one and their loop ends with the last"

    def nwor_k(self, kwargs: dict[str, Any]) -> int:
        k = kwargs.get("num_speculative_tokens")
        return int(self.nwor_most if k is None else k)

    def nwor_begin(self, batch: Any, num_sampled: torch.Tensor, num_rejected: torch.Tensor, k: int) -> None:
        orders, ids = self.nwor_orders, batch.req_ids
        capped = any(orders.caps.get(i, k) < k for i in ids)
        may_stop = orders.stop.active or capped or batch.has_prefill
        # Grammar bitmasks are laid out for the placeholders, before the worker can trim them.
        held = self.nwor_async and (batch.has_structured_output_reqs or not (may_stop or orders.observe))
        self.nwor_stops = self.nwor_mode == "exact" and not held
        self.nwor_may_stop = self.nwor_stops and may_stop
        self.nwor.begin(ids, k, orders, num_sampled, num_rejected)

    def nwor_end(self, forwards: int, prefill_rows: int) -> None:
        now = self.nwor
        now.live = False
        if self.nwor_stops:
            self.nwor_pending = functools.partial(
                now.report, forwards=forwards, prefill_rows=prefill_rows, pads=self.nwor_pads
            )
        else:
            rows = prefill_rows + len(now.ids) * (forwards - 1)
            self.nwor_pending = functools.partial(DraftReport, now.k, forwards, rows_written=rows)

    def nwor_pass(self, batch: Any, tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """A step that drafts nothing and runs nothing."""
        fed = self.nwor_skip(batch, tokens, hidden)
        self.nwor.ids = list(batch.req_ids)
        self.nwor_pending = functools.partial(DraftReport, 0, 1 if fed else 0, rows_written=fed)
        drafts: torch.Tensor = self.draft_tokens[: batch.num_reqs].fill_(-1)
        return drafts

    def nwor_settle(self) -> DraftReport | None:
        """Read the last round, once. Waits for the device where a draft could have stopped."""
        pending, self.nwor_pending = self.nwor_pending, None
        return pending() if pending is not None else None

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
        temperature = None if self.draft_logits is None else self.temperature[idx_mapping]
        alive = self.nwor.score(logits, draft_step, temperature)
        if self.nwor_pads:
            # vLLM's own mark for a row that the drafter must not act on: no K/V write, no cached draft logits.
            self.idx_mapping[: alive.shape[0]].masked_fill_(~alive, -1)


class ElasticTargetDependent(ElasticDrafter):
    """EAGLE, EAGLE-3, MTP: the draft prefill reuses the target's batch."""

    pass_hidden_states_to_model = True

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
        n, k = input_batch.num_reqs, self.nwor_k(kwargs)
        if self.nwor_idle(input_batch, k):
            rows, of = input_batch.num_tokens, input_batch.idx_mapping
            hidden = torch.cat([h[:rows] for h in aux_hidden_states or [last_hidden_states]], dim=-1)
            tokens = args[0].view(-1)[of]
            if rows > n or input_batch.has_prefill:
                tokens = torch.where(num_sampled > 0, tokens, args[1].view(-1)[of])  # in the midst of a prompt
                tokens = shifted(input_batch.input_ids[:rows], tokens, input_batch.query_start_loc[1 : n + 1])
            return self.nwor_pass(input_batch, tokens, hidden)
        self.nwor_replay(input_batch)
        self.nwor_begin(input_batch, num_sampled, num_rejected, k)
        if self.nwor_pad_rejected is not None and self.pcp_manager is None:  # partitioned prefills have other slots
            # The target has read its slots; what is left of them serves the draft prefill only.
            last = input_batch.query_start_loc[1 : n + 1] - num_rejected[:n] - 1
            self.nwor_pad_rejected(self.block_tables.slot_mappings, input_batch.query_start_loc, last, n)
        self.nwor_forwards = max(k, 1)
        try:
            return super().propose(*inputs, num_sampled, num_rejected, *args, **kwargs)
        finally:
            self.nwor_end(self.nwor_forwards, input_batch.num_tokens)

    def nwor_forward(self, n: int, hidden: torch.Tensor, attention: Any, slots: Any) -> None:
        self.hidden_states[:n] = self.model.combine_hidden_states(hidden) if self.method == "eagle3" else hidden
        self.on_prefill_begin(n)
        self._run_model(n, attention, slots, num_tokens_across_dp=None)

    def _multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        self.nwor_loop(super()._multi_step_decode, args, kwargs)

    def _fused_multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        self.nwor_loop(super()._fused_multi_step_decode, args, kwargs)

    def nwor_loop(self, loop: Callable[..., None], args: Any, kwargs: Any) -> None:
        try:
            loop(*args, **kwargs)
        except DraftStopped:
            self.nwor_forwards = 1 + self.nwor.forwards

    def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
        if self.nwor.live:  # not while graphs are captured or warmed up
            self.nwor_check()
            self.nwor.forwards += 1
        super()._generate_draft(*args, **kwargs)


class ElasticStandalone(ElasticDrafter):
    """`draft_model`: a drafter of its own, that upstream lets draft num_speculative_tokens whatever the step says."""

    pass_hidden_states_to_model = False

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
        n, k = input_batch.num_reqs, self.nwor_k(kwargs)
        if self.nwor_idle(input_batch, k):
            return self.nwor_pass(input_batch, input_batch.input_ids, None)
        self.nwor_replay(input_batch)
        self.nwor_begin(input_batch, num_sampled, num_rejected, k)
        # The draft loop reads the batch's own mapping; give it the static one, where stopped rows are marked.
        self.idx_mapping[:n].copy_(input_batch.idx_mapping)
        batch = dataclasses.replace(input_batch, idx_mapping=self.idx_mapping[:n])
        self.num_speculative_steps = max(k, 1)
        try:
            super().propose(batch, *rest, **kwargs)
        finally:
            self.num_speculative_steps = self.nwor_most
            self.nwor_end(self.nwor.forwards, input_batch.num_tokens + n)
        return self.draft_tokens[:n]

    def nwor_forward(self, n: int, hidden: None, attention: Any, slots: Any) -> None:
        self._run_model(self.input_buffers.input_ids[:n], self.input_buffers.positions[:n], attention, slots, None)

    def _multi_step_decode(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._multi_step_decode(*args, **kwargs)
        except DraftStopped:
            return

    def _run_model(self, *args: Any, **kwargs: Any) -> Any:
        now = self.nwor
        if now.live:
            if now.forwards:
                self.nwor_check()
            elif self.nwor_pad_rejected is not None:
                rows = self.expanded_slot_mappings, self.input_buffers.query_start_loc, self.last_token_indices
                self.nwor_pad_rejected(*rows, len(now.ids))
            now.forwards += 1
        return super()._run_model(*args, **kwargs)


@functools.cache
def elastic(mixin: type[ElasticDrafter], stock: type[Any]) -> type[Any]:
    return type(f"Elastic{stock.__name__}", (mixin, stock), {})
