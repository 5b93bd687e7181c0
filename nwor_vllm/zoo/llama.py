"""A plain Llama in torch, with the parameter names of the published format, fast to train on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10000.0
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. The head size is fixed: vLLM's attention on CPUs wants a multiple of 32."""

    vocab: int = 1536
    hidden: int = 192
    layers: int = 6
    ffn: int = 512
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32


def rope_table(length: int, head_dim: int, start: int = 0) -> tuple[Tensor, Tensor]:
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(start, start + length).float(), frequency)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape, inputs: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        width = inputs or shape.hidden
        self.q_proj = nn.Linear(width, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Heads first ([B, H, T, D]), positions applied, keys and values repeated for their query group."""
        s, (batch, length, _) = self.shape, x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, length, heads, s.head_dim).transpose(1, 2)

        group = s.heads // s.kv_heads
        q = rotate(split(self.q_proj(x), s.heads), rope)
        k = rotate(split(self.k_proj(x), s.kv_heads), rope).repeat_interleave(group, dim=1)
        v = split(self.v_proj(x), s.kv_heads).repeat_interleave(group, dim=1)
        return q, k, v

    def merge(self, heads: Tensor) -> Tensor:
        out: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x, rope)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """Tied embeddings. `features` gives what the heads are trained on: the residual stream after chosen layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab, shape.hidden),
                "layers": nn.ModuleList(Layer(shape) for _ in range(shape.layers)),
                "norm": nn.RMSNorm(shape.hidden, NORM_EPS),
            }
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)

    def states(self, ids: Tensor) -> list[Tensor]:
        """The residual stream before layer 0, 1, ..., and after the last."""
        rope = rope_table(ids.shape[1], self.shape.head_dim)
        stream = [self.model["embed_tokens"](ids)]
        for layer in self.model["layers"].children():
            stream.append(layer(stream[-1], rope))
        return stream

    def features(self, ids: Tensor, aux: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What vLLM hands to a head: the last state after its norm, and the raw states after `aux` layers."""
        stream = self.states(ids)
        return self.model["norm"](stream[-1]), torch.cat([stream[i] for i in aux], dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        weight = self.model["embed_tokens"].weight
        return F.linear(hidden, weight)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.model["norm"](self.states(ids)[-1]))
