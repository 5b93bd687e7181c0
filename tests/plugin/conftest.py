"""A random pair for the plugin's tests: half of its drafts are right, and its drafter is sometimes sure."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(target, draft model) folders; 512 tokens."""
    from nwor_vllm.bench import tiny_pair

    shape = tiny_pair.Shape(sharpness=0.25, noise=0.02)
    return tiny_pair.build(tmp_path_factory.mktemp("tiny"), shape)


@pytest.fixture(scope="session")
def speculation(tiny):
    return {"method": "draft_model", "model": str(tiny[1]), "num_speculative_tokens": 5}


@pytest.fixture(scope="session")
def token_prompts():
    rng = random.Random(3)
    return [tuple(rng.randrange(2, 512) for _ in range(rng.randrange(4, 60))) for _ in range(16)]


@pytest.fixture(scope="session")
def engine_settings():
    return {"max_model_len": 256, "max_num_seqs": 6, "disable_log_stats": False, "async_scheduling": False}
