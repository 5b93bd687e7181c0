"""What the K/V cache writes of a run should weigh, from the model's shape, and whether measured stores agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.bench.metrics import BatchResult, Counters
from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError, NworError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
# Stores are counted in whole 32-byte sectors, and a drafter may write the rows of rejected tokens too.
STORE_TOLERANCE = 0.10


@dataclass(frozen=True, slots=True)
class KvShape:
    layers: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int

    @property
    def bytes_per_token(self) -> int:
        """K and V of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


def kv_shape(model: Path, cache_dtype: str = "auto", layers: int | None = None) -> KvShape:
    """From a model folder's config.json."""
    path = model / "config.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from None
    data = data.get("text_config") or data
    dtype = cache_dtype if cache_dtype != "auto" else str(data.get("dtype") or data.get("torch_dtype") or "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"{path}: cache type {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    try:
        heads = int(data["num_attention_heads"])
        return KvShape(
            layers=int(data["num_hidden_layers"]) if layers is None else layers,
            kv_heads=int(data.get("num_key_value_heads") or heads),
            head_dim=int(data.get("head_dim") or data["hidden_size"] // heads),
            dtype_bytes=DTYPE_BYTES[dtype],
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptFileError(f"{path} does not give the attention shape: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Steps:
    """What a window's requests went through, added up over requests."""

    prompts: int  # tokens of prompts
    first: int  # prefills: one a request
    rounds: int
    plain: int  # decode steps without a draft

    @property
    def all(self) -> int:
        return self.first + self.rounds + self.plain


def steps(results: Sequence[BatchResult], counted: Counters) -> Steps:
    """A round emits its accepted tokens and one more, a plain step one; the prefill gave the first. The end of a
    request cuts tokens off its last round, so a request's plain steps are what its rounds do not explain."""
    requests = [request for batch in results for request in batch.requests]
    known = [
        (len(r.token_ids), r.rounds, r.accepted) for r in requests if r.rounds is not None and r.accepted is not None
    ]
    if len(known) == len(requests):
        plain = sum(max(0, tokens - 1 - rounds - accepted) for tokens, rounds, accepted in known)
    else:
        tokens = sum(len(request.token_ids) for request in requests)
        plain = max(0, tokens - len(requests) - counted.rounds - counted.accepted)
    return Steps(sum(request.prompt_tokens for request in requests), len(requests), counted.rounds, plain)


def target_rows(seen: Steps, counted: Counters) -> int:
    """Prompts, every verified draft, and the token that each decode step starts from."""
    return seen.prompts + counted.verified + seen.rounds + seen.plain


def draft_rows(seen: Steps, counted: Counters, drafted: int) -> int:
    """Of an EAGLE-like drafter: a step's first forward sees what the target keeps, each draft after it adds a row."""
    return target_rows(seen, counted) - (counted.verified - counted.accepted) + drafted - seen.all


def contradiction(store_bytes: float, analytic: float, tolerance: float = STORE_TOLERANCE) -> str:
    """Why counted stores and arithmetic cannot both be right, or nothing. Counters that disagree invalidate the run."""
    if analytic <= 0 or abs(store_bytes / analytic - 1) <= tolerance:
        return ""
    return f"kernels stored {store_bytes:.0f} bytes where the model's shape says {analytic:.0f}"


class ContradictionError(NworError):
    """Counted and expected bytes of a baseline that cannot both be right: the run proves nothing about bytes."""
