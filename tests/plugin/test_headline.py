"""What elastic drafting saves against a fixed length of ten, in counts: the machine's speed plays no part.

Steps cost what MEASURING expects of an 8B target and its EAGLE head on one H200; the pair, its drafts and its
acceptance are real.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm

K, REQUESTS, CONCURRENCY, MAX_TOKENS = 10, 40, 8, 64
FIXED = {"policy": "fixed", "early_exit": {"policy_rule": False}}
ELASTIC = {"policy": "goodput", "early_exit": {"policy_rule": True}}


def step_seconds(step):
    """Weights are read once up to 64 rows; a draft step reads the head and the language model's."""
    return 1e-3 * (3.5 + 0.36 * step.draft_steps + 0.016 * step.requests + 0.006 * max(step.verified_tokens - 64, 0))


@pytest.fixture(scope="module")
def engine():
    from nwor_vllm import zoo
    from nwor_vllm.bench.backends import vllm as backend

    drafter = {"method": "eagle", "model": str(zoo.path("eagle")), "num_speculative_tokens": K}
    settings = {
        "max_model_len": 512,
        "max_num_seqs": CONCURRENCY,
        "async_scheduling": False,
        "disable_log_stats": False,
    }
    with backend.engine(zoo.path("target"), drafter, **settings) as llm:
        yield llm


def answered(llm, domain, seed, requests=REQUESTS):
    """Counts of a domain's prompts, `CONCURRENCY` at a time."""
    from transformers import AutoTokenizer

    from nwor_vllm import zoo
    from nwor_vllm.bench.backends import vllm as backend
    from nwor_vllm.plugin import control

    tokenizer = AutoTokenizer.from_pretrained(str(zoo.path("target")))
    control.apply(llm, {"reset": True})
    rows = []
    for row in zoo.prompts(domain, requests, seed=seed):
        chat = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rows.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    outputs = []
    for start in range(0, len(rows), CONCURRENCY):
        batch = rows[start : start + CONCURRENCY]
        outputs += backend.generate(llm, batch, temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=False)
    return backend.counters(llm), outputs


def test_long_drafts_where_they_are_kept_and_short_ones_elsewhere(engine):
    from nwor_vllm import zoo
    from nwor_vllm.bench.backends import vllm as backend

    backend.switch(engine, FIXED)
    per_round = {}
    for domain in zoo.DOMAINS:
        counts, _ = answered(engine, domain, seed=3, requests=CONCURRENCY)
        per_round[domain] = counts["accepted_tokens"] / counts["rounds"]
    hardest = min(per_round, key=per_round.get)
    ratios = {}
    for domain in (hardest, "code"):
        backend.switch(engine, FIXED)
        fixed, expected = answered(engine, domain, seed=11)
        backend.switch(engine, ELASTIC)
        backend.price(engine, step_seconds)
        answered(engine, domain, seed=7)  # what it learns first is not judged
        elastic, outputs = answered(engine, domain, seed=11)
        assert outputs == expected
        names = ("draft_forwards", "verified_tokens")
        ratios[domain] = {name: elastic[name] / fixed[name] for name in names}
        kept = [counts["accepted_tokens"] / counts["steps"] for counts in (elastic, fixed)]
        ratios[domain]["accepted per step"] = kept[0] / kept[1]
    print(f"\naccepted per round at a fixed {K}: { {d: round(n, 2) for d, n in per_round.items()} }")
    print({d: {name: round(r, 3) for name, r in row.items()} for d, row in ratios.items()}, flush=True)
    assert ratios[hardest]["draft_forwards"] < 0.6
    assert ratios[hardest]["verified_tokens"] < 0.6
    assert ratios["code"]["accepted per step"] > 0.9
