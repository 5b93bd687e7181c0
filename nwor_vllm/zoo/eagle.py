"""EAGLE-1 and EAGLE-3 heads, unrolled in training exactly as vLLM runs them.

Origin i stands for the request whose last committed token is i+1. Step u of its draft reads the embedding of token
i+1+u and, after step 0, the head's own output of step u-1. Its cache holds target-fed keys up to i and its own keys of
steps 1..u, so one masked product plus u dot products per origin reproduce every origin's cache at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nwor_vllm.zoo.llama import MLP, NORM_EPS, Attention, Shape, rope_table

AUX_LAYERS = (2, 4, 6)


class Head(nn.Module):
    """What both heads share: one decoder layer and the attention over an unrolled cache."""

    def __init__(self, shape: Shape, attention_inputs: int) -> None:
        super().__init__()
        self.shape = shape
        layer = nn.Module()
        layer.self_attn = Attention(shape, attention_inputs)
        layer.post_attention_layernorm = nn.RMSNorm(shape.hidden, NORM_EPS)
        layer.mlp = MLP(shape)
        self.layer = layer

    def attention_inputs(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the attention and the residual beside it."""
        raise NotImplementedError

    def start(self, final: Tensor, aux: Tensor) -> Tensor:
        """The features of step 0, from the target's last normed state and its intermediate states."""
        raise NotImplementedError

    def drafted(self, features: Tensor) -> Tensor:
        """What the language-model head reads."""
        raise NotImplementedError

    def published(self) -> dict[str, Tensor]:
        """The tensors under the names vLLM loads."""
        raise NotImplementedError

    def unroll(self, final: Tensor, aux: Tensor, embeds: Tensor, steps: int, noise: float = 0.0) -> list[Tensor]:
        """Own features of steps 0..steps-1 for each origin. `embeds[:, i]` embeds token i; needs T + steps of them."""
        attention: Attention = self.layer.self_attn  # type: ignore[assignment]
        length = final.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        own: list[tuple[Tensor, Tensor]] = []
        outputs: list[Tensor] = []
        features = self.start(final, aux)
        features = features + noise * (torch.rand_like(features) - 0.5)
        for step in range(steps):
            x, residual = self.attention_inputs(embeds[:, 1 + step : 1 + step + length], features)
            q, k, v = attention.qkv(x, rope_table(length, self.shape.head_dim, step))
            scale = self.shape.head_dim**-0.5
            if step == 0:
                base_k, base_v = k, v
            else:
                own.append((k, v))
            scores = (q @ base_k.transpose(-1, -2) * scale).float().masked_fill(~causal, -torch.inf)
            extra = [(q * key).sum(-1, keepdim=True).float() * scale for key, _ in own]
            weights = torch.cat([scores, *extra], dim=-1).softmax(-1).to(v.dtype)
            mixed = weights[..., :length] @ base_v
            for index, (_, value) in enumerate(own):
                mixed = mixed + weights[..., length + index, None] * value
            residual = residual + attention.merge(mixed)
            features = residual + self.layer.mlp(self.layer.post_attention_layernorm(residual))  # type: ignore[operator]
            outputs.append(features)
        return outputs


class Eagle1(Head):
    """Predicts the target's next normed state, read by the target's own language-model head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.hidden)
        self.fc = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        nn.init.normal_(self.fc.weight, std=(2 * shape.hidden) ** -0.5)

    def attention_inputs(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(torch.cat((embeds, features), dim=-1))
        return x, x

    def start(self, final: Tensor, aux: Tensor) -> Tensor:
        return final

    def drafted(self, features: Tensor) -> Tensor:
        return features

    def published(self) -> dict[str, Tensor]:
        layer = {f"layers.0.{name}": value for name, value in self.layer.state_dict().items()}
        return {"fc.weight": self.fc.weight.detach(), **layer}


class Eagle3(Head):
    """Reads three target layers; has its own language-model head over the most frequent `draft_ids`."""

    def __init__(self, shape: Shape, draft_ids: Tensor) -> None:
        super().__init__(shape, 2 * shape.hidden)
        self.fc = nn.Linear(len(AUX_LAYERS) * shape.hidden, shape.hidden, bias=False)
        self.input_layernorm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.hidden_norm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.norm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.lm_head = nn.Linear(shape.hidden, len(draft_ids), bias=False)
        self.register_buffer("draft_ids", draft_ids)
        nn.init.normal_(self.fc.weight, std=(len(AUX_LAYERS) * shape.hidden) ** -0.5)

    def attention_inputs(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((self.input_layernorm(embeds), self.hidden_norm(features)), dim=-1), features

    def start(self, final: Tensor, aux: Tensor) -> Tensor:
        out: Tensor = self.fc(aux)
        return out

    def drafted(self, features: Tensor) -> Tensor:
        out: Tensor = self.norm(features)
        return out

    def published(self) -> dict[str, Tensor]:
        layer = {f"midlayer.{name}": value for name, value in self.layer.state_dict().items()}
        for norm in ("input_layernorm", "hidden_norm"):
            layer[f"midlayer.{norm}.weight"] = getattr(self, norm).weight.detach()
        ids: Tensor = self.draft_ids  # type: ignore[assignment]
        in_draft = torch.zeros(self.shape.vocab, dtype=torch.bool)
        in_draft[ids] = True
        return {
            "fc.weight": self.fc.weight.detach(),
            "norm.weight": self.norm.weight.detach(),
            "lm_head.weight": self.lm_head.weight.detach(),
            "d2t": ids - torch.arange(len(ids)),
            "t2d": in_draft,
            **layer,
        }
