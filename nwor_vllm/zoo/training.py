"""One training loop for every part: matrices by Muon, the rest by AdamW, resumable from its checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from nwor_vllm.zoo.batches import batch
from nwor_vllm.zoo.losses import Loss

CHECKPOINT_S = 15.0
WARMUP, COOLDOWN = 0.03, 0.4


@dataclass(frozen=True)
class Stage:
    """A part of the pair and how long it trains."""

    name: str
    steps: int
    matrix_lr: float = 0.02
    other_lr: float = 0.003


def rate(step: int, steps: int) -> float:
    """Linear warm-up, flat, linear cool-down to zero."""
    done = (step + 0.5) / steps
    return min(1.0, done / WARMUP, (1.0 - done) / COOLDOWN)


def optimisers(module: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        # Embeddings and language-model heads are look-up tables: orthogonalised updates do not suit them.
        table = "embed" in name or "lm_head" in name
        (matrices if parameter.dim() == 2 and not table else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=stage.matrix_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=stage.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _save(path: Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(
    stage: Stage,
    module: nn.Module,
    loss: Loss,
    tokenizer: Tokenizer,
    checkpoint: Path,
    compile_loss: bool = True,
    report: Callable[[int, float], None] | None = None,
    save_every_s: float = CHECKPOINT_S,
) -> None:
    """Trains `module` in place. Data depends on the step alone, so a resumed run sees what it would have seen."""
    found = optimisers(module, stage)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] == stage.steps:
            module.load_state_dict(state["module"])
            for optimiser, saved in zip(found, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            first = state["step"]
    run = torch.compile(loss, dynamic=False) if compile_loss else loss
    saved_at = time.monotonic()
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, mininterval=2.0)
    for step in bar:
        torch.manual_seed(step)
        ids, weights = batch(tokenizer, stage.name, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = run(ids, weights)
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser, peak in zip(found, (stage.matrix_lr, stage.other_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * rate(step, stage.steps)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
            if report is not None:
                report(step, value.item())
        if time.monotonic() - saved_at >= save_every_s or step + 1 == stage.steps:
            states = [optimiser.state_dict() for optimiser in found]
            _save(
                checkpoint,
                {"step": step + 1, "steps": stage.steps, "module": module.state_dict(), "optimisers": states},
            )
            saved_at = time.monotonic()
