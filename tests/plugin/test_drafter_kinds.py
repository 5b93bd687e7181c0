"""Drafters that the zoo has none of, on the V1 runner: an MTP module, and a draft model with its own vocabulary."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nwor_vllm import zoo
from nwor_vllm.bench import tiny_pair

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RULES = [
    {"policy": "fixed", "early_exit": {"threshold": 0.0, "min_survival": 0.0}},
    {"policy": "fixed", "early_exit": {"threshold": 0.2}},
    {"policy": "off"},
    {"policy": "goodput", "early_exit": {"threshold": 0.05, "min_survival": 0.0}},
]
ASK = {"temperature": 0.0, "max_tokens": 32}
SMALL = {"max_model_len": 256, "max_num_seqs": 6, "max_num_batched_tokens": 64}


def mtp_pair(folder, noise=0.05):
    """A one-layer MiMo whose MTP module is that layer again, with noise: it sees the token, not what came before."""
    shape = tiny_pair.Shape(layers=1, sharpness=0.25)
    h = shape.hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = tiny_pair.weights_of(shape)
        rows = weights["model.embed_tokens.weight"]
        rows *= rows.pow(2).mean(dim=1, keepdim=True).rsqrt()  # of unit scale, so that the module's norm keeps them
        for name in ("q_proj", "k_proj", "v_proj"):
            width = weights[f"model.layers.0.self_attn.{name}.weight"].shape[0]
            weights[f"model.layers.0.self_attn.{name}.bias"] = torch.zeros(width)
        layer = {n.partition("layers.0.")[2]: w for n, w in weights.items() if "layers.0." in n}
        module = {name: w + torch.randn_like(w) * noise * w.abs().mean() for name, w in layer.items()}
    module["input_proj.weight"] = torch.cat([torch.zeros(h, h), torch.eye(h)], dim=1)
    module |= {f"{name}_layernorm.weight": torch.ones(h) for name in ("token", "hidden", "final")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        weights | {f"model.mtp_layers.0.{name}": w.contiguous() for name, w in module.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    kind = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(shape.config() | kind))
    return folder


def other_vocabulary(drafter, folder):
    """The same draft model, its tokens renumbered."""
    shutil.copytree(drafter, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    old = [i for i in vocab.values() if i not in special]
    new = dict(zip(old, random.Random(0).sample(old, len(old)), strict=True))
    tokenizer["model"]["vocab"] = {token: new.get(i, i) for token, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(drafter / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            rows = weights[name].clone()
            rows[list(new.values())] = weights[name][list(new)]
            weights[name] = rows
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(target, speculative, prompts, **settings):
    from nwor_vllm.bench.backends import vllm as backend

    with backend.engine(target, None, async_scheduling=False, **SMALL) as llm:
        truth = backend.generate(llm, prompts, **ASK)
    counts = []
    with backend.engine(target, speculative | {"num_speculative_tokens": 5}, **SMALL, **settings) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        for rule in RULES:
            backend.switch(llm, rule)
            assert backend.generate(llm, prompts, **ASK) == truth, rule
            counts.append(backend.counters(llm))
    whole, cut, off, _ = counts
    assert whole["accepted_tokens"] > 0
    assert cut["tokens_stopped_by_confidence"] > 0 and cut["draft_forwards_saved"] > 0
    assert cut["accepted_tokens"] / cut["verified_tokens"] > whole["accepted_tokens"] / whole["verified_tokens"]
    assert off["drafted_tokens"] == 0
    return runner, off


def test_an_mtp_module(tmp_path):
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(2, 512) for _ in range(rng.randrange(4, 60))) for _ in range(12)]
    runner, off = check(mtp_pair(tmp_path / "mtp"), {"method": "mtp"}, prompts, async_scheduling=True)
    assert runner.drafter.method == "mtp"
    assert off["draft_forwards"] < off["steps"]


def test_a_draft_model_with_its_own_vocabulary(tmp_path):
    from transformers import AutoTokenizer

    target = zoo.path("target")
    tokenizer = AutoTokenizer.from_pretrained(target)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in zoo.prompts("all", 6, seed=5)]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    prompts = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    speculative = {"method": "draft_model", "use_heterogeneous_vocab": True}
    drafter = other_vocabulary(zoo.path("draft"), tmp_path / "draft")
    settings = {"skip_tokenizer_init": False, "async_scheduling": False}
    runner, _ = check(target, speculative | {"model": str(drafter)}, prompts, **settings)
    mapping = runner.drafter.vocab_mapping
    assert mapping.intersection_size > 1400 and int((mapping.draft_to_target_ids.diff() == 1).sum()) < 50


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_drafts_drawn_from_no_distribution(tiny, speculation, token_prompts, asynchronous, monkeypatch):
    """With top_k = 1 there is one right token. Stock vLLM lets the drafter's NaN into what the target samples from."""
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import drafter_v1

    def broken(hidden):
        logits = stock(hidden).clone()
        logits[::2, 3] = float("nan")
        return logits

    sampled = {"temperature": 1.0, "top_k": 1, "max_tokens": 24}
    with backend.engine(tiny[0], None, **SMALL, async_scheduling=False) as llm:
        truth = backend.generate(llm, token_prompts, **sampled)
    drawn = speculation | {"draft_sample_method": "probabilistic"}
    with backend.engine(tiny[0], drawn, **SMALL, async_scheduling=asynchronous) as llm:
        drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
        stock = drafter.model.compute_logits
        drafter.model.compute_logits = broken
        for rule in RULES:
            backend.switch(llm, rule)
            assert backend.generate(llm, token_prompts, **sampled) == truth, rule
        monkeypatch.setattr(drafter_v1, "make_certain", lambda tokens, probs: None)
        backend.switch(llm, RULES[0])
        assert backend.generate(llm, token_prompts, **sampled) != truth
