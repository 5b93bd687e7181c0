"""A free K = 0 on the V2 runner: what is kept and when it is replayed is as on V1, the forward is V2's own."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nwor_vllm.plugin import compat
from nwor_vllm.plugin.catch_up import CatchUp

_StockSpeculator: Any = abc.ABC  # stands for the vLLM class that `drafter_v2.elastic` puts behind the mixins


@dataclass(frozen=True)
class Missed:
    """Rows that a drafter was not fed, by request of `batch`."""

    requests: list[int]
    starts: np.ndarray[Any, np.dtype[np.int32]]  # each request's first row, and the end
    batch: Any


class CatchUpV2(CatchUp):
    def _attention(self, missed: Mapping[int, int], positions: torch.Tensor, batch: Any) -> Missed:
        return Missed(list(missed), np.cumsum([0, *missed.values()], dtype=np.int32), batch)


class Fed(_StockSpeculator):  # type: ignore[misc]
    """A speculator's side of it."""

    nwor_catch_up: CatchUpV2 | None = None
    nwor_slots: torch.Tensor | None = None
    nwor_fed_rows = 0
    pass_hidden_states_to_model: bool  # named as on V1's proposer

    @property
    def block_size(self: Any) -> int:
        return int(min(self.block_tables.block_sizes))

    @property
    def max_batch_size(self: Any) -> int:
        return int(self.max_num_reqs)

    def nwor_idle(self, batch: Any, k: int) -> bool:
        """Nothing to draft, and nothing to feed the drafter but one token of each request, or prompts that can wait."""
        if self.nwor_catch_up is None or k:
            return False
        whole = not batch.num_draft_tokens  # no row may turn out to be rejected
        alone = batch.num_tokens == batch.num_reqs and not batch.has_prefill
        return alone or (whole and self.nwor_catch_up.takes(batch.num_tokens))

    def nwor_skip(self: Any, batch: Any, tokens: torch.Tensor, hidden: torch.Tensor | None) -> int:
        """Keep what the drafter was not fed; the rows that had to be replayed at once."""
        n, catch_up = batch.num_tokens, self.nwor_catch_up
        ends = batch.query_start_loc_np[1 : batch.num_reqs + 1].tolist() if n > batch.num_reqs else None
        catch_up.skip(batch.req_ids, tokens[:n].clone(), batch.positions[:n].clone(), hidden, ends)
        return int(catch_up.replay(batch.req_ids, batch)) if catch_up.due else 0

    def nwor_replay(self: Any, batch: Any) -> None:
        if self.nwor_catch_up is not None and self.nwor_catch_up.steps:
            self.nwor_fed_rows += self.nwor_catch_up.replay(batch.req_ids, batch)

    def nwor_forget(self, step: Any) -> None:
        """Requests that are gone, or will be prefilled anew."""
        if self.nwor_catch_up is not None:
            new = [r.req_id for r in step.scheduled_new_reqs]
            if gone := [*new, *step.finished_req_ids, *(step.preempted_req_ids or ())]:
                self.nwor_catch_up.forget(gone)

    def nwor_feed(self: Any, tokens: torch.Tensor, positions: torch.Tensor, hidden: Any, missed: Missed) -> None:
        """A forward for its K/V alone: what steps without a draft left out."""
        n, m, starts, batch = len(tokens), len(missed.requests), missed.starts, missed.batch
        buffers, tables = self.input_buffers, self.block_tables
        index = torch.tensor(missed.requests, device=self.device)
        owners = batch.idx_mapping[index]
        ends = torch.from_numpy(starts).to(self.device)
        buffers.input_ids[:n] = tokens
        buffers.positions[:n] = positions
        buffers.query_start_loc[: m + 1] = ends
        buffers.seq_lens[:m] = positions[ends[1:] - 1] + 1
        if self.nwor_slots is None:  # the target's own are read again by the draft prefill that follows
            self.nwor_slots = torch.empty_like(tables.slot_mappings)
        tables.gather_block_tables(owners, num_reqs_padded=m)
        slots = tables.compute_slot_mappings(owners, ends, buffers.positions[:n], n, out=self.nwor_slots)
        longest, self.draft_max_seq_len = self.draft_max_seq_len, self.max_model_len
        attention = self._build_attn_metadata(
            num_reqs=m,
            batch_desc=compat.v2_eager_batch(n, m),
            query_start_loc_np=starts,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound[missed.requests],
            step=0,
            slot_mappings=slots,
        )
        self.draft_max_seq_len = longest
        self.nwor_forward(n, hidden, attention, compat.v2_slots_by_layer(slots, self.kv_cache_config))
        tables.gather_block_tables(batch.idx_mapping, num_reqs_padded=batch.num_reqs_after_padding)


def usable(speculator: Any) -> bool:
    """Plain text, one position per token, no other rank or connector that waits for the drafter's forward."""
    config, parallel = speculator.vllm_config, speculator.vllm_config.parallel_config
    parts = parallel.pipeline_parallel_size * parallel.prefill_context_parallel_size
    alone = parts * speculator.dp_size * speculator.dcp_size == 1 and config.kv_transfer_config is None
    plain = not config.model_config.is_hybrid and not config.model_config.is_multimodal_model
    # Without positions of its own (Gemma 4) a drafter reads the target's K/V.
    return (
        alone
        and plain
        and speculator.draft_watermarker is None
        and getattr(speculator, "advance_draft_positions", True)
    )
