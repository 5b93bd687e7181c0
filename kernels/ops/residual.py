"""norm(max(0, p - q)) and a draw from it, over a chain of rounds or siblings."""

from __future__ import annotations

import torch

import nwor_vllm.kernels.reference.residual as twin
from nwor_vllm.kernels.dispatch import (
    FLOATS,
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
from nwor_vllm.kernels.reference.residual import Residual

__all__ = ["Residual", "residual_sample"]


def residual_sample(
    target: torch.Tensor,
    draft: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    rounds: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    drafting: bool = False,
    workspace: Workspace | None = None,
    backend: Backend | None = None,
) -> Residual:
    """Draw what is left of target [rows, vocab] after the rejected drafts [rows, vocab] or [rows, rounds, vocab].

    Both hold probabilities. `rounds` int32 [rows] says how many drafts a row has (all where absent; 0 draws from the
    target). With candidates int64 and uniforms fp32 [rows, rounds], each round's acceptance is tested too: the first
    that passes is the token. seeds and positions int64 [rows] as in `sample_with_confidence`. Candidates must be tokens
    of the vocabulary. No residual is stored: a round recomputes it from p, the q's and one mass per round.
    """
    rows, vocab = check_logits("target", target)
    check_dtype("draft", draft, FLOATS)
    draft = draft[:, None] if draft.dim() == 2 else draft
    if draft.dim() != 3 or draft.shape[1] == 0:
        refuse("draft", f"shape {tuple(draft.shape)}", f"shape ({rows}, {vocab}) or ({rows}, rounds, {vocab})")
    check_shape("draft", draft, (rows, draft.shape[1], vocab))
    check_device("draft", draft, target.device)
    for name, tensor in (("target", target), ("draft", draft)):
        if tensor.stride(-1) != 1 and vocab > 1:
            refuse(name, f"strides {tensor.stride()}", "a dense vocabulary dimension (stride 1)")
    check_buffer("seeds", seeds, torch.int64, (rows,), target)
    check_buffer("positions", positions, torch.int64, (rows,), target)
    if rounds is not None:
        check_buffer("rounds", rounds, torch.int32, (rows,), target)
    if (candidates is None) != (uniforms is None):
        refuse("uniforms", "only one of candidates and uniforms", "both or neither")
    if candidates is not None and uniforms is not None:
        check_buffer("candidates", candidates, torch.int64, draft.shape[:2], target)
        check_buffer("uniforms", uniforms, torch.float32, draft.shape[:2], target)
    if rows and choose(target, backend) == "triton":
        from nwor_vllm.kernels.fused.residual import launch

        return launch(target, draft, seeds, positions, rounds, candidates, uniforms, drafting, workspace)
    return twin.residual_sample(target, draft, seeds, positions, rounds, candidates, uniforms, drafting)
