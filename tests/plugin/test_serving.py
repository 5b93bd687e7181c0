"""The OpenAI server, switched on by `--additional-config` alone: same answers, metrics served, control guarded."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib import metadata

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOKEN = "a-token-for-this-test-only"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
EXTRAS = [
    {},
    {"logprobs": 2},
    {},
    {"structured_outputs": {"json": SCHEMA}},
    {},
    {"stop": ["e", "\n"]},
    {"presence_penalty": 1.0},
    {"structured_outputs": {"regex": "[a-d]{3,9}"}},
]


API_SERVER = ["vllm.entrypoints.openai.api_server", "--model"]
SERVE = ["vllm.entrypoints.cli.main", "serve"]  # what the command `vllm serve` runs


@contextmanager
def server(folder, *flags, program=API_SERVER, **environ):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", *program, str(folder), "--served-model-name", "m", "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
        "--max-num-seqs", "16", *flags,
    ]  # fmt: skip
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environ
    said = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, after the server that writes to it
    process = subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 900
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                said.seek(0)
                pytest.fail(said.read().decode()[-3000:])
            try:
                fetch(f"{base}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield base
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        said.close()


def fetch(url, body=None, token=None):
    request = urllib.request.Request(url, data=None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read().decode()


def status(url, body=None, token=None):
    try:
        fetch(url, body, token)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
    return 200, ""


def ask(base, prompts):
    def one(index):
        body = {"model": "m", "prompt": prompts[index], "temperature": 0, "max_tokens": 24}
        choice = json.loads(fetch(f"{base}/v1/completions", body | EXTRAS[index % len(EXTRAS)]))["choices"][0]
        tokens = choice["logprobs"]["tokens"] if choice["logprobs"] else None
        return choice["text"], choice["finish_reason"], tokens

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, range(len(prompts))))


def scrape(base):
    """Our samples by name and engine; those with more labels are here by their names only."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(fetch(f"{base}/metrics"))
        for sample in family.samples
        if sample.name.startswith("nwor_")
    }


@pytest.fixture(scope="module")
def pair():
    from transformers import AutoTokenizer

    from nwor_vllm import zoo

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("target"))
    chats = [[{"role": "user", "content": row["prompt"]}] for row in zoo.prompts("all", 64, seed=5)]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return zoo.path("target"), zoo.path("eagle"), prompts


@pytest.fixture(scope="module")
def truth(pair):
    """The answers of a server that does not speculate."""
    with server(pair[0]) as base:
        answers = ask(base, pair[2])
    assert len({text for text, _, _ in answers}) > 30
    return answers


def switched_on(drafter, **settings):
    speculative = {"method": "eagle", "model": str(drafter), "num_speculative_tokens": 5}
    on = {"nwor": settings}
    return "--speculative-config", json.dumps(speculative), "--additional-config", json.dumps(on)


def test_sixty_four_requests_of_all_kinds(pair, truth):
    from nwor_vllm.plugin.metrics import NAMES

    target, drafter, prompts = pair
    flags = switched_on(drafter, control_endpoint=True, early_exit={"threshold": 0.2})
    with server(target, *flags, VLLM_PLUGINS="nwor", NWOR_CONTROL_TOKEN=TOKEN) as base:
        assert ask(base, prompts) == truth
        assert status(f"{base}/nwor", {}) == (401, "send NWOR_CONTROL_TOKEN as a bearer token")
        assert status(f"{base}/nwor", {}, "wrong")[0] == 401
        code, words = status(f"{base}/nwor", {"policy": "fixd"}, TOKEN)
        assert (code, words) == (400, "unknown policy 'fixd'; did you mean 'fixed'?")
        assert status(f"{base}/nwor", [1], TOKEN)[0] == 400
        code, words = status(f"{base}/nwor", {"early_exit": {"threshold": 2}}, TOKEN)
        assert (code, words) == (400, "early_exit.threshold is 2.0; expected a number in 0..1")
        assert status(f"{base}/nwor", "{", TOKEN)[1].startswith("the body is '{'; expected an object")
        assert status(f"{base}/nwor", {"restore": [1]}, TOKEN)[0] == 400
        text = fetch(f"{base}/metrics")
        for value in ("cost_error", "guard_trips", "rate_tokens_per_s"):
            assert f'nwor_policy{{engine="0",policy="goodput",value="{value}"}} ' in text
        told = {"temperature": 0, "max_tokens": 8, "vllm_xargs": {"nwor_kind": "code"}}
        fetch(f"{base}/v1/completions", {"model": "m", "prompt": prompts[0]} | told)
        assert set(json.loads(fetch(f"{base}/nwor", token=TOKEN))["policy"]["slots"]["kinds"]) == {
            "", "greedy", "code greedy",
        }  # fmt: skip
        fixed = {"policy": "fixed", "policy_params": {"k": 2}, "early_exit": {"threshold": 0.0}}
        for change in (fixed, {"policy": "off"}):
            fetch(f"{base}/nwor", change, TOKEN)
            assert ask(base, prompts) == truth
        time.sleep(1.1)
        ask(base, prompts[:1])
        found = json.loads(fetch(f"{base}/nwor", token=TOKEN))["counters"]
        served = scrape(base)
        assert set(served) == {(name, "0") for name in NAMES}
        for name in ("steps", "accepted_tokens"):  # nothing is held back once the last request is answered
            assert 0 < served[f"nwor_{name}_total", "0"] == found[name]


def test_data_parallel_ranks_of_a_dense_model_plan_for_themselves(pair, truth, tmp_path):
    """`vllm serve` answers from as many API servers as there are ranks: each serves the numbers of both."""
    target, drafter, prompts = pair
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:  # the CPU build has another name, which the command does not know
        folder = tmp_path / "vllm-0+cpu.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(tmp_path)}
    with server(target, *switched_on(drafter), "--data-parallel-size", "2", program=SERVE, **ranks) as base:
        for _ in range(2):
            assert ask(base, prompts) == truth
            time.sleep(1.1)
        ask(base, prompts[:8])
        served = scrape(base)
    assert served["nwor_accepted_tokens_total", "0"] > 0
    assert served["nwor_accepted_tokens_total", "1"] > 0
