"""The static buffers of early exit. CUDA graphs keep their addresses, so everything here is updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nwor_vllm.kernels.dispatch import check_buffer, check_dtype, refuse

RULE_FIELDS = 4  # threshold, min survival, verify cost, draft cost; then POSITION_FIELDS of each position:
POSITION_FIELDS = 3  # intercept, slope, hazard of the position after it (NaN: what this position predicts)


class Rule(Protocol):
    """What a stop rule has to say; `nwor_vllm.policy.base.StopRule` does."""

    @property
    def threshold(self) -> float: ...
    @property
    def min_survival(self) -> float: ...
    @property
    def verify_cost(self) -> float: ...
    @property
    def draft_cost(self) -> float: ...
    @property
    def calibration(self) -> Sequence[tuple[float, float]]: ...
    @property
    def hazard(self) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class StopState:
    """One draft round of up to `rows` requests and `positions` draft tokens each."""

    confidence: torch.Tensor  # [rows, positions] fp32 max probability; NaN where not observed
    survival: torch.Tensor  # [rows] fp32, running product of the calibrated acceptance
    product: torch.Tensor  # [rows] fp32, running product of the confidence itself
    bias: torch.Tensor  # [rows] fp32, added to the log-odds of the calibrated acceptance
    alive: torch.Tensor  # [rows] bool, drafts on
    lengths: torch.Tensor  # [rows] int32, draft tokens kept
    caps: torch.Tensor  # [rows] int32, draft tokens allowed
    stops: torch.Tensor  # [positions] int64, requests the rule ended at each position; reset does not clear it
    rule: torch.Tensor  # [RULE_FIELDS + POSITION_FIELDS * positions] fp32, on the device: captured graphs follow it
    steps: torch.Tensor  # [positions] int64, 0..positions-1

    @classmethod
    def create(cls, rows: int, positions: int, device: torch.device | str = "cpu") -> StopState:
        if rows < 0:
            refuse("rows", rows, "0 or more")
        if positions < 1:
            refuse("positions", positions, "1 or more")
        state = cls(
            torch.full((rows, positions), torch.nan, dtype=torch.float32, device=device),
            torch.ones(rows, dtype=torch.float32, device=device),
            torch.ones(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.float32, device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.full((rows,), positions, dtype=torch.int32, device=device),
            torch.zeros(positions, dtype=torch.int64, device=device),
            torch.zeros(RULE_FIELDS + POSITION_FIELDS * positions, dtype=torch.float32, device=device),
            torch.arange(positions, device=device),
        )
        state.set_rule(None)
        return state

    def reset(self) -> None:
        """A new round: everybody drafts, up to the caps; caps and bias stay. Graph-safe."""
        self.confidence.fill_(torch.nan)
        self.survival.fill_(1.0)
        self.product.fill_(1.0)
        self.lengths.zero_()
        torch.gt(self.caps, 0, out=self.alive)

    def set_rule(self, rule: Rule | None) -> None:
        """Takes effect at the next launch or replay. None never stops anybody before the caps."""
        positions = self.stops.shape[0]
        head = (rule.threshold, rule.min_survival, rule.verify_cost, rule.draft_cost) if rule else (0.0,) * RULE_FIELDS
        table = tuple(rule.calibration if rule else ()) or ((0.0, 1.0),)
        hazard = tuple(rule.hazard if rule else ()) or (float("nan"),)
        values = list(head)
        for j in range(positions):
            values += (*table[min(j, len(table) - 1)], hazard[min(j + 1, len(hazard) - 1)])
        self.rule.copy_(torch.tensor(values, dtype=torch.float32))

    def step(self, position: int | torch.Tensor) -> torch.Tensor:
        """The position as a device scalar, without a transfer."""
        positions = self.stops.shape[0]
        if isinstance(position, int):
            if not 0 <= position < positions:
                refuse("position", position, f"0..{positions - 1}")
            return self.steps[position : position + 1]
        check_dtype("position", position, (torch.int32, torch.int64))
        if position.numel() != 1:
            refuse("position", f"{position.numel()} elements", "one element")
        return position.view(1)

    def check(self, like: torch.Tensor) -> None:
        rows, positions = self.confidence.shape
        wanted = {
            "confidence": (torch.float32, (rows, positions)),
            "survival": (torch.float32, (rows,)),
            "product": (torch.float32, (rows,)),
            "bias": (torch.float32, (rows,)),
            "alive": (torch.bool, (rows,)),
            "lengths": (torch.int32, (rows,)),
            "caps": (torch.int32, (rows,)),
            "stops": (torch.int64, (positions,)),
            "rule": (torch.float32, (RULE_FIELDS + POSITION_FIELDS * positions,)),
        }
        for name, (dtype, shape) in wanted.items():
            check_buffer(f"state.{name}", getattr(self, name), dtype, shape, like)
        if like.shape[0] > rows:
            refuse("rows", like.shape[0], f"at most the state's {rows}")
