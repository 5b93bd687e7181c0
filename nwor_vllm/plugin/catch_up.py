"""A free K = 0: steps that draft nothing run no draft forward, and the drafter's K/V catches up in one go.

What the drafter would have been fed is kept: one row per request and step, and of prompts all rows, as long as they
fit. It is replayed before the next forward of the drafter, and at the latest when it would no longer fit into one.
Where prefixes are cached it is also replayed when a cache block's worth of steps has gathered, so that blocks which
other requests find there hold the drafter's K/V too, but for the last rows of a request that ended meanwhile; prompts,
which others share, are then fed at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class _Skipped:
    """One step without a draft forward: row numbers by request, and what the drafter missed."""

    rows: dict[str, range]  # one and the same for successive steps of a batch
    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor | None


class CatchUp:
    def __init__(self, proposer: Any) -> None:
        self.proposer = proposer
        self.shared = bool(proposer.vllm_config.cache_config.enable_prefix_caching)
        self.steps: list[_Skipped] = []
        self.kept = 0  # rows, also of requests that are gone while others of their step are not

    def skip(
        self,
        ids: Sequence[str],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        hidden: Any,
        ends: Sequence[int] | None = None,
    ) -> None:
        """Keep a step's rows, up to `ends` for each request; one for each without that. The tensors are kept
        themselves: nothing may write into them any more."""
        if ends is not None:
            rows = {i: range(start, end) for i, start, end in zip(ids, [0, *ends], ends, strict=False)}
        else:
            rows = self.steps[-1].rows if self.steps and len(self.steps[-1].tokens) == len(ids) else {}
            if list(rows) != ids:  # nor if a request of them was forgotten: the others kept their row numbers
                rows = {i: range(r, r + 1) for r, i in enumerate(ids)}
        self.steps.append(_Skipped(rows, tokens, positions, hidden))
        self.kept += len(tokens)

    def takes(self, rows: int) -> bool:
        """There is room for a step with prompts, and nobody else may want them."""
        return not self.shared and bool(self.kept + rows <= self.proposer.max_num_tokens)

    def forget(self, ids: Iterable[str]) -> None:
        """These requests are gone, or will be prefilled anew."""
        if self.steps:
            for request_id in ids:
                for step in self.steps:
                    step.rows.pop(request_id, None)
            self.steps = [step for step in self.steps if step.rows]
            self.kept = sum([len(step.tokens) for step in self.steps])

    @property
    def due(self) -> bool:
        """As many rows have gathered as one forward can take, or a block's worth of steps that others may want."""
        if self.shared and len(self.steps) >= self.proposer.block_size:
            return True
        return bool(self.kept + self.proposer.max_batch_size > self.proposer.max_num_tokens)

    def replay(self, ids: Sequence[str], batch: Any) -> int:
        """Feed the drafter what requests of this batch missed; returns the rows. `batch`: their attention metadata."""
        steps = list(zip(self.steps, [0, *itertools.accumulate(len(step.tokens) for step in self.steps)], strict=False))
        missed = {  # request -> its rows among all that are kept
            request: rows
            for request, i in enumerate(ids)
            if (rows := [before + row for step, before in steps for row in step.rows.get(i, ())])
        }
        if not missed:
            return 0
        tokens = torch.cat([step.tokens.flatten() for step in self.steps])
        pick = torch.tensor(list(itertools.chain.from_iterable(missed.values())), device=tokens.device)
        positions = torch.cat([step.positions for step in self.steps])[pick]
        hidden = [step.hidden for step in self.steps if step.hidden is not None]
        attention = self._attention({r: len(rows) for r, rows in missed.items()}, positions, batch)
        self.proposer.nwor_feed(tokens[pick], positions, torch.cat(hidden)[pick] if hidden else None, attention)
        self.forget(ids)
        return len(pick)

    def _attention(self, missed: Mapping[int, int], positions: torch.Tensor, batch: Any) -> Any:
        """One query per request over as many rows as it missed; their blocks are still in the request's table."""
        requests, counts = list(missed), torch.tensor(list(missed.values()))
        ends = counts.cumsum(0)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32)
        device, size = positions.device, self.proposer.block_size
        index = torch.tensor(requests, device=device)
        table = batch.block_table_tensor[index]
        owners = torch.arange(len(requests)).repeat_interleave(counts).to(device)
        blocks = table[owners, positions // size].to(torch.int64)
        bound = batch.seq_lens_cpu_upper_bound
        return type(batch)(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=(positions[(ends - 1).to(device)] + 1).to(batch.seq_lens.dtype),
            seq_lens_cpu_upper_bound=None if bound is None else bound[requests],
            num_reqs=len(requests),
            num_actual_tokens=len(owners),
            max_query_len=int(counts.max()),
            max_seq_len=batch.max_seq_len,
            block_table_tensor=table,
            slot_mapping=blocks * size + positions % size,
            causal=True,
        )


def shifted(tokens: torch.Tensor, following: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What a drafter reads beside the target's hidden states: the token after each row's own; `following` it is where
    a request's rows end."""
    after = tokens.roll(-1)
    after[ends.long() - 1] = following.flatten().to(tokens.dtype)
    return after


def usable(runner: Any) -> bool:
    """Plain text, one position per token, no other rank or connector that waits for the drafter's forward."""
    proposer, config = runner.drafter, runner.vllm_config
    odd = proposer.uses_mrope or proposer.supports_mm_inputs or proposer.use_heterogeneous_vocab
    odd = odd or proposer.constant_draft_positions or proposer.parallel_drafting
    odd = odd or config.speculative_config.disable_padded_drafter_batch
    alone = config.parallel_config.data_parallel_size == 1 and config.parallel_config.pipeline_parallel_size == 1
    return alone and not odd and config.kv_transfer_config is None and not config.model_config.is_hybrid
