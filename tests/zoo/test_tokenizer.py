"""Byte-level: whatever goes in comes out; built twice it is the same; the template agrees with the training data."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nwor_vllm import zoo
from nwor_vllm.zoo.chats import make_chat
from nwor_vllm.zoo.tokenizer import VOCAB_SIZE, encode_chat, train_tokenizer


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_file(str(zoo.path("target") / "tokenizer.json"))


@given(st.text(max_size=60))
def test_any_text_survives(text):
    tokenizer = Tokenizer.from_file(str(zoo.path("target") / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_built_again_it_is_the_one_that_ships(shipped):
    built = train_tokenizer()
    assert built.get_vocab_size() == VOCAB_SIZE
    assert built.to_str() == shipped.to_str()


@pytest.mark.parametrize("domain", zoo.DOMAINS)
def test_the_chat_template_gives_the_tokens_of_the_training_data(shipped, domain):
    from transformers import AutoTokenizer

    chat = make_chat(domain, random.Random(1))
    messages = [{"role": "user", "content": chat.user}, {"role": "assistant", "content": chat.reply}]
    rendered = AutoTokenizer.from_pretrained(zoo.path("target")).apply_chat_template(messages, tokenize=False)
    ids, weights = encode_chat(shipped, chat)
    assert shipped.encode(rendered).ids == ids
    assert sum(weight == 1.0 for weight in weights) == len(shipped.encode(chat.reply).ids) + 1
