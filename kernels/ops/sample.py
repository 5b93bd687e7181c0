"""Draft sampling and the confidence of the distribution it drew from, in one read of the logits."""

from __future__ import annotations

import torch

import nwor_vllm.kernels.reference.confidence as confidence_twin
import nwor_vllm.kernels.reference.sample as twin
from nwor_vllm.kernels.dispatch import Backend, Workspace, check_buffer, choose
from nwor_vllm.kernels.ops.confidence import check_inputs, fill, outputs
from nwor_vllm.kernels.reference.confidence import Confidence

__all__ = ["sample_with_confidence"]


def sample_with_confidence(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    drafting: bool = True,
    margin: bool = False,
    entropy: bool = False,
    out: Confidence | None = None,
    workspace: Workspace | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, Confidence]:
    """(sampled token [rows] int64, Confidence of softmax(logits / temperature)), whose own token is the argmax.

    seeds and positions [rows] int64 place the draw as vLLM's V2 runner places it; `drafting` uses its draft stream.
    temperature [rows] fp32, 0 is greedy.
    """
    check_inputs(logits, temperature, mask)
    rows, vocab = logits.shape
    mask = None if mask is None else mask.expand(rows, vocab)
    check_buffer("seeds", seeds, torch.int64, (rows,), logits)
    check_buffer("positions", positions, torch.int64, (rows,), logits)
    check_buffer("temperature", temperature, torch.float32, (rows,), logits)
    out = outputs(logits, margin, entropy, out)
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return sampled, out
    if choose(logits, backend) == "triton":
        from nwor_vllm.kernels.fused.sample import launch

        launch(logits, seeds, positions, temperature, mask, drafting, sampled, out, workspace)
        return sampled, out
    fill(out, confidence_twin.confidence(logits, temperature, mask, margin, entropy))
    return sampled.copy_(twin.sample(logits, seeds, positions, temperature, mask, drafting)), out
