"""What each part of the pair is trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nwor_vllm.zoo.eagle import AUX_LAYERS, Eagle1, Eagle3, Head
from nwor_vllm.zoo.llama import Llama

Loss = Callable[[Tensor, Tensor], Tensor]
UNROLL = 6
STEP_DECAY = 0.8
FEATURE_NOISE = 0.2
FEATURE_WEIGHT = 1.0


def _weighted(per_token: Tensor, weights: Tensor) -> Tensor:
    return (per_token * weights).sum() / weights.sum()


def language_loss(model: Llama) -> Loss:
    def loss(ids: Tensor, weights: Tensor) -> Tensor:
        logits = model(ids[:, :-1]).float()
        per_token = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return _weighted(per_token, weights[:, 1:].flatten())

    return loss


def distillation_loss(student: Llama, target: Llama) -> Loss:
    """The draft model learns the target's whole distribution, not the data's single token."""

    def loss(ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = target(ids[:, :-1]).float().softmax(-1)
        return _weighted(_soft_cross_entropy(student(ids[:, :-1]), wanted), weights[:, 1:])

    return loss


def _soft_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return -(wanted * logits.float().log_softmax(-1)).sum(-1)


def unrolled_loss(head: Head, target: Llama) -> Loss:
    """Later draft positions are accepted only by a head that has trained on its own features."""

    def loss(ids: Tensor, weights: Tensor) -> Tensor:
        # Step u of origin i drafts token i+u+2 and imitates the target's state at i+u+1.
        length = ids.shape[1] - UNROLL - 1
        with torch.no_grad():
            final, aux = target.features(ids, AUX_LAYERS)
            logits = target.logits(final).float()
            embeds = target.model["embed_tokens"](ids)
        if isinstance(head, Eagle3):
            logits = logits[..., head.draft_ids]  # type: ignore[index]
        wanted = logits.softmax(-1)
        outputs = head.unroll(final[:, :length], aux[:, :length], embeds, UNROLL, FEATURE_NOISE)
        total = ids.new_zeros((), dtype=torch.float32)
        for step, features in enumerate(outputs):
            window = slice(step + 1, step + 1 + length)
            hidden = head.drafted(features)
            drafted = target.logits(hidden) if isinstance(head, Eagle1) else head.lm_head(hidden)  # type: ignore[operator]
            per_token = _soft_cross_entropy(drafted, wanted[:, window])
            if isinstance(head, Eagle1):
                distance = F.smooth_l1_loss(features.float(), final[:, window].float(), reduction="none").mean(-1)
                per_token = per_token + FEATURE_WEIGHT * distance
            mask = weights[:, step + 2 : step + 2 + length]
            total = total + STEP_DECAY**step * _weighted(per_token, mask)
        return total

    return loss
