"""Synthetic chats in eight domains whose predictability really differs. Standard library only, and seeded."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nwor_vllm.errors import ConfigError, unknown_key
from nwor_vllm.zoo import prose, structured

_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "code": structured.code,
    "chat": prose.chat,
    "summary": prose.summary,
    "retrieval": structured.retrieval,
    "translation": prose.translation,
    "arithmetic": structured.arithmetic,
    "creative": prose.creative,
    "json": structured.json_reply,
}
DOMAINS = tuple(_MAKERS)


@dataclass(frozen=True)
class Chat:
    """One user message and the reply the target is trained to give."""

    domain: str
    user: str
    reply: str


def make_chat(domain: str, rng: random.Random) -> Chat:
    if domain not in _MAKERS:
        raise unknown_key("domain", domain, DOMAINS)
    return Chat(domain, *_MAKERS[domain](rng))


def training_chat(rng: random.Random) -> Chat:
    return make_chat(rng.choice(DOMAINS), rng)


def prompts(domain: str, n: int, seed: int = 1) -> list[dict[str, str]]:
    """`n` user messages; the first of a longer list are those of a shorter one. `domain` may be `all` (round robin)."""
    if n < 1:
        raise ConfigError(f"number of prompts must be at least 1, got {n}")
    names = DOMAINS if domain == "all" else (domain,)
    if domain != "all" and domain not in _MAKERS:
        raise unknown_key("domain", domain, (*DOMAINS, "all"))
    # The word "prompts" in the seed keeps these streams apart from the training data's.
    streams = {name: random.Random(f"zoo:prompts:{seed}:{name}") for name in names}
    rows = []
    for index in range(n):
        name = names[index % len(names)]
        chat = make_chat(name, streams[name])
        rows.append({"id": f"{name}-{seed}-{index // len(names)}", "domain": name, "prompt": chat.user})
    return rows
