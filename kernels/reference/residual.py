"""Multi-round residual sampling, in plain torch, fp32.

    r_0 = p,   z_k = sum max(0, r_k - q_k),   r_k+1 = max(0, r_k - q_k) / z_k     (r_k+1 = r_k where z_k is 0)
Round k accepts its candidate x with probability min(1, r_k(x) / q_k(x)); when no round accepts, the token is drawn from
the last residual: argmax of probability / exponential, with the noise of reference/noise.py.
z_k = 0 says that q_k covers r_k entirely: then a rejection has probability 0, and r_k itself is the exact answer.
NaN counts as probability 0; a row without any mass gives token -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nwor_vllm.kernels.reference.noise import exponential


@dataclass(frozen=True, slots=True)
class Residual:
    token: torch.Tensor  # [rows] int64: the accepted candidate, or the draw from the last residual
    accepted: torch.Tensor  # [rows] int32: the round that accepted, -1 where the residual was drawn
    mass: torch.Tensor  # [rows, rounds] fp32: z_k, NaN where round k was not reached


def residual_sample(
    target: torch.Tensor,
    draft: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rounds: torch.Tensor | None,
    candidates: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    drafting: bool,
) -> Residual:
    rows, total, vocab = draft.shape
    rest = target.float().nan_to_num(nan=0.0)
    limit = torch.full((rows,), total, device=target.device) if rounds is None else rounds.clamp(0, total)
    accepted = torch.full((rows,), -1, dtype=torch.int32, device=target.device)
    mass = torch.full((rows, total), torch.nan, dtype=torch.float32, device=target.device)
    for k in range(total):
        active = (k < limit) & (accepted < 0)
        q = draft[:, k].float().nan_to_num(nan=0.0)
        over = (rest - q).clamp_min(0.0)
        z = over.sum(dim=-1)
        if candidates is not None and uniforms is not None:
            pick = candidates[:, k : k + 1]
            takes = (uniforms[:, k : k + 1] * q.gather(1, pick) < rest.gather(1, pick))[:, 0]
            accepted = torch.where(active & takes, k, accepted).int()
        mass[:, k] = torch.where(active, z, torch.nan)
        moves = (active & (accepted < 0) & (z > 0))[:, None]
        rest = torch.where(moves, over / z[:, None], rest)
    best = (rest / exponential(seeds, positions, vocab, drafting)).max(dim=-1)
    token = torch.where(best.values > 0, best.indices, -1)
    if candidates is not None:
        taken = candidates.gather(1, accepted.clamp_min(0).long()[:, None])[:, 0]
        token = torch.where(accepted >= 0, taken, token)
    return Residual(token, accepted, mass)
