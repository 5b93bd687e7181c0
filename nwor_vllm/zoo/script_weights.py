"""The weights of a scripted pair, one tensor at a time and made on the device that wants them.

Target. embed(t) = [code(t), wrong(t), doubt(t), 0, start=1, pad, 0, 0] with code(t) random signs; `pad` gives every
embedding the same length. Attention and FFN are dense and random, but write so little (NOISE) and only into the code
that the normed last state is embed(t) again. lm_head[v] = code(v - 1) * PEAK / code_size: the logit of t + 1 is PEAK,
that of any other token PEAK times the agreement of two random codes, at most 3/4 of it and a few percent as a rule.

EAGLE head. fc copies code, wrong, doubt and pad from the new token's embedding and keeps a depth counter in the state:
it turns the target's `start` into depth 1 and its own depth k into k + 1 (its last depth into itself). The FFN's first
neurons multiply, through SwiGLU, depth_k by wrong_k and by doubt_k; silu(0) = 0 makes the other products vanish. So
the head's logits are the target's (a right draft), plus, where it errs, PEAK + LEAD for the decoy token, which no text
contains, plus, where it doubts, a level for the rivals that brings the largest probability down to `doubt_confidence`.

All programmed values are exact in bfloat16 or stand 1 or more logits apart where bfloat16 resolves 1/8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from nwor_vllm.zoo.script_marks import Ring
from nwor_vllm.zoo.script_shape import DECOY, RIVALS, Layout, Shape

PEAK = 20.0
LEAD = 4.0
GATE = 8.0
SILU_GATE = GATE / (1 + math.exp(-GATE))
# Noise is what keeps matrices dense: GEMMs over zeros draw less power and would flatter the clock.
NOISE = 0.003
ROWS = 8192
MASK32 = 0xFFFFFFFF

NamedTensors = Iterator[tuple[str, torch.Tensor]]


def rival_logits(confidence: float) -> tuple[float, float]:
    """Rivals' logits above PEAK that bring the largest probability down to `confidence`: right drafts, wrong ones."""
    right = math.log((1 / confidence - 1) / len(RIVALS))
    lead = math.exp(LEAD)
    wrong = math.log((lead / confidence - lead - 1) / len(RIVALS))
    return right, wrong


class ScriptWeights:
    """Deterministic in (rings, seed): codes are the same on every device, the noise is not and does not matter."""

    def __init__(
        self,
        shape: Shape,
        layout: Layout,
        rings: Sequence[Ring],
        seed: int,
        doubt_confidence: float,
        device: torch.device,
    ) -> None:
        self.shape, self.layout, self.seed, self.device = shape, layout, seed, device
        self.right_level, self.wrong_level = rival_logits(doubt_confidence)
        # The doubt of a right draft is 1, that of a wrong one makes (doubt + 1) / 2 reach the other level.
        self.doubt_wrong = 2 * (PEAK + self.wrong_level) / (PEAK + self.right_level) - 1
        every = (1 << layout.depths) - 1
        wrong, doubt = [every] * shape.vocab, [every] * shape.vocab
        self.before = torch.full((shape.vocab,), -1, dtype=torch.int64, device=device)
        for ring in rings:
            end = ring.start + ring.size
            wrong[ring.start : end], doubt[ring.start : end] = ring.wrong, ring.doubt
            self.before[ring.start : end] = torch.arange(ring.start - 1, end - 1, device=device)
            self.before[ring.start] = end - 1
        self.wrong = self._signs(wrong)
        doubts = self._signs(doubt)
        self.doubt = torch.where((doubts > 0) & (self.wrong > 0), self.doubt_wrong, doubts)
        self.length2 = layout.code + layout.depths + 1 + layout.depths * max(1.0, self.doubt_wrong**2)
        self.scale = math.sqrt(self.length2 / shape.hidden)

    def _signs(self, masks: Sequence[int]) -> torch.Tensor:
        bits = torch.tensor(masks, dtype=torch.int64, device=self.device)[:, None]
        return (bits >> torch.arange(self.layout.depths, device=self.device) & 1).float() * 2 - 1

    def codes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Random signs by hashing (token, word): 32 bits of a 64-bit mixer, the same on every device."""
        words = torch.arange(-(-self.layout.code // 32), device=self.device)
        x = tokens[:, None] * 0x1000003 + words * 0x9E3779B1 + self.seed * 0x85EBCA6B + 0x27D4EB2F
        for shift, factor in ((31, 0x7FB5D329728EA185), (27, -0x7E25210B43D22BB3), (33, 0x2545F4914F6CDD1D)):
            x = (x ^ (x >> shift)) * factor
        x = (x >> 29) & MASK32
        bits = x[..., None] >> torch.arange(32, device=self.device) & 1
        return bits.flatten(1)[:, : self.layout.code].to(torch.bfloat16) * 2 - 1

    def _noise(self, name: str, rows: int, columns: int, size: float) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:6], "big"))
        limit = size * math.sqrt(3 / columns)
        empty = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device)
        return empty.uniform_(-limit, limit, generator=generator)

    def _ones(self) -> torch.Tensor:
        return torch.ones(self.shape.hidden, dtype=torch.bfloat16, device=self.device)

    def _embedding(self) -> torch.Tensor:
        at, table = self.layout, self._zeros(self.shape.vocab)
        for first in range(0, self.shape.vocab, ROWS):
            rows = slice(first, min(first + ROWS, self.shape.vocab))
            table[rows, : at.code] = self.codes(torch.arange(rows.start, rows.stop, device=self.device))
        doubt = self.doubt.to(torch.bfloat16).float()
        table[:, at.wrong : at.wrong + at.depths] = self.wrong.to(torch.bfloat16)
        table[:, at.doubt : at.doubt + at.depths] = doubt.to(torch.bfloat16)
        table[:, at.start] = 1
        rest = at.depths * max(1.0, self.doubt_wrong**2) - doubt.square().sum(1)
        table[:, at.pad] = rest.clamp(min=0).sqrt().to(torch.bfloat16)
        return table

    def _zeros(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, self.shape.hidden, dtype=torch.bfloat16, device=self.device)

    def _lm_head(self) -> torch.Tensor:
        at, table = self.layout, self._zeros(self.shape.vocab)
        for first in range(0, self.shape.vocab, ROWS):
            before = self.before[first : first + ROWS]
            codes = self.codes(before) * (before >= 0)[:, None]
            table[first : first + ROWS, : at.code] = codes * (PEAK / at.code)
        table[DECOY, at.decoy] = PEAK
        table[RIVALS.start : RIVALS.stop, at.rival] = PEAK
        return table

    def _layer(self, prefix: str, input_norm: bool) -> NamedTensors:
        shape, hidden = self.shape, self.shape.hidden
        if input_norm:
            yield f"{prefix}.input_layernorm.weight", self._ones()
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            name = f"{prefix}.self_attn.{name}_proj.weight"
            yield name, self._noise(name, heads * shape.head_dim, hidden, 1.0)
        name = f"{prefix}.self_attn.o_proj.weight"
        yield name, self._writer(name, shape.heads * shape.head_dim)
        yield f"{prefix}.post_attention_layernorm.weight", self._ones()

    def _writer(self, name: str, columns: int) -> torch.Tensor:
        weight = self._noise(name, self.shape.hidden, columns, NOISE)
        weight[self.layout.code :] = 0
        return weight

    def target(self) -> NamedTensors:
        yield "model.embed_tokens.weight", self._embedding()
        for index in range(self.shape.layers):
            prefix = f"model.layers.{index}"
            yield from self._layer(prefix, input_norm=True)
            for part in ("gate", "up"):
                name = f"{prefix}.mlp.{part}_proj.weight"
                yield name, self._noise(name, self.shape.ffn, self.shape.hidden, 1.0)
            name = f"{prefix}.mlp.down_proj.weight"
            yield name, self._writer(name, self.shape.ffn)
        yield "model.norm.weight", self._ones() * self.scale
        yield "lm_head.weight", self._lm_head()

    def drafter(self) -> NamedTensors:
        """EAGLE names; embeddings and lm_head are the target's."""
        yield "fc.weight", self._fc()
        yield from self._layer("layers.0", input_norm=False)
        gate, up, down = self._products()
        yield "layers.0.mlp.gate_proj.weight", gate
        yield "layers.0.mlp.up_proj.weight", up
        yield "layers.0.mlp.down_proj.weight", down

    def _fc(self) -> torch.Tensor:
        at, hidden = self.layout, self.shape.hidden
        fc = self._noise("fc", hidden, 2 * hidden, NOISE)
        fc[at.code :] = 0
        for index in [*range(at.depth), at.pad]:
            fc[index, index] = 1
        fc[at.depth, hidden + at.start] = 1
        for k in range(1, at.depths):
            fc[at.depth + k, hidden + at.depth + k - 1] = 1
        last = at.depth + at.depths - 1
        fc[last, hidden + last] = 1
        return fc

    def _products(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, shape = self.layout, self.shape
        gate = self._noise("gate", shape.ffn, shape.hidden, 1.0)
        up = self._noise("up", shape.ffn, shape.hidden, 1.0)
        down = self._writer("down", shape.ffn)
        products = 2 * at.depths
        gate[:products], up[:products], down[:, :products] = 0, 0, 0
        for k in range(at.depths):
            for neuron, mark in ((k, at.wrong + k), (at.depths + k, at.doubt + k)):
                gate[neuron, at.depth + k] = GATE * self.scale
                up[neuron, mark] = up[neuron, at.depth + k] = self.scale / 2
        down[at.decoy, : at.depths] = (1 + LEAD / PEAK) / SILU_GATE
        down[at.rival, at.depths : products] = (1 + self.right_level / PEAK) / SILU_GATE
        return gate, up, down
