"""Training batches as a pure function of (stage, step): a killed run resumes on the data it would have seen."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nwor_vllm.zoo.chats import training_chat
from nwor_vllm.zoo.tokenizer import encode_chat

ROWS = 8
LENGTH = 512


def batch(tokenizer: Tokenizer, stage: str, step: int, rows: int = ROWS, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Ids and loss weights, [rows, length]. Every row opens with a whole chat; the last one is cut."""
    rng = random.Random(f"zoo:{stage}:{step}")
    all_ids, all_weights = [], []
    for _ in range(rows):
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            chat_ids, chat_weights = encode_chat(tokenizer, training_chat(rng))
            ids += chat_ids
            weights += chat_weights
        all_ids.append(ids[:length])
        all_weights.append(weights[:length])
    return torch.tensor(all_ids), torch.tensor(all_weights)


def frequent_ids(tokenizer: Tokenizer, count: int) -> Tensor:
    """The draft vocabulary of EAGLE-3: special tokens first, then by frequency, in ascending order."""
    seen = torch.zeros(tokenizer.get_vocab_size())
    for step in range(25):
        ids, weights = batch(tokenizer, "frequencies", step)
        seen.scatter_add_(0, ids.flatten(), weights.flatten())
    seen[:3] = torch.inf
    return seen.topk(count).indices.sort().values
