"""Folders that stock vLLM loads: config.json, sharded bf16 safetensors, tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nwor_vllm.zoo.eagle import AUX_LAYERS, Eagle3, Head
from nwor_vllm.zoo.llama import NORM_EPS, ROPE_THETA, Llama, Shape
from nwor_vllm.zoo.tokenizer import END_ID, PAD_ID

MAX_POSITIONS = 2048
SHARD_BYTES = 3 * 2**20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def llama_config(shape: Shape, tied: bool = True) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in sorted(tensors.items()):
        stored = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        if size and size + stored.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = stored.contiguous()
        size += stored.nbytes
        total += stored.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    listing = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer_from: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_sharded(tensors, folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_from / name, folder / name)


def write_llama(folder: Path, model: Llama, tokenizer_from: Path) -> None:
    write_folder(folder, llama_config(model.shape), dict(model.state_dict()), tokenizer_from)
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")


def write_head(folder: Path, head: Head, tokenizer_from: Path) -> None:
    config = llama_config(head.shape, tied=False)
    if isinstance(head, Eagle3):
        config["draft_vocab_size"] = len(head.published()["d2t"])
        config["eagle_config"] = {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS),
        }
        config["eagle_aux_hidden_state_layer_ids"] = list(AUX_LAYERS)  # where vLLM's V2 runner looks for them
    write_folder(folder, config, head.published(), tokenizer_from)


def write_checksums(root: Path) -> None:
    """Seals a complete pair. Everyone may read it, whatever the umask safetensors wrote under."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    for file in files:
        file.chmod(0o644)
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(root).as_posix()}" for p in files]
    (root / "SHA256SUMS").write_text("\n".join(lines) + "\n")
