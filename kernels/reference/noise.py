"""The counter-based noise of vLLM's V2 sampler, bit for bit: a draft can be replayed by (seed, position, token).

murmur3 of (seed, position, token) gives 32 bits, their midpoint a uniform u in (0, 1). The exponential -log(1 - u) then
serves both forms of the same draw: argmax of logit - log(exponential), and argmax of probability / exponential.
"""

from __future__ import annotations

import torch

DRAFT_SALT = 1 << 30  # keeps a draft's noise apart from the noise its verification resamples with
_WORD = 0xFFFFFFFF


def exponential(seeds: torch.Tensor, positions: torch.Tensor, vocab: int, drafting: bool) -> torch.Tensor:
    """[rows, vocab] fp32, one draw for every (row's seed and position, token)."""
    place = positions.long() + (DRAFT_SALT if drafting else 0)
    h = torch.zeros_like(seeds, dtype=torch.int64)
    for word in (seeds & _WORD, (seeds >> 32) & _WORD, place & _WORD):
        h = _mix(h, word)
    bits = _finish(_mix(h[:, None], torch.arange(vocab, device=seeds.device)[None, :]))
    high, low = (bits >> 16).float(), (bits & 0xFFFF).float()
    u = high * 2.0**-16 + (low + 0.5) * 2.0**-32
    tail = torch.full_like(u, 1 / 8)
    for n in range(7, 0, -1):
        tail = 1 / n + u * tail
    return torch.where(u < 0.25, u * tail, -torch.log((1 - u).clamp_min(2.0**-24)))


def _rotate(x: torch.Tensor, by: int) -> torch.Tensor:
    return ((x << by) | (x >> (32 - by))) & _WORD


def _mix(h: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _rotate((word * 0xCC9E2D51) & _WORD, 15)
    h = _rotate(h ^ ((word * 0x1B873593) & _WORD), 13)
    return (h * 5 + 0xE6546B64) & _WORD


def _finish(h: torch.Tensor) -> torch.Tensor:
    h = h ^ 16  # the length of the key in bytes
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)
