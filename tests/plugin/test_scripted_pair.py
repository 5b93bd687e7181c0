"""A scripted pair served by configuration alone, with a scheduler and worker extension of the user's own in the engine.

Its acceptance is programmed and its drafter unsure exactly where it errs: every count is known beforehand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from nwor_vllm.zoo.script_marks import parse_class
from nwor_vllm.zoo.script_shape import Shape
from nwor_vllm.zoo.scripted import write_scripted

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

K, TOKENS = 5, 60
SHAPE = Shape(hidden=192, layers=2, heads=6, kv_heads=2, ffn=384, vocab=8192)
RULES = {
    "fixed": {"policy": "fixed", "early_exit": {"threshold": 0.0}},
    "early exit": {"policy": "fixed", "early_exit": {"threshold": 0.6}},
    "short": {"policy": "fixed", "policy_params": {"k": 2}, "early_exit": {"threshold": 0.0}},
    "adaptive": {"policy": "goodput"},
    "off": {"policy": "off"},
}
PROGRAM = """
    import json, sys

    def main():
        import vllm
        from nwor_vllm.plugin import control

        target, drafter, prompts, rules, tokens, k = json.loads(sys.argv[1])
        llm = vllm.LLM(
            target, load_format="scripted", worker_extension_cls="nwor_vllm.zoo.script_loader.ScriptedWorker",
            scheduler_cls="users_own.Theirs", additional_config={"nwor": {}},
            speculative_config={"method": "eagle", "model": drafter, "num_speculative_tokens": k},
            dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
            disable_log_stats=False, per_request_spec_decode_metrics="detailed",
        )
        params = vllm.SamplingParams(temperature=0.0, max_tokens=tokens)
        rows = [{"prompt_token_ids": p} for p in prompts]
        found = {}
        for name, rule in rules.items():
            control.apply(llm, {**rule, "reset": True})
            outputs = [o.outputs[0] for o in llm.generate(rows, params, use_tqdm=False)]
            found[name] = {
                "outputs": [list(o.token_ids) for o in outputs],
                "requests": [o.spec_decode_metrics.to_dict() for o in outputs],
                "counters": control.snapshot(llm)["counters"],
            }
        print("RESULT" + json.dumps([found, control.workers(llm)]))

    if __name__ == "__main__":
        main()
"""
USERS_OWN = """
    from pathlib import Path
    from vllm.v1.core.sched.scheduler import Scheduler

    class Theirs(Scheduler):
        def schedule(self, *args, **kwargs):
            Path(__file__).with_name("scheduled").touch()
            return super().schedule(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(what is expected, what each rule gave, the workers' own counts)."""
    folder = tmp_path_factory.mktemp("scripted")
    classes = [parse_class(text) for text in ("falling=0.9,0.7,0.5,0.3,0.2", "flat=0.3")]
    pair = write_scripted(folder / "pair", SHAPE, classes, weights=False)
    assert not list(pair.path.rglob("*.safetensors"))
    prompts = [pair.prompt(name, i) for i in range(8) for name in ("falling", "flat")]
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    (folder / "users_own.py").write_text(textwrap.dedent(USERS_OWN))
    argument = json.dumps([str(pair.target), str(pair.drafter), prompts, RULES, TOKENS, K])
    done = subprocess.run(
        [sys.executable, str(folder / "program.py"), argument],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(folder)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, (done.stdout + done.stderr)[-3000:]
    assert (folder / "scheduled").exists()
    found, workers = json.loads(lines[-1].removeprefix("RESULT"))
    return pair, prompts, found, workers


def test_every_rule_writes_what_the_pair_is_programmed_to(served):
    pair, prompts, found, workers = served
    expected = [pair.expected_output(prompt, TOKENS) for prompt in prompts]
    for name in RULES:
        assert found[name]["outputs"] == expected, name
    assert [worker["runner"] for worker in workers] == ["ElasticCPUModelRunner"]


@pytest.mark.parametrize(("name", "k"), [("fixed", K), ("short", 2)])
def test_rounds_of_a_fixed_length_are_the_programmed_ones(served, name, k):
    pair, prompts, found, _ = served
    rounds = [pair.expected_rounds(prompt, TOKENS, k) for prompt in prompts]
    assert [request["per_step_accepted"] for request in found[name]["requests"]] == rounds
    assert found[name]["counters"]["accepted_tokens"] == sum(map(sum, rounds))
    assert found[name]["counters"]["rounds"] == sum(map(len, rounds))


def test_early_exit_ends_every_draft_where_it_errs(served):
    """No draft token that is verified is rejected, and no round is shorter than it could be."""
    pair, prompts, found, _ = served
    cut = found["early exit"]
    counters = cut["counters"]
    assert counters["verified_tokens"] == counters["accepted_tokens"] == found["fixed"]["counters"]["accepted_tokens"]
    assert counters["tokens_stopped_by_confidence"] > 0 and counters["target_kv_bytes_avoided"] > 0
    for request, prompt in zip(cut["requests"], prompts, strict=True):
        # vLLM counts no round for a step without a draft token.
        rounds = [n for n in pair.expected_rounds(prompt, TOKENS, K) if n]
        assert request["per_step_accepted"] == request["per_step_drafted"] == rounds


def test_what_outputs_carry_adds_up_to_the_counters(served):
    for name, row in served[2].items():
        drafted = sum(request["num_draft_tokens"] for request in row["requests"])
        accepted = sum(request["num_accepted_draft_tokens"] for request in row["requests"])
        assert (drafted, accepted) == (row["counters"]["verified_tokens"], row["counters"]["accepted_tokens"]), name
    assert served[2]["off"]["counters"]["drafted_tokens"] == 0
    assert served[2]["adaptive"]["counters"]["accepted_tokens"] > 0
