"""Elastic speculative decoding on stock vLLM. Importing this loads neither torch nor vllm."""

__version__ = "0.1.0"
