"""Early exit after a draft position: survival, who drafts on, what is kept; alone, or in confidence's own launch."""

from __future__ import annotations

import torch

import nwor_vllm.kernels.reference.confidence as confidence_twin
import nwor_vllm.kernels.reference.stop as twin
from nwor_vllm.kernels.dispatch import Backend, Workspace, check_buffer, choose
from nwor_vllm.kernels.ops.confidence import check_inputs, fill, outputs
from nwor_vllm.kernels.reference.confidence import Confidence
from nwor_vllm.kernels.state import StopState

__all__ = ["confidence_and_stop", "stop"]


def stop(
    conf: Confidence,
    state: StopState,
    position: int | torch.Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Judge draft `position` (a number, or a device scalar) of the first rows of `state`, in place.

    Afterwards `alive` says who drafts on, `lengths` how many tokens each keeps, `stops` whom the rule ended. Nothing
    waits for the device, and the rule is read there. A device scalar outside the positions changes nothing.
    """
    rows = conf.max_prob.shape[0]
    check_buffer("conf.max_prob", conf.max_prob, torch.float32, (rows,), conf.max_prob)
    check_buffer("conf.log_odds", conf.log_odds, torch.float32, (rows,), conf.max_prob)
    state.check(conf.max_prob)
    step = state.step(position)
    if rows == 0:
        return
    if choose(conf.max_prob, backend) == "triton":
        from nwor_vllm.kernels.fused.stop import launch

        launch(conf, state, step)
        return
    twin.stop(conf, state, step)


def confidence_and_stop(
    logits: torch.Tensor,
    state: StopState,
    position: int | torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    margin: bool = False,
    entropy: bool = False,
    out: Confidence | None = None,
    workspace: Workspace | None = None,
    backend: Backend | None = None,
) -> Confidence:
    """`confidence`, then `stop`, in one launch."""
    temperature, mask = check_inputs(logits, temperature, mask)
    state.check(logits)
    step = state.step(position)
    out = outputs(logits, margin, entropy, out)
    if logits.shape[0] == 0:
        return out
    if choose(logits, backend) == "triton":
        from nwor_vllm.kernels.fused.confidence import launch

        launch(logits, temperature, mask, out, workspace, state, step)
        return out
    fill(out, confidence_twin.confidence(logits, temperature, mask, margin, entropy))
    twin.stop(out, state, step)
    return out
