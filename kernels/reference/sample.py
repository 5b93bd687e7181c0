"""Gumbel-max sampling of softmax(logits / temperature), in plain torch: argmax of logits / T - log(exponential).

Rows at temperature 0 take the argmax. A row that holds NaN takes torch's argmax too.
"""

from __future__ import annotations

import torch

from nwor_vllm.kernels.reference.noise import exponential


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    drafting: bool,
) -> torch.Tensor:
    x = logits.float()
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    greedy = (temperature == 0)[:, None]
    noise = -exponential(seeds, positions, x.shape[1], drafting).log()
    score = torch.where(greedy, x, x / torch.where(greedy, 1.0, temperature[:, None]) + noise)
    return score.argmax(dim=-1)
