"""The glue to stock vLLM."""

from __future__ import annotations


def register() -> None:
    """vLLM calls this in every process, more than once. It loads neither torch nor vllm."""
