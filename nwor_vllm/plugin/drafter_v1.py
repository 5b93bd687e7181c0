"""Drafting on the V1 model runner: EAGLE, EAGLE-3, MTP-style and draft models share vLLM's one proposer.

Its loop has a fixed bound, so it is left by an exception. Rows that are known dead write no K/V: rejected rows of the
draft prefill, and rows whose draft has stopped. Nothing the target will read is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.forward_context import set_forward_context

from nwor_vllm.plugin.draft_round import IDLE, DraftRound
from nwor_vllm.plugin.judge import Judge, largest

PAD = -1  # vLLM's slot that attention backends do not write
_StockProposer: Any = object  # the vLLM class that `elastic` puts behind the mixin


class DraftStopped(Exception):
    """Nobody needs another draft token: leave the loop."""


class ElasticProposer(_StockProposer):  # type: ignore[misc]
    nwor: DraftRound = IDLE
    nwor_dead_rows: Sequence[int] = ()  # rows of the draft prefill that hold rejected tokens
    nwor_host: bool  # logits, tokens and slots are host memory
    nwor_draws: bool  # drafts are drawn where the target's tokens are, not the likeliest ones

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
        now = self.nwor
        if not now.ids:
            return super().propose(num_speculative_tokens, *args, **kwargs)
        self.nwor_dead_rows = self._nwor_rejected(kwargs) if now.pads else ()
        try:
            drafts = super().propose(num_speculative_tokens, *args, **kwargs)
        except DraftStopped:
            drafts = now.drafts()
            if now.probs:
                self._last_draft_probs = torch.stack(now.probs, dim=1).contiguous()
        finally:
            self.nwor = IDLE
        return drafts

    def _nwor_rejected(self, inputs: dict[str, Any]) -> Sequence[int]:
        """Draft models mask theirs upstream."""
        rejected = inputs.get("num_rejected_tokens_gpu")
        if rejected is None or self.needs_extra_input_slots:
            return ()
        ends = inputs["common_attn_metadata"].query_start_loc_cpu[1:].tolist()
        return [row for end, n in zip(ends, rejected.tolist(), strict=True) for row in range(end - n, end)]

    def _get_slot_mapping(self, num_tokens: int, slot_mapping: torch.Tensor | None = None) -> Any:
        mapping = super()._get_slot_mapping(num_tokens, slot_mapping)
        now = self.nwor
        if not now.ids:
            return mapping
        now.forwards += 1
        if slot_mapping is not None:  # the draft prefill; later steps come without a mapping
            rows, dead = slot_mapping.shape[0], self.nwor_dead_rows
        else:
            rows = len(now.ids)
            dead = [row for row, on in enumerate(now.on) if not on] if now.pads else ()
        self._nwor_pad(dead)
        avoided = len(dead)
        if slot_mapping is not None and self.needs_extra_input_slots and self.is_rejected_token_mask is not None:
            avoided = int(self.is_rejected_token_mask[:rows].sum())
        now.rows_written += rows - avoided
        now.rows_avoided += avoided
        return mapping

    def _nwor_pad(self, rows: Sequence[int]) -> None:
        if not rows:
            return
        if self.nwor_host:
            self._slot_mapping_buffer.numpy()[rows] = PAD
        else:
            self._slot_mapping_buffer[torch.tensor(rows, device=self.device)] = PAD

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.nwor_host:
            tokens: torch.Tensor = super()._greedy_sample(hidden_states)
            return tokens
        return self._nwor_to_target(largest(self._nwor_logits(hidden_states)))

    def _sample_draft_tokens(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        now = self.nwor
        if not now.ids or not (now.watches or now.may_stop):
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if now.judge is not None:
            tokens, probs = self._nwor_sample(now.judge, hidden_states, sampling_metadata)
        else:
            tokens, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if not now.take(tokens, probs) and len(now.tokens) < now.k:
            now.rows_avoided += (now.k - len(now.tokens)) * len(now.ids)
            raise DraftStopped
        return tokens, probs

    def _nwor_sample(self, judge: Judge, hidden_states: torch.Tensor, sampling_metadata: Any) -> tuple[Any, Any]:
        """What stock sampling does, with the logits judged: at temperature 0 that finds the token too."""
        logits = self._nwor_logits(hidden_states)
        tokens, probs = judge.score(logits), None
        if self.nwor_draws and not sampling_metadata.all_greedy:
            tokens, probs = self._sample_from_logits(logits, sampling_metadata)
        return self._nwor_to_target(tokens), probs

    def _sample_from_logits(self, logits: torch.Tensor, sampling_metadata: Any) -> tuple[Any, Any]:
        tokens, probs = super()._sample_from_logits(logits, sampling_metadata)
        if probs is not None:
            make_certain(tokens, probs)
        return tokens, probs

    def _nwor_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.compute_logits(hidden_states)
        return self.vocab_mapping.constrain_draft_logits(logits) if self.use_heterogeneous_vocab else logits

    def _nwor_to_target(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vocab_mapping.map_draft_to_target_ids(tokens) if self.use_heterogeneous_vocab else tokens

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


def make_certain(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Rows that are no distribution (their logits had a NaN) propose their token for certain: it is verified as exactly
    as any other, where NaN would end up in what the target samples from."""
    broken = probs[:, :1].isnan()
    probs.masked_fill_(broken, 0.0).scatter_add_(1, tokens[:, None].long(), broken.to(probs.dtype))


@functools.cache
def elastic(stock: type[Any]) -> type[Any]:
    return type(f"Elastic{stock.__name__}", (ElasticProposer, stock), {})
