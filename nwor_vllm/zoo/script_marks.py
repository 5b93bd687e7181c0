"""Which drafts err: marks laid along rings of tokens, so that acceptance is a property of the text.

The target counts upwards: inside a class's ring of token ids, next(t) = t + 1, wrapping at the ring's end. Every token
carries one mark per draft position k: whether the drafter, asked at position k for the successor of this token, errs.

Why the programmed values are exact. A round ends at its first rejection and the next one starts at the token after the
one whose mark rejected, so no mark is read twice in a pass. Marks drawn independently of each other therefore make the
acceptance of position k, given that it is reached, the programmed p_k, whatever draft lengths a policy chooses.
What chance would add on a finite ring is removed where it can be: the marks that rounds of full length read are dealt
from shuffled decks of ten which keep the programmed share, separately for each position.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nwor_vllm.errors import ConfigError
from nwor_vllm.zoo.script_shape import FIRST_FREE, MIN_RING

DECK = 10
MAX_DEPTHS = 32
GOLDEN = 0.6180339887498949  # its multiples modulo 1 spread evenly, however many are taken


@dataclass(frozen=True)
class Regime:
    """`accept[k-1]` is P(position k accepted | reached); the last value also holds for every later position.

    `tokens` is how long the regime lasts, None for ever.
    """

    accept: tuple[float, ...]
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.accept) <= MAX_DEPTHS:
            raise ConfigError(f"accept: give 1 to {MAX_DEPTHS} values, not {len(self.accept)}")
        for value in self.accept:
            if not 0 <= value <= 1:
                raise ConfigError(f"accept: {value} is outside 0..1")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"accept: a regime must last at least 1 token, not {self.tokens}")

    def at(self, depth: int) -> float:
        return self.accept[min(depth, len(self.accept)) - 1]


@dataclass(frozen=True)
class ScriptClass:
    """Prompts of one kind: a regime that holds for ever, or several of given lengths that follow each other."""

    name: str
    regimes: tuple[Regime, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("accept: a class needs a name before the '='")
        if not self.regimes:
            raise ConfigError(f"accept: class {self.name!r} has no regime")
        if len(self.regimes) > 1 and any(regime.tokens is None for regime in self.regimes):
            raise ConfigError(f"accept: class {self.name!r} changes, so give each regime a length (0.9,0.5@64)")

    @property
    def period(self) -> int:
        """Tokens after which the regimes repeat; 0 where there is only one."""
        return sum(regime.tokens or 0 for regime in self.regimes) if len(self.regimes) > 1 else 0

    def regime_after(self, tokens: int) -> Regime:
        left = tokens % self.period if self.period else 0
        for regime in self.regimes[:-1]:
            left -= regime.tokens or 0
            if left < 0:
                return regime
        return self.regimes[-1]


def parse_class(text: str, index: int = 0) -> ScriptClass:
    """`[name=]p1,p2,...[@tokens][/p1,...@tokens]`, as the command line has it."""
    name, _, body = text.rpartition("=")
    regimes = []
    for part in body.split("/"):
        values, at, tokens = part.partition("@")
        try:
            accept = tuple(float(value) for value in values.split(","))
            length = int(tokens) if at else None
        except ValueError:
            raise ConfigError(
                f"accept: cannot read {part!r} in {text!r}; write [name=]0.9,0.5,0.2 or name=0.9@64/0.3,0.1@64"
            ) from None
        regimes.append(Regime(accept, length))
    return ScriptClass(name if "=" in text else f"class{index}", tuple(regimes))


class _Deck:
    """Deals rights and wrongs in random order, with exactly the programmed share in every ten (carrying fractions)."""

    def __init__(self, share: float, rng: random.Random) -> None:
        self.share, self.rng, self.owed = share, rng, rng.random()
        self.cards: list[bool] = []

    def wrong(self) -> bool:
        if not self.cards:
            self.owed += self.share * DECK
            rights = int(self.owed + 1e-9)
            self.owed -= rights
            self.cards = [False] * rights + [True] * (DECK - rights)
            self.rng.shuffle(self.cards)
        return self.cards.pop()


@dataclass(frozen=True)
class Ring:
    """One class's tokens, start..start+size-1. Bit k-1 of wrong[i] / doubt[i] concerns position k after token i."""

    spec: ScriptClass
    start: int
    size: int
    wrong: tuple[int, ...]
    doubt: tuple[int, ...]
    starts: tuple[int, ...]  # where prompts may begin

    def __contains__(self, token: int) -> bool:
        return self.start <= token < self.start + self.size

    def errs(self, index: int, depth: int, depths: int) -> bool:
        return bool(self.wrong[index % self.size] >> (min(depth, depths) - 1) & 1)

    def prompt_start(self, share: float) -> int:
        """The start at this share (0..1) of the way round the ring."""
        return self.starts[int(share * len(self.starts))]


def lay_ring(spec: ScriptClass, start: int, size: int, depths: int, blur: float, seed: int) -> Ring:
    rng = random.Random(f"{seed}:{spec.name}")
    decks: dict[tuple[Regime, int], _Deck] = {}
    wrong, doubt, starts = [], [], []
    depth = 1
    for index in range(size):
        regime = spec.regime_after(index)
        if spec.period and index % spec.period == 0:
            depth = 1
        if depth == 1 and (not spec.period or index % spec.period == 0):
            starts.append(index)
        bits = sum((rng.random() >= regime.at(k)) << (k - 1) for k in range(1, depths + 1))
        if depth <= depths:
            deck = decks.setdefault((regime, depth), _Deck(regime.at(depth), rng))
            err = deck.wrong()
            bits = bits & ~(1 << (depth - 1)) | err << (depth - 1)
            depth = 1 if err else depth + 1
        else:  # all accepted: the bonus token's own successor is not drafted, so this mark is not read
            depth = 1
        wrong.append(bits)
        doubt.append(bits ^ sum((rng.random() < blur) << k for k in range(depths)))
    return Ring(spec, start, size, tuple(wrong), tuple(doubt), tuple(starts))


def lay_rings(classes: Sequence[ScriptClass], vocab: int, blur: float, seed: int) -> tuple[Ring, ...]:
    """Equal shares of the vocabulary, cut down to whole periods where a class's regimes repeat."""
    if not classes:
        raise ConfigError("accept: give at least one class")
    names = [spec.name for spec in classes]
    if len(set(names)) < len(names):
        raise ConfigError(f"accept: class names must differ: {', '.join(names)}")
    depths = depths_of(classes)
    share = (vocab - FIRST_FREE) // len(classes)
    rings = []
    for index, spec in enumerate(classes):
        least = max(MIN_RING, spec.period)
        if share < least:
            raise ConfigError(
                f"shape: vocab {vocab} is too small, class {spec.name!r} needs a ring of {least} tokens; "
                f"use at least {FIRST_FREE + least * len(classes)}"
            )
        size = share - share % spec.period if spec.period else share
        rings.append(lay_ring(spec, FIRST_FREE + index * share, size, depths, blur, seed))
    return tuple(rings)


def depths_of(classes: Sequence[ScriptClass]) -> int:
    return max(len(regime.accept) for spec in classes for regime in spec.regimes)
