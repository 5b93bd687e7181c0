"""Logical K/V bytes of one token's row, summed over the drafter's layers and over the target's."""

from __future__ import annotations

from typing import Any


def row_bytes(kv_cache_config: Any, vllm_config: Any) -> tuple[int, int]:
    """(draft, target) of one rank. Draft layers are numbered after the target's, or live under their own prefix."""
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    draft = target = 0
    for group in kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            per_row = spec.page_size_bytes // spec.block_size
            if is_draft_layer(name, layers):
                draft += per_row
            else:
                target += per_row
    return draft, target


def is_draft_layer(name: str, target_layers: int) -> bool:
    if name.startswith("draft_model."):
        return True
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return bool(numbers) and numbers[0] >= target_layers
