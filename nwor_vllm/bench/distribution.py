"""Whether sampled continuations follow the target's own distribution: chi-square per position and jointly, as z."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

Tokens = tuple[int, ...]
LEAST_EXPECTED = 5.0  # cells expected less often are pooled: chi-square is an approximation of counts


def z_of(observed: Mapping[Tokens, int], expected: Mapping[Tokens, float]) -> float:
    """The chi-square statistic as a normal score (Wilson and Hilferty): its own tail is too heavy at few cells."""
    statistic, cells, pooled_seen, pooled_due = 0.0, 0, 0, 0.0
    for cell, due in expected.items():
        if due < LEAST_EXPECTED:
            pooled_seen += observed.get(cell, 0)
            pooled_due += due
            continue
        statistic += (observed.get(cell, 0) - due) ** 2 / due
        cells += 1
    impossible = sum(n for cell, n in observed.items() if cell not in expected)
    if pooled_due > 0 or pooled_seen or impossible:
        due = max(pooled_due, 1.0)
        statistic += (pooled_seen + impossible - pooled_due) ** 2 / due
        cells += 1
    freedom = max(cells - 1, 1)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def joint(conditional: Mapping[Tokens, Sequence[float]], length: int) -> dict[Tokens, float]:
    """P(continuation) for every continuation of `length`, from P(next | continuation so far)."""
    vocab = len(conditional[()])
    found = {}
    for tokens in itertools.product(range(vocab), repeat=length):
        chance = 1.0
        for position in range(length):
            chance *= conditional[tokens[:position]][tokens[position]]
        found[tokens] = chance
    return found


def z_scores(samples: Sequence[Tokens], truth: Mapping[Tokens, float]) -> dict[str, float]:
    """One z per position, and one for whole continuations."""
    length = len(next(iter(truth)))
    scores = {}
    for position in range(length):
        due: Counter[Tokens] = Counter()
        for tokens, chance in truth.items():
            due[(tokens[position],)] += chance * len(samples)  # type: ignore[assignment]
        scores[f"position {position + 1}"] = z_of(Counter((s[position],) for s in samples), due)
    whole = {tokens: chance * len(samples) for tokens, chance in truth.items()}
    scores["jointly"] = z_of(Counter(samples), whole)
    return scores
