"""Byte-level BPE with a ChatML-like template. Byte-level because a word-level vocabulary breaks structured output."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nwor_vllm.zoo.chats import DOMAINS, Chat, make_chat

VOCAB_SIZE = 1536
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _corpus(chats_per_domain: int) -> Iterator[str]:
    rng = random.Random("zoo:tokenizer")
    for _ in range(chats_per_domain):
        for domain in DOMAINS:
            chat = make_chat(domain, rng)
            yield f"user\n{chat.user}"
            yield f"assistant\n{chat.reply}"


def train_tokenizer(chats_per_domain: int = 1500) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one (sums need it), indentation apart from the word that follows, then bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n *"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(chats_per_domain), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[float]]:
    """Token ids and loss weights: the reply is what is learnt, the rest keeps the text around it sane."""
    user, newline, role, reply = (
        encoding.ids for encoding in tokenizer.encode_batch([f"user\n{chat.user}", "\n", "assistant\n", chat.reply])
    )
    before = [START_ID, *user, END_ID, *newline, START_ID, *role]
    after = [*reply, END_ID]
    ids = before + after + newline
    return ids, [0.1] * len(before) + [1.0] * len(after) + [0.1] * len(newline)
