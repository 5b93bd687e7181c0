"""`nwor zoo build`: tokenizer, target, then the three drafters, each stage checkpointed and skipped once complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from nwor_vllm.errors import ConfigError
from nwor_vllm.zoo.batches import frequent_ids
from nwor_vllm.zoo.eagle import Eagle1, Eagle3, Head
from nwor_vllm.zoo.export import write_checksums, write_head, write_llama
from nwor_vllm.zoo.llama import Llama, Shape
from nwor_vllm.zoo.losses import Loss, distillation_loss, language_loss, unrolled_loss
from nwor_vllm.zoo.tokenizer import save_tokenizer, train_tokenizer
from nwor_vllm.zoo.training import Stage, train

TARGET_STEPS = 700
DRAFT_VOCAB = 1024
TARGET = Shape()
HEAD = Shape(layers=1, ffn=384)
DRAFT = Shape(hidden=128, layers=2, ffn=256, heads=4, kv_heads=2)
PARTS = ("target", "eagle", "eagle3", "draft")
# Steps of each drafter for each step of the target.
SHARES = {"target": 1.0, "eagle": 0.4, "eagle3": 0.4, "draft": 0.5}


@dataclass(frozen=True)
class BuildPlan:
    """Where to build, for how long, and which parts."""

    out: Path
    steps: int = TARGET_STEPS
    threads: int = 2
    compile_loss: bool = True
    only: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise ConfigError(f"--steps must be at least 10, got {self.steps}")
        if self.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {self.threads}")


def load_llama(folder: Path, shape: Shape) -> Llama:
    model = Llama(shape)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: value.float() for name, value in load_file(file).items()}
    model.load_state_dict(tensors)
    return model


def build(plan: BuildPlan, say: Callable[[str], None] = print) -> None:
    """Complete parts are kept; a part in training resumes from its checkpoint."""
    torch.set_num_threads(plan.threads)
    work = plan.out / ".build"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer_config.json").exists():
        save_tokenizer(train_tokenizer(), work)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    for part in PARTS:
        if part not in plan.only:
            continue
        if (plan.out / part / "config.json").exists() and (work / f"{part}.done").exists():
            say(f"{part}: complete in {plan.out / part}")
            continue
        _build_part(part, plan, work, tokenizer)
        (work / f"{part}.done").touch()
    if all((work / f"{part}.done").exists() for part in PARTS):
        shutil.rmtree(work)
        write_checksums(plan.out)
        say(f"the pair is complete in {plan.out}")


def _build_part(part: str, plan: BuildPlan, work: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    stage = Stage(part, max(10, round(plan.steps * SHARES[part])))
    module, loss_of = _recipe(part, plan, tokenizer)
    train(stage, module, loss_of(module), tokenizer, work / f"{part}.pt", plan.compile_loss)
    partial = work / f"{part}.new"
    if isinstance(module, Llama):
        write_llama(partial, module, work)
    elif isinstance(module, Head):
        write_head(partial, module, work)
    final = plan.out / part
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def _recipe(part: str, plan: BuildPlan, tokenizer: Tokenizer) -> tuple[nn.Module, Callable[..., Loss]]:
    if part == "target":
        return Llama(TARGET), language_loss
    # The drafters imitate the weights as stored, rounded to bf16.
    target = load_llama(plan.out / "target", TARGET).requires_grad_(False)
    if part == "draft":
        return Llama(DRAFT), lambda module: distillation_loss(module, target)
    head: Head = Eagle1(HEAD) if part == "eagle" else Eagle3(HEAD, frequent_ids(tokenizer, DRAFT_VOCAB))
    return head, lambda module: unrolled_loss(module, target)
