"""The generator is seeded, its prompts are not its training data, and its domains differ in entropy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zlib

import pytest

from nwor_vllm.bench.cli import main
from nwor_vllm.errors import ConfigError
from nwor_vllm.zoo import DOMAINS, prompts
from nwor_vllm.zoo.chats import make_chat, training_chat


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompts_are_the_same_in_another_process(domain):
    code = f"import json; from nwor_vllm.zoo import prompts; print(json.dumps(prompts({domain!r}, 3, 5)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == prompts(domain, 3, 5)


def test_a_longer_list_begins_with_the_shorter_one_and_seeds_differ():
    assert prompts("chat", 9, 1)[:4] == prompts("chat", 4, 1)
    assert [row["prompt"] for row in prompts("chat", 4, 1)] != [row["prompt"] for row in prompts("chat", 4, 2)]


def test_all_goes_round_the_domains_with_unique_ids():
    rows = prompts("all", 24, 1)
    assert [row["domain"] for row in rows] == list(DOMAINS) * 3
    assert len({row["id"] for row in rows}) == 24


def test_summary_replies_copy_from_the_prompt():
    chat = make_chat("summary", random.Random(1))
    for sentence in chat.reply.removeprefix("In short: ").split(". "):
        assert sentence.rstrip(".") in chat.user


def test_json_replies_are_json_and_sums_are_right():
    rng = random.Random(2)
    for _ in range(20):
        assert len(json.loads(make_chat("json", rng).reply)) in (2, 3)
        chat = make_chat("arithmetic", rng)
        numbers = [int(part) for part in chat.user.split(": ")[1].split(" + ")]
        assert chat.reply.endswith(f"The sum is {sum(numbers)}.")


def test_code_compresses_far_better_than_translation():
    def ratio(domain: str) -> float:
        rng = random.Random(3)
        text = "\n".join(make_chat(domain, rng).reply for _ in range(50)).encode()
        return len(zlib.compress(text, 9)) / len(text)

    assert ratio("code") < 0.15
    assert ratio("translation") > 2 * ratio("code")


def test_training_covers_every_domain():
    rng = random.Random(4)
    assert {training_chat(rng).domain for _ in range(200)} == set(DOMAINS)


def test_an_unknown_domain_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'translation'"):
        prompts("translations", 1, 1)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        prompts("code", 0, 1)


def test_the_command_prints_json_lines(capsys):
    assert main(["zoo", "prompts", "--domain", "code", "-n", "2", "--seed", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == prompts("code", 2, 1)


def test_importing_the_zoo_is_light():
    heavy = {"torch", "transformers", "vllm", "tokenizers"}
    code = f"import sys, nwor_vllm.zoo; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
