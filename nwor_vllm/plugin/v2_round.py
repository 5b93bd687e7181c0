"""One drafting on the V2 runner: confidences, who goes on, how long each draft became.

The device part is static buffers, because CUDA graphs that contain `score` read and write them at every replay. Host
fields are valid from `begin` to the next `begin`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nwor_vllm.kernels import StopState, Workspace, confidence_and_stop
from nwor_vllm.plugin.messages import NO_ORDERS, DraftReport, Orders


class DraftRound:
    def __init__(self, max_requests: int, max_k: int, device: torch.device) -> None:
        self.state = StopState.create(max_requests, max_k, device)
        self.workspace = Workspace(max_requests, device)  # its own: captured graphs keep the address
        self.rejected = torch.zeros(max_requests, dtype=torch.float32, device=device)
        self.sampled = torch.zeros(max_requests, dtype=torch.float32, device=device)
        self.orders = NO_ORDERS
        self.live = False  # inside `propose`: the host may look at device values, graph capture must not
        self.ids: list[str] = []
        self.k = self.forwards = 0

    def begin(
        self, ids: Sequence[str], k: int, orders: Orders, num_sampled: torch.Tensor, num_rejected: torch.Tensor
    ) -> None:
        self.ids, self.k, self.forwards = list(ids), k, 0
        n, state = len(self.ids), self.state
        if orders.stop != self.orders.stop:
            state.set_rule(orders.stop)
        self.orders = orders
        state.caps.zero_()  # rows that only pad a graph draft nothing
        self._fill(state.caps, [min(orders.caps.get(i, k), k) for i in self.ids], k)
        self._fill(state.bias, [orders.bias.get(i, 0.0) for i in self.ids], 0.0)
        self.rejected[:n].copy_(num_rejected[:n])
        # A prompt that is not finished samples nothing, and its draft is thrown away.
        self.sampled[:n].copy_(num_sampled[:n] > 0)
        state.caps[:n].mul_(num_sampled[:n] > 0)
        state.reset()
        self.live = True

    @staticmethod
    def _fill(buffer: torch.Tensor, values: Sequence[float], usual: float) -> None:
        rows = buffer[: len(values)]
        if all(v == usual for v in values):
            rows.fill_(usual)
        else:
            rows.copy_(torch.tensor(values, dtype=buffer.dtype), non_blocking=True)

    def score(self, logits: torch.Tensor, step: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        """Judge draft position `step` (a device scalar) of every row; who drafts on. Graph-safe: nothing waits."""
        confidence_and_stop(logits, self.state, step, temperature=temperature, workspace=self.workspace)
        alive: torch.Tensor = self.state.alive[: logits.shape[0]]
        return alive

    def exhausted(self) -> bool:
        """Whether nobody drafts on. Waits for the device."""
        return not bool(self.state.alive[: len(self.ids)].any())

    def report(self, *, forwards: int, prefill_rows: int, pads: bool) -> DraftReport:
        """The round as it went. Waits for the device, once."""
        n, k = len(self.ids), self.k
        columns = (self.state.lengths[:n, None], self.sampled[:n, None], self.rejected[:n, None])
        table = torch.cat((*columns, self.state.confidence[:n]), dim=1).tolist()
        lengths: dict[str, int] = {}
        confidence: dict[str, tuple[float, ...]] = {}
        written, due = prefill_rows, prefill_rows + n * max(k - 1, 0)
        for request_id, (kept, sampled, rejected, *scores) in zip(self.ids, table, strict=True):
            if sampled:
                lengths[request_id] = int(kept)
                cap = min(self.orders.caps.get(request_id, k), k)
                confidence[request_id] = tuple(scores[: min(int(kept) + 1, cap, forwards)])
            # Step j writes the row of draft token j - 1: a request that kept L tokens needs min(L, steps) of them.
            written += min(int(kept), forwards - 1) - int(rejected) if pads else forwards - 1
        return DraftReport(k, forwards, lengths, confidence, rows_written=written, rows_avoided=due - written)
