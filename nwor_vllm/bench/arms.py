"""Arms: what is switched between batches of one engine, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import ArmLabel
from nwor_vllm.policy import default_ladder


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy setting of the plugin. `repeat` is the subject once more: the A/A arm that must show no difference.

    `vanilla` is the subject's engine drafting nothing; `vanilla_engine` an engine of its own that has no drafter.
    """

    mode: str
    policy: str
    draft_length: int
    threshold: float

    @property
    def bare(self) -> bool:
        return self.mode == "vanilla_engine"

    def setting(self) -> dict[str, Any]:
        """For the plugin's live control."""
        params = {"k": self.draft_length} if self.policy == "fixed" else {}
        return {
            "policy": self.policy,
            "policy_params": params,
            "early_exit": {"threshold": self.threshold, "policy_rule": self.policy != "fixed"},
        }

    def label(self, role: Any) -> ArmLabel:
        mode: Any = self.mode
        return ArmLabel(mode, role, self.policy, self.draft_length, self.threshold)

    def name(self, cell: Cell) -> str:
        """What comparisons call it: the mode, and what tells it from others of that mode."""
        other_length = self.mode == "fixed" and self.draft_length != cell.draft_length
        text = f"fixed_k{self.draft_length}" if other_length else self.mode
        return f"{text}@{self.threshold}" if self.threshold else text


def subject(cell: Cell) -> Arm:
    """The arm a cell is about: vanilla, fixed, adaptive, early_exit or both."""
    policy = cell.policy if cell.adaptive else "fixed"
    if cell.arm == "vanilla":
        policy = "off"
    return Arm(cell.arm, policy, cell.draft_length, cell.threshold)


def fixed_lengths(engine: Engine) -> list[int]:
    """Every fixed draft length that the engine is built for."""
    return [k for k in engine.ladder or default_ladder(engine.draft_length) if k > 0]


def references(cell: Cell) -> list[Arm]:
    """What stands beside it: no speculation, fixed draft lengths, and for headline runs the A/A arm."""
    arms: list[Arm] = []
    for name in cell.references:
        if name == "vanilla" and cell.arm != "vanilla":
            arms.append(Arm("vanilla", "off", 0, 0.0))
        elif name == "vanilla_engine" and cell.arm != "vanilla":
            arms.append(Arm("vanilla_engine", "off", 0, 0.0))
        elif name == "fixed" and cell.arm not in ("fixed", "vanilla"):
            arms.append(Arm("fixed", "fixed", cell.draft_length, 0.0))
        elif name == "best_fixed" and cell.arm != "vanilla":
            arms += [Arm("fixed", "fixed", k, 0.0) for k in fixed_lengths(cell.engine)]
        elif name == "repeat":
            own = subject(cell)
            arms.append(Arm("repeat", own.policy, own.draft_length, own.threshold))
    return arms


def of_panel(cells: Sequence[Cell]) -> list[Arm]:
    """Every arm that these cells need, each once; subjects first."""
    return list(dict.fromkeys([*map(subject, cells), *(arm for cell in cells for arm in references(cell))]))


def order(arms: Sequence[Arm], batch: int) -> list[Arm]:
    """A B, then B A: over two batches every arm stands at the same average position, so drift cancels."""
    return list(arms) if batch % 2 == 0 else list(reversed(arms))


def beside(cell: Cell, measured: Sequence[Arm]) -> list[Arm]:
    """The arms of a panel as a cell's record lists them: its subject, its references, then the other subjects."""
    others = [arm for arm in measured if arm.mode != "repeat"]
    return list(dict.fromkeys([subject(cell), *references(cell), *others]))
