"""A random Llama and a drafter that is the same model with noise: agreement by construction, any size, no training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    vocab: int = 512
    hidden: int = 64
    layers: int = 2
    sharpness: float = 0.1  # scale of the weights: larger is a more decided model
    noise: float = 0.004  # scale of what the drafter's weights differ by

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "float32",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(self.hidden // 32, 2),
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


def weights_of(shape: Shape) -> dict[str, torch.Tensor]:
    config = shape.config()
    h, ffn, vocab = shape.hidden, config["intermediate_size"], shape.vocab
    q, kv = config["num_attention_heads"] * 32, config["num_key_value_heads"] * 32
    matrices = {"model.embed_tokens.weight": (vocab, h), "lm_head.weight": (vocab, h)}
    norms = ["model.norm.weight"]
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        for name, size in {
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (ffn, h),
            "mlp.up_proj": (ffn, h),
            "mlp.down_proj": (h, ffn),
        }.items():
            matrices[f"{layer}.{name}.weight"] = size
        norms += [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
    weights = {name: torch.randn(size) * shape.sharpness for name, size in matrices.items()}
    return weights | {name: torch.ones(h) for name in norms}


def build(folder: Path, shape: Shape | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Write target and drafter (a draft model); returns their folders."""
    shape = shape or Shape()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = weights_of(shape)
        drafter = {name: value + torch.randn_like(value) * shape.noise for name, value in target.items()}
    for name, weights in (("target", target), ("draft", drafter)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(shape.config()))
    return folder / "target", folder / "draft"
