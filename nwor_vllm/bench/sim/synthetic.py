"""Seeded traces with known statistics: what a drafter finds easy varies by request, by position and by depth.

Every output position q of a request has an easiness e_q (log-odds, around the request's own mean); a draft at depth j
on q is accepted iff u_q < sigmoid(e_q - depth_loss * (j - 1)), with one uniform u_q per position, so that rounds
starting at neighbouring positions agree as those of a real drafter do. The confidence shows e_q through noise and
miscalibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nwor_vllm.bench.traces import Trace


@dataclass(frozen=True)
class Domain:
    name: str
    acceptance: float  # at depth 1, at the mean request
    between: float = 0.5  # standard deviation of the request means, log-odds
    within: float = 1.6  # standard deviation along a text, log-odds: sets what a confidence can know
    depth_loss: float = 0.08  # log-odds lost per draft position
    noise: float = 0.5  # of the confidence, log-odds
    slope: float = 0.8  # confidence log-odds per true log-odds: < 1 is a timid drafter
    shift: float = 0.3  # > 0 is an overconfident drafter


# Acceptance as the embedded pair shows it at greedy decoding.
DOMAINS = (
    Domain("code", 0.88),
    Domain("chat", 0.80),
    Domain("summary", 0.72),
    Domain("retrieval", 0.70),
    Domain("translation", 0.52),
    Domain("arithmetic", 0.78),
    Domain("creative", 0.62),
    Domain("json", 0.82),
)
WORTHLESS = Domain("worthless", 0.03, between=0.2, within=0.5)


def generate(domain: Domain, requests: int, length: int, k_max: int, seed: int) -> Trace:
    rng = np.random.default_rng([seed, *domain.name.encode()])
    spread = np.hypot(domain.between, domain.within)
    center = np.log(domain.acceptance / (1 - domain.acceptance)) * np.sqrt(1 + spread**2 / 2.9)  # logistic-normal mean
    lengths = np.maximum(8, rng.poisson(length, requests))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = int(starts[-1])
    # Easiness drifts along the text (correlation .6 from token to token) around the request's mean.
    shocks = rng.normal(size=positions)
    local = np.empty(positions)
    state = 0.0
    for i, shock in enumerate(shocks):
        state = 0.6 * state + 0.8 * shock
        local[i] = state
    easiness = center + np.repeat(rng.normal(size=requests) * domain.between, lengths) + domain.within * local
    luck = rng.random(positions)
    # Draft position j from start p sits on output position p + j; past the end it repeats the last one.
    at = np.minimum(np.arange(positions)[:, None] + np.arange(k_max), positions - 1)
    odds = easiness[at] - domain.depth_loss * np.arange(k_max)
    hit = luck[at] < 1 / (1 + np.exp(-odds))
    accepted = np.where(hit.all(axis=1), k_max, np.argmin(hit, axis=1))
    seen = domain.shift + domain.slope * odds + domain.noise * rng.normal(size=positions)[at]
    return Trace(
        starts=starts,
        accepted=accepted.astype(np.int64),
        confidence=1 / (1 + np.exp(-seen)),
        categories=(domain.name,) * requests,
        about={"source": "synthetic", "domain": domain.name, "seed": seed},
    )
