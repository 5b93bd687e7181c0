"""Elastic speculative decoding on stock vLLM. Importing this loads neither torch nor vllm."""

import os

__version__ = "0.1.0"

# Python started in a checkout's root finds this folder before the installed package, and kernels/ lies beside it.
_root = __path__[0].rpartition("/")[0]
if not os.path.isdir(f"{__path__[0]}/kernels") and os.path.isfile(f"{_root}/kernels/dispatch.py"):
    __path__.append(_root)
