"""Drafting on the V1 model runner: EAGLE, EAGLE-3, MTP-style and draft models share vLLM's one proposer.

Its loop has a fixed bound, so it is left by an exception. Rows that are known dead write no K/V: rejected rows of the
draft prefill, and rows whose draft has stopped. Nothing the target will read is touched.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.forward_context import set_forward_context

from nwor_vllm.plugin.draft_round import IDLE, DraftRound

PAD = -1  # vLLM's slot that attention backends do not write
_StockProposer: Any = object  # the vLLM class that `elastic` puts behind the mixin


class DraftStopped(Exception):
    """Nobody needs another draft token: leave the loop."""


class ElasticProposer(_StockProposer):  # type: ignore[misc]
    nwor: DraftRound = IDLE
    nwor_dead_rows: torch.Tensor | None = None

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
        now = self.nwor
        if not now.ids:
            return super().propose(num_speculative_tokens, *args, **kwargs)
        self.nwor_dead_rows = self._nwor_rejected(kwargs) if now.pads else None
        try:
            drafts = super().propose(num_speculative_tokens, *args, **kwargs)
        except DraftStopped:
            drafts = now.drafts()
            if now.probs:
                self._last_draft_probs = torch.stack(now.probs, dim=1).contiguous()
        finally:
            self.nwor = IDLE
            self.nwor_dead_rows = None
        return drafts

    def _nwor_rejected(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Mask of the draft prefill's rows that hold rejected tokens. Draft models mask theirs upstream."""
        rejected = inputs.get("num_rejected_tokens_gpu")
        if rejected is None or self.needs_extra_input_slots:
            return None
        batch = inputs["common_attn_metadata"]
        ends = batch.query_start_loc[1:]
        rows = torch.arange(batch.num_actual_tokens, device=ends.device)
        owner = torch.bucketize(rows, ends, right=True)
        dead: torch.Tensor = rows >= (ends - rejected)[owner]
        return dead

    def _get_slot_mapping(self, num_tokens: int, slot_mapping: torch.Tensor | None = None) -> Any:
        mapping = super()._get_slot_mapping(num_tokens, slot_mapping)
        now = self.nwor
        if not now.ids:
            return mapping
        now.forwards += 1
        if slot_mapping is not None:  # the draft prefill; later steps come without a mapping
            self._nwor_prefill_rows(now, slot_mapping)
        else:
            rows = len(now.ids)
            written = rows
            if now.pads and now.may_stop:
                dead = now.stopped()
                self._slot_mapping_buffer[:rows].masked_fill_(dead.to(self.device), PAD)
                written = rows - int(dead.sum())
            now.rows_written += written
            now.rows_avoided += rows - written
        return mapping

    def _nwor_prefill_rows(self, now: DraftRound, slot_mapping: torch.Tensor) -> None:
        rows, dead = slot_mapping.shape[0], self.nwor_dead_rows
        avoided = 0
        if dead is not None:
            self._slot_mapping_buffer[:rows].masked_fill_(dead, PAD)
            avoided = int(dead.sum())
        elif self.needs_extra_input_slots and self.is_rejected_token_mask is not None:
            avoided = int(self.is_rejected_token_mask[:rows].sum())
        now.rows_written += rows - avoided
        now.rows_avoided += avoided

    def _sample_draft_tokens(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        now = self.nwor
        if not now.ids or not (now.watches or now.may_stop):
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if now.watches:
            tokens, probs, logits = self._nwor_sample(hidden_states, sampling_metadata)
        else:
            (tokens, probs), logits = super()._sample_draft_tokens(hidden_states, sampling_metadata), None
        if not now.score(logits, tokens, probs) and len(now.tokens) < now.k:
            now.rows_avoided += (now.k - len(now.tokens)) * len(now.ids)
            raise DraftStopped
        return tokens, probs

    def _nwor_sample(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> tuple[Any, Any, torch.Tensor]:
        """What stock sampling does, with the logits kept."""
        logits = self.model.compute_logits(hidden_states)
        if self.use_heterogeneous_vocab:
            logits = self.vocab_mapping.constrain_draft_logits(logits)
        tokens, probs = self._sample_from_logits(logits, sampling_metadata)
        if self.use_heterogeneous_vocab:
            tokens = self.vocab_mapping.map_draft_to_target_ids(tokens)
        return tokens, probs, logits

    def nwor_feed(self, tokens: torch.Tensor, positions: torch.Tensor, hidden: Any, attention: Any) -> None:
        """A forward for its K/V alone: what steps without a draft left out."""
        n = len(tokens)
        if hidden is not None and self.method == "eagle3":
            hidden = self.model.combine_hidden_states(hidden)
        self.input_ids[:n] = tokens
        self._set_positions(n, positions)
        if hidden is not None:
            self.hidden_states[:n] = hidden
        _, layers = self.build_per_group_and_layer_attn_metadata(attention)
        mode, padded, across = self._determine_batch_execution_and_padding(n)
        inputs, size = self.build_model_inputs_first_pass(n, padded, None)
        with set_forward_context(
            layers,
            self.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(size, attention.slot_mapping),
        ):
            self.model(**inputs)


@functools.cache
def elastic(stock: type[Any]) -> type[Any]:
    return type(f"Elastic{stock.__name__}", (ElasticProposer, stock), {})
