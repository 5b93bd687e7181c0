"""vLLM's CPU build expands per-request temperatures, top-k and top-p to draft rows in a copy, and drops the copy.

The C++ routine takes int64 only, so other types are cast first; the rows that come back to the sampler were never
written. Speculative sampling above temperature 0 is then wrong by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nwor_vllm.plugin import compat


def is_wrong(stock: Callable[..., Any]) -> bool:
    """Run `stock` on a float row and on an int32 row, and see whether anything was written.

    The routine is in every build; the operator that it calls is the CPU's alone, and nothing calls it elsewhere.
    """
    for dtype in (torch.float32, torch.int32):
        given = torch.tensor([3, 5], dtype=dtype)
        output = torch.full((3,), -7, dtype=dtype)
        try:
            stock(output, given, torch.tensor([1, 3], dtype=torch.int32), 3, 1, 128)
        except AttributeError:
            return False
        if output.tolist() != [1, 5, 5]:
            return True
    return False


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """output[i] = the value of the request that token i belongs to, with `replace_from` read as `replace_to`."""
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.repeat_interleave(counts))


def adapt(stock: Callable[..., Any]) -> Callable[..., Any]:
    compat.load_operators()
    return expand if is_wrong(stock) else stock
