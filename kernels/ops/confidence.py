"""Token, max probability, log-odds, margin and entropy of every row in one read of the logits; whole or in shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import nwor_vllm.kernels.reference.confidence as twin
from nwor_vllm.kernels.dispatch import (
    Backend,
    Workspace,
    check_buffer,
    check_device,
    check_dtype,
    check_logits,
    check_shape,
    choose,
    refuse,
)
from nwor_vllm.kernels.reference.confidence import LOG_ODDS_MAX, Confidence

__all__ = ["LOG_ODDS_MAX", "Confidence", "confidence", "confidence_combine", "confidence_partial"]
MAX_TOKEN = 1 << 24  # partials carry token ids as fp32


def confidence(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    margin: bool = False,
    entropy: bool = False,
    out: Confidence | None = None,
    workspace: Workspace | None = None,
    backend: Backend | None = None,
) -> Confidence:
    """Statistics of softmax(logits / temperature) over the entries where `mask` is True.

    logits [rows, vocab], bf16, fp16 or fp32, any strides; temperature a number or [rows], 0 counts as 1; mask bool
    [vocab] or [rows, vocab]; `out` a Confidence of static buffers to fill. Nothing of size vocab is written.
    """
    temperature, mask = check_inputs(logits, temperature, mask)
    out = outputs(logits, margin, entropy, out)
    if logits.shape[0] == 0:
        return out
    if choose(logits, backend) == "triton":
        from nwor_vllm.kernels.fused.confidence import launch

        launch(logits, temperature, mask, out, workspace)
        return out
    return fill(out, twin.confidence(logits, temperature, mask, margin, entropy))


def confidence_partial(
    logits: torch.Tensor,
    vocab_start: int = 0,
    *,
    temperature: float | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """[rows, 5] fp32 of one vocabulary shard that starts at token `vocab_start`: all that ranks need to exchange."""
    temperature, mask = check_inputs(logits, temperature, mask)
    if not 0 <= vocab_start <= MAX_TOKEN - logits.shape[1]:
        refuse("vocab_start", vocab_start, f"0..{MAX_TOKEN} less the shard's {logits.shape[1]} entries")
    if logits.shape[0] == 0:
        return torch.empty(0, 5, dtype=torch.float32, device=logits.device)
    if choose(logits, backend) == "triton":
        from nwor_vllm.kernels.fused.confidence import launch_partial

        return launch_partial(logits, vocab_start, temperature, mask, workspace)
    return twin.confidence_partial(logits, vocab_start, temperature, mask)


def confidence_combine(
    partials: torch.Tensor | Sequence[torch.Tensor],
    *,
    temperature: float | torch.Tensor | None = None,
    margin: bool = False,
    entropy: bool = False,
    out: Confidence | None = None,
    backend: Backend | None = None,
) -> Confidence:
    """`confidence` of the whole vocabulary from [shards, rows, 5]; `temperature` as it was given to the partials."""
    parts = partials if isinstance(partials, torch.Tensor) else torch.stack(tuple(partials))
    check_dtype("partials", parts, (torch.float32,))
    if parts.dim() != 3 or parts.shape[0] == 0 or parts.shape[2] != 5:
        refuse("partials", f"shape {tuple(parts.shape)}", "shape (shards, rows, 5) with 1 shard or more")
    temperature = check_temperature(temperature, parts[0])
    out = outputs(parts[0], margin, entropy, out)
    if parts.shape[1] == 0:
        return out
    if choose(parts, backend) == "triton":
        from nwor_vllm.kernels.fused.confidence import launch_combine

        launch_combine(parts, temperature, out)
        return out
    return fill(out, twin.confidence_combine(parts, temperature, margin, entropy))


def check_temperature(temperature: float | torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | None:
    if temperature is None or (isinstance(temperature, int | float) and temperature in (0, 1)):
        return None
    if isinstance(temperature, int | float):
        if not 0 < temperature < float("inf"):
            refuse("temperature", temperature, "a finite number from 0 up")
        return torch.full((logits.shape[0],), float(temperature), dtype=torch.float32, device=logits.device)
    check_buffer("temperature", temperature, torch.float32, (logits.shape[0],), logits)
    return temperature


def check_inputs(
    logits: torch.Tensor, temperature: float | torch.Tensor | None, mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    rows, vocab = check_logits("logits", logits)
    if mask is not None:
        check_dtype("mask", mask, (torch.bool,))
        check_shape("mask", mask, (vocab,) if mask.dim() == 1 else (rows, vocab))
        check_device("mask", mask, logits.device)
        mask = mask.expand(rows, vocab)
    return check_temperature(temperature, logits), mask


def outputs(like: torch.Tensor, margin: bool, entropy: bool, out: Confidence | None) -> Confidence:
    rows = like.shape[0]
    if out is None:
        prob, odds, gap, nats = (torch.empty(rows, dtype=torch.float32, device=like.device) for _ in range(4))
        token = torch.empty(rows, dtype=torch.int64, device=like.device)
        return Confidence(token, prob, odds, gap if margin else None, nats if entropy else None)
    for name, wanted in (
        ("token", True),
        ("max_prob", True),
        ("log_odds", True),
        ("margin", margin),
        ("entropy", entropy),
    ):
        buffer = getattr(out, name)
        if (buffer is not None) != wanted:
            refuse(
                f"out.{name}",
                "None" if buffer is None else "a buffer",
                "a buffer exactly where the statistic is asked for",
            )
        if wanted:
            check_buffer(f"out.{name}", buffer, torch.int64 if name == "token" else torch.float32, (rows,), like)
    return out


def fill(out: Confidence, result: Confidence) -> Confidence:
    for name in ("token", "max_prob", "log_odds", "margin", "entropy"):
        buffer = getattr(out, name)
        if buffer is not None:
            buffer.copy_(getattr(result, name))
    return out
