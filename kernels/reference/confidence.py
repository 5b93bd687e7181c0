"""Confidence of a draft distribution, in plain torch.

With m the largest logit, T the temperature and the sum over every entry but the first largest one,
    others = sum exp((x - m) / T),  max_prob = 1 / (1 + others),  log_odds = -log(others),
so neither statistic subtracts numbers that are nearly equal, however sure the drafter is.
A row that holds NaN, or whose largest entry is not finite, has no distribution: its token is torch's argmax and every
statistic is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LOG_ODDS_MAX = 80.0  # where fp32's exp ends; also what a vocabulary of one gets, so that no infinity reaches a record


@dataclass(frozen=True, slots=True)
class Confidence:
    """One value per row. `margin` and `entropy` are None unless asked for."""

    token: torch.Tensor  # int64
    max_prob: torch.Tensor  # fp32
    log_odds: torch.Tensor  # fp32, natural log, within +-LOG_ODDS_MAX
    margin: torch.Tensor | None = None  # fp32, first minus second probability
    entropy: torch.Tensor | None = None  # fp32, nats


def confidence_partial(
    logits: torch.Tensor,
    vocab_start: int = 0,
    temperature: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, 5] fp32: largest logit, its token, others, second logit, sum of (x - m) / T * exp((x - m) / T).

    The largest logit is NaN where the shard holds one. fp32 holds every token below 2**24 exactly.
    """
    x = logits.float()
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    token = x.argmax(dim=-1, keepdim=True)
    top = x.gather(-1, token)
    rest = x.scatter(-1, token, -torch.inf)
    weighted, others = _excess(rest, torch.where(top.isneginf(), 0.0, top), _divisor(temperature))
    second = rest.amax(dim=-1)
    return torch.stack(((top[:, 0]), (token[:, 0] + vocab_start).float(), others, second, weighted), dim=-1)


def confidence_combine(
    partials: torch.Tensor | Sequence[torch.Tensor],
    temperature: torch.Tensor | None = None,
    margin: bool = False,
    entropy: bool = False,
) -> Confidence:
    """The whole vocabulary's confidence from its shards', in any order; equal logits go to the lowest token."""
    parts = partials if isinstance(partials, torch.Tensor) else torch.stack(tuple(partials))
    tops, tokens, others, seconds, weighted = parts.unbind(-1)
    broken = tops.isnan()
    known = tops.masked_fill(broken, -torch.inf)
    top = known.amax(dim=0)
    eligible = torch.where(broken.any(dim=0), broken, known == top)
    token = tokens.masked_fill(~eligible, torch.inf).amin(dim=0)
    winner = eligible & (tokens == token)
    scale = _divisor(temperature)
    shift = (known - torch.where(top.isneginf(), 0.0, top)) / (1.0 if scale is None else scale[:, 0])
    weight = shift.exp()
    # A shard's own largest entry is one more "other" wherever another shard holds the winner.
    total = (weight * (others + (~winner))).sum(dim=0)
    finite_shift = torch.where(weight > 0, shift, 0.0)
    excess = (weight * (weighted + finite_shift * (others + (~winner)))).sum(dim=0)
    second = torch.where(winner, seconds, known).amax(dim=0)
    valid = ~broken.any(dim=0) & top.isfinite() & ~total.isnan()
    gap = (second - top) / (1.0 if scale is None else scale[:, 0])
    return _statistics(token.long(), gap, total, excess, valid, margin, entropy)


def confidence(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    margin: bool = False,
    entropy: bool = False,
) -> Confidence:
    x = logits.float()
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    token = x.argmax(dim=-1, keepdim=True)
    top = x.gather(-1, token)
    shift = x.scatter(-1, token, -torch.inf) - top
    scale = _divisor(temperature)
    if scale is not None:
        shift = shift / scale
    weight = shift.exp()
    others = weight.sum(dim=-1)
    excess = (torch.where(weight > 0, shift, 0.0) * weight).sum(dim=-1) if entropy else others
    valid = top[:, 0].isfinite() & ~others.isnan()
    return _statistics(token[:, 0], shift.amax(dim=-1) if margin else others, others, excess, valid, margin, entropy)


def _divisor(temperature: torch.Tensor | None) -> torch.Tensor | None:
    """Temperature 0 draws the argmax: its confidence is that of the undivided logits."""
    return None if temperature is None else torch.where(temperature == 0, 1.0, temperature.float())[:, None]


def _excess(rest: torch.Tensor, top: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    shift = rest - top
    if scale is not None:
        shift = shift / scale
    weight = shift.exp()
    return (torch.where(weight > 0, shift, 0.0) * weight).sum(dim=-1), weight.sum(dim=-1)


def _statistics(
    token: torch.Tensor,
    gap: torch.Tensor,
    others: torch.Tensor,
    excess: torch.Tensor,
    valid: torch.Tensor,
    margin: bool,
    entropy: bool,
) -> Confidence:
    """`gap` is the second logit minus the first, over the temperature; read where the margin is wanted."""
    nan = torch.nan
    prob = torch.where(valid, 1 / (1 + others), nan)
    odds = torch.where(valid, (-others.log()).clamp(-LOG_ODDS_MAX, LOG_ODDS_MAX), nan)
    return Confidence(
        token,
        prob,
        odds,
        torch.where(valid, prob * (1 - gap.exp()), nan) if margin else None,
        torch.where(valid, torch.log1p(others) - excess * prob, nan) if entropy else None,
    )
