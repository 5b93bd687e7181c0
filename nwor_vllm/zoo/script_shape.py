"""The shapes a scripted pair can take, and where in the residual stream its program lives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from nwor_vllm.errors import ConfigError, unknown_key

BOS, EOS, DECOY = 0, 1, 2
RIVALS = range(3, 35)
FIRST_FREE = RIVALS.stop
MIN_RING = 64
# Two codes may agree so much that the runner-up reaches this share of the peak logit, in one pair out of a million.
MAX_CORRELATION = 0.75


@dataclass(frozen=True)
class Shape:
    """A Llama-architecture target; its EAGLE head has one layer of the same widths."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 0  # 0: hidden / heads
    max_positions: int = 32768

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "head_dim" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"shape: {field.name} must be a whole number of at least {least}, not {value!r}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"shape: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if not self.head_dim:
            if self.hidden % self.heads:
                raise ConfigError(
                    f"shape: hidden {self.hidden} must be a multiple of heads {self.heads}, or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.head_dim % 2:
            raise ConfigError(f"shape: head_dim {self.head_dim} must be even, rotary embeddings turn pairs")

    def parameters(self) -> int:
        """Of the target: the EAGLE head adds one layer and its 2 x hidden x hidden projection."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return 2 * self.vocab * self.hidden + self.layers * (attention + 3 * self.hidden * self.ffn)


NAMED: dict[str, Shape] = {
    "embedded": Shape(hidden=192, layers=6, heads=6, kv_heads=2, ffn=512, vocab=1536, max_positions=8192),
    "llama-3.2-1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256),
    "llama-3.1-8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256),
    "qwen2-7b-like": Shape(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944, vocab=152064),
}


def shape_like(like: str | None, changes: Mapping[str, int | None]) -> Shape:
    """A named shape with some widths changed, or one spelt out in full."""
    given = {name: value for name, value in changes.items() if value is not None}
    if like is not None:
        if like not in NAMED:
            raise unknown_key("shape", like, NAMED)
        base = NAMED[like]
        if {"hidden", "heads"} & given.keys() and "head_dim" not in given:
            given["head_dim"] = 0
        return replace(base, **given)
    missing = [name for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab") if name not in given]
    if missing:
        raise ConfigError(f"shape: name one with like (one of {', '.join(NAMED)}) or give {', '.join(missing)}")
    return Shape(**given)


@dataclass(frozen=True)
class Layout:
    """Which hidden dimensions carry what. `code` first, then one block of `depths` each, then single dimensions."""

    hidden: int
    depths: int

    @property
    def code(self) -> int:
        return self.hidden - 3 * self.depths - 4

    @property
    def wrong(self) -> int:
        return self.code

    @property
    def doubt(self) -> int:
        return self.code + self.depths

    @property
    def depth(self) -> int:
        return self.code + 2 * self.depths

    @property
    def start(self) -> int:
        return self.hidden - 4

    @property
    def pad(self) -> int:
        return self.hidden - 3

    @property
    def decoy(self) -> int:
        return self.hidden - 2

    @property
    def rival(self) -> int:
        return self.hidden - 1


def layout_for(shape: Shape, depths: int) -> Layout:
    """The layout, or one line saying how wide the shape would have to be.

    For random signs, P(two given codes agree above c) < exp(-code c^2 / 2); over vocab^2 pairs and one in a million.
    """
    needed = math.ceil(2 * math.log(shape.vocab**2 * 1e6) / MAX_CORRELATION**2)
    layout = Layout(shape.hidden, depths)
    if layout.code < needed:
        least = needed + shape.hidden - layout.code
        raise ConfigError(
            f"shape: hidden {shape.hidden} is too small for a robust code of vocab {shape.vocab} with {depths} "
            f"programmed positions; use at least {least}"
        )
    if shape.ffn < 2 * depths:
        raise ConfigError(f"shape: ffn {shape.ffn} is too small, {depths} programmed positions need {2 * depths}")
    return layout
