"""The embedded pair and scripted pairs. Importing this loads neither torch nor transformers."""

from __future__ import annotations

from nwor_vllm.zoo.chats import DOMAINS, prompts
from nwor_vllm.zoo.store import MEMBERS, path

__all__ = ["DOMAINS", "MEMBERS", "path", "prompts"]
