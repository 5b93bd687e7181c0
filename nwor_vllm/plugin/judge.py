"""Who reads the draft logits of a round and applies the stop rule: where the logits are host memory, and on a device.

On a CPU every small tensor operation costs as much as a few hundred additions, so there one softmax reads the logits
and plain Python judges. On a device nothing waits: the kernels judge in static buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nwor_vllm import kernels
from nwor_vllm.policy import StopRule
from nwor_vllm.policy.stopping import Stopping


class Judge(Protocol):
    """One round of `k` draft positions; `limits`, `bias` and results have one entry per row of the batch."""

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """Judge the next position; the likeliest token of each row."""
        ...

    def alive(self) -> Sequence[bool]:
        """Who wants another draft token. Waits for the device."""
        ...

    def lengths(self) -> Sequence[int]: ...

    def confidence(self) -> Sequence[Sequence[float]]:
        """Of the positions that each row drafted."""
        ...


def largest(logits: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(dim=-1)` of host memory, many times as fast as torch's own for bf16."""
    return torch.from_numpy(logits.float().numpy().argmax(axis=1))


class Scratch:
    """Room for the distributions of one position in fp32, kept: memory that is new costs more than the arithmetic."""

    def __init__(self) -> None:
        self.room = self.view = torch.empty(0, 0)
        self.array = self.view.numpy()

    def fill(self, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The same memory as tensor and as array."""
        if logits.shape != self.view.shape:
            rows, vocab = logits.shape
            if self.room.shape[0] < rows or self.room.shape[1] != vocab:
                self.room = torch.empty(rows, vocab)
            self.view = self.room[:rows]
            self.array = self.view.numpy()
        return self.view.copy_(logits), self.array


class HostJudge:
    def __init__(
        self,
        scratch: Scratch,
        rule: StopRule,
        k: int,
        limits: Sequence[int],
        bias: Sequence[float],
        whole: Sequence[int],
    ) -> None:
        self.scratch = scratch
        self.rows = Stopping(rule, k, limits, bias, whole)
        self.every = np.arange(len(limits))

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        # What kernels.reference.confidence says, to fp32's last digits; NaN in a row without a distribution.
        room, p = self.scratch.fill(logits)
        tokens = p.argmax(axis=1)
        torch.softmax(room, dim=1, out=room)
        confidence, going = p[self.every, tokens].tolist(), self.rows.going
        self.rows.take(confidence if len(going) == len(tokens) else [confidence[r] for r in going])
        return torch.from_numpy(tokens)

    def alive(self) -> Sequence[bool]:
        on = [False] * len(self.every)
        for r in self.rows.going:
            on[r] = True
        return on

    def lengths(self) -> Sequence[int]:
        return self.rows.kept

    def confidence(self) -> Sequence[Sequence[float]]:
        return self.rows.seen


class DeviceJudge:
    def __init__(
        self,
        state: kernels.StopState,
        rule: StopRule,
        k: int,
        limits: Sequence[int],
        bias: Sequence[float],
        whole: Sequence[int],
    ) -> None:
        self.state, self.k, self.rows, self.position = state, k, len(limits), 0
        self.whole = torch.tensor(whole) if whole else None
        state.caps[: self.rows] = torch.tensor(limits, dtype=torch.int32)
        state.bias[: self.rows] = torch.tensor(bias)
        state.set_rule(rule)
        state.reset()

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        token: torch.Tensor = kernels.confidence_and_stop(logits, self.state, self.position).token
        self.position += 1
        if self.whole is not None:
            self.state.alive[self.whole] = self.position < self.k
            self.state.lengths[self.whole] = self.position
        return token

    def alive(self) -> Sequence[bool]:
        going: list[bool] = self.state.alive[: self.rows].tolist()
        return going

    def lengths(self) -> Sequence[int]:
        kept: list[int] = self.state.lengths[: self.rows].tolist()
        return kept

    def confidence(self) -> Sequence[Sequence[float]]:
        table = self.state.confidence[: self.rows].tolist()
        return [[c for c in row if not math.isnan(c)] for row in table]
