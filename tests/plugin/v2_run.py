"""Runs V2 engines on CPU in this process and prints one JSON line per check. Started by test_v2.py, through
`python -m nwor_vllm.plugin.v2_interpreter`: the interpreter must be chosen before vLLM is imported."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from test_catch_up import decode
from transformers import AutoTokenizer

from nwor_vllm import zoo
from nwor_vllm.bench.backends import vllm as backend

K, MAX_TOKENS = 5, 16
ASK = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
SMALL = {"max_model_len": 192, "max_num_seqs": 4, "block_size": 32}
SCENES: dict[str, dict[str, Any]] = {
    "plain": {"enable_prefix_caching": False},
    "chunked prefill": {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
    "prefix cache": {"enable_prefix_caching": True},
    "preemption": {"num_gpu_blocks_override": 8},
}
RULES: dict[str, dict[str, Any]] = {
    "fixed": {"policy": "fixed", "policy_params": {"k": K}, "early_exit": {"threshold": 0.0, "min_survival": 0.0}},
    "early exit": {"policy": "fixed", "policy_params": {"k": K}, "early_exit": {"threshold": 0.4}},
    "zero": {"policy": "fixed", "policy_params": {"k": 0}, "early_exit": {"threshold": 0.0}},
    "adaptive": {"policy": "goodput", "per_request": False, "early_exit": {"threshold": 0.0}},
    "both": {"policy": "goodput", "per_request": True, "early_exit": {"threshold": 0.1, "min_survival": 0.05}},
}


def prompts_of(target: Path) -> list[tuple[int, ...]]:
    """Chats of unlike predictability; the last is the first again, so that a prefix cache has something to find."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    rows = []
    for domain in ("retrieval", "code", "creative", "arithmetic"):
        chat = [{"role": "user", "content": zoo.prompts(domain, 1)[0]["prompt"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rows.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return [*rows, rows[0]]


class Said(logging.Handler):
    """What the plugin logs while an engine starts."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("vllm.nwor")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(pair: dict[str, str], cells: list[list[Any]]) -> None:
    target = Path(pair["target"])
    prompts = prompts_of(target)
    with backend.engine(target, None, **SMALL) as llm:
        truth = backend.generate(llm, prompts, **ASK)
        kind = type(_runner(llm))
        print(json.dumps({"runner": kind.__name__, "module": kind.__module__}), flush=True)
    said = Said()  # after vLLM's own logging is set up, which takes the handlers of loggers below its own
    for drafter, asynchronous, scene, rules in cells:
        spec = {"method": drafter, "model": pair[drafter], "num_speculative_tokens": K}
        settings = SMALL | SCENES[scene] | {"async_scheduling": asynchronous, "disable_log_stats": False}
        said.lines.clear()
        with backend.engine(target, spec, **settings) as llm:
            for name in rules:
                cell = {"cell": [drafter, asynchronous, scene, name], "said": said.lines}
                print(json.dumps(_check(llm, name, prompts, truth) | cell), flush=True)


def _check(llm: Any, name: str, prompts: list[tuple[int, ...]], truth: list[tuple[int, ...]]) -> dict[str, Any]:
    runner = _runner(llm)
    if name == "planted":
        backend.switch(llm, RULES["fixed"])
        with backend.keep_unverified():
            return {"differences": _differ(backend.generate(llm, prompts, **ASK), truth)}
    if name == "pause":
        return _pause(llm, prompts)
    if name == "no number":
        return _no_number(llm, prompts, truth)
    backend.switch(llm, RULES[name])
    got = backend.generate(llm, prompts, **ASK)
    return {
        "differences": _differ(got, truth),
        "mode": runner.speculator.nwor_mode,
        "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
        "preemptions": backend.preemptions(llm),
        **backend.counters(llm),
    }


def _no_number(llm: Any, prompts: list[tuple[int, ...]], truth: list[tuple[int, ...]]) -> dict[str, Any]:
    """A drafter whose logits are NaN, watched and not."""
    model, differences = _runner(llm).speculator.model, 0
    stock, counts = model.compute_logits, []
    model.compute_logits = lambda hidden: stock(hidden) * float("nan")
    for rule in ("fixed", "early exit"):
        backend.switch(llm, RULES[rule])
        differences += _differ(backend.generate(llm, prompts, **ASK), truth)
        counts.append(backend.counters(llm)["verified_tokens"])
    model.compute_logits = stock
    return {"differences": differences, "unwatched": counts[0], "verified_tokens": counts[1]}


def _pause(llm: Any, prompts: list[tuple[int, ...]]) -> dict[str, Any]:
    """Drafting pauses, while prompts come too: the drafter fed afterwards, at every step, and not what it missed."""
    drafter, pauses, long = _runner(llm).speculator, [0, 1, *range(4, 14)], 26
    catch_up = drafter.nwor_catch_up
    tokens, counts = decode(llm, prompts, pauses, long)
    drafter.nwor_catch_up = None
    always_tokens, always = decode(llm, prompts, pauses, long)
    drafter.nwor_catch_up = catch_up
    replay = catch_up.replay
    catch_up.replay = lambda ids, batch: catch_up.forget(ids) or 0
    holes_tokens, holes = decode(llm, prompts, pauses, long)
    catch_up.replay = replay
    differences = _differ(tokens, always_tokens) + _differ(holes_tokens, always_tokens)
    return {"differences": differences, "left": len(catch_up.steps), "always": always, "holes": holes, **counts}


def _differ(got: list[tuple[int, ...]], truth: list[tuple[int, ...]]) -> int:
    return sum(a != b for a, b in zip(got, truth, strict=True))


def _runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
