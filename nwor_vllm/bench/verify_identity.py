"""Token identity at temperature 0: every drafter, scheduler and scene under every rule, against no speculation."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.bench.verify_journal import Check, Journal
from nwor_vllm.errors import ConfigError, MissingError

Tokens = tuple[int, ...]

DRAFTERS = ("draft_model", "eagle", "eagle3")
RULES: dict[str, dict[str, Any]] = {
    "adaptive": {"policy": "goodput", "early_exit": {"threshold": 0.0, "min_survival": 0.0}, "per_request": False},
    "early exit": {"policy": "fixed", "early_exit": {"threshold": 0.3, "min_survival": 0.0}},
    "both": {"policy": "goodput", "early_exit": {"threshold": 0.1, "min_survival": 0.05}, "per_request": False},
    "per request": {"policy": "goodput", "early_exit": {"threshold": 0.0, "min_survival": 0.0}, "per_request": True},
}
SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked prefill": {"max_num_batched_tokens": 48},
    "prefix cache": {"enable_prefix_caching": True},
    "preemption": {"num_gpu_blocks_override": 9},
}
PLANTED = "planted: first draft unverified"
K, REQUESTS = 5, 12
MAX_TOKENS, INTERPRETED_MAX_TOKENS = 32, 16  # a step of interpreted kernels takes a tenth of a second
COUNTS = ("drafted_tokens", "verified_tokens", "accepted_tokens", "draft_forwards", "tokens_stopped_by_confidence")
REFUSALS = (ValueError, NotImplementedError, ConfigError)  # what engines raise of configurations, not of crashes


@dataclass(frozen=True)
class Pair:
    target: Path
    drafters: Mapping[str, Path]
    vocab: int
    embedded: bool = False


@dataclass(frozen=True)
class Combination:
    drafter: str
    asynchronous: bool
    scene: str


def pair_of(target: Path | None, given: Sequence[str]) -> Pair:
    if target is None:
        from nwor_vllm import zoo

        paths = {"draft_model": zoo.path("draft"), "eagle": zoo.path("eagle"), "eagle3": zoo.path("eagle3")}
        return Pair(zoo.path("target"), paths, _vocab(zoo.path("target")), embedded=True)
    drafters = {}
    for text in given:
        method, _, folder = text.partition("=")
        if method not in DRAFTERS or not folder:
            raise ConfigError(f"--drafter is {text!r}; expected METHOD=DIR with METHOD one of {', '.join(DRAFTERS)}")
        drafters[method] = Path(folder)
    if not drafters:
        raise ConfigError("--target needs at least one --drafter METHOD=DIR")
    return Pair(target, drafters, _vocab(target))


def _vocab(target: Path) -> int:
    try:
        return int(json.loads((target / "config.json").read_text())["vocab_size"])
    except (OSError, KeyError, ValueError) as error:
        raise MissingError(f"{target} is no model folder: {error}; expected a config.json with vocab_size") from error


def combinations(engines: int | None, seed: int) -> list[Combination]:
    """All of them, or a sample: 4 meet every drafter, scheduler and scene, 6 every drafter under both schedulers."""
    everything = [Combination(*c) for c in itertools.product(DRAFTERS, (False, True), SCENES)]
    if engines is None or engines >= len(everything):
        return everything
    rng = random.Random(seed)
    drafters, scenes = rng.sample(DRAFTERS, len(DRAFTERS)), rng.sample(list(SCENES), len(SCENES))
    order = ((drafters[i % 3], bool(i % 2), scenes[(i + i // 4) % 4]) for i in itertools.count())
    found: dict[Combination, None] = {}
    while len(found) < engines:
        found[Combination(*next(order))] = None
    return list(found)


def prompts_of(pair: Pair) -> list[Tokens]:
    return chats(pair.target) if pair.embedded else random_prompts(pair.vocab)


def random_prompts(vocab: int, seed: int = 1) -> list[Tokens]:
    """Half of them share a beginning that fills whole cache blocks."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(2, vocab) for _ in range(48))
    rows = []
    for index in range(REQUESTS):
        own = tuple(rng.randrange(2, vocab) for _ in range(rng.randrange(4, 40)))
        rows.append(shared + own if index % 2 else own)
    return rows


def chats(target: Path) -> list[Tokens]:
    """What the embedded pair was trained for, from every domain; half of it behind a note that fills two cache
    blocks: with an EAGLE head vLLM does not use the last block it finds."""
    from transformers import AutoTokenizer

    from nwor_vllm import zoo

    tokenizer = AutoTokenizer.from_pretrained(str(target))
    texts = [row["prompt"] for row in zoo.prompts("all", REQUESTS, seed=3)]
    rows = []
    for index, text in enumerate(texts):
        said = texts[2:3] if index % 2 else []
        turns = [{"role": "user", "content": t} for t in (*said, text)]
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        rows.append(tuple(tokenizer(whole, add_special_tokens=False)["input_ids"]))
    return rows


def engine_settings(combination: Combination) -> dict[str, Any]:
    base = {"max_model_len": 256, "max_num_seqs": 6, "block_size": 32, "disable_log_stats": False}
    return base | {"async_scheduling": combination.asynchronous} | SCENES[combination.scene]


class _Proof:
    def __init__(self, runner: str, pair: Pair, journal: Journal) -> None:
        self.runner, self.pair, self.journal = runner, pair, journal
        self.prompts = prompts_of(pair)
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.ask = {"temperature": 0.0, "max_tokens": INTERPRETED_MAX_TOKENS if interpreted else MAX_TOKENS}
        self.truth: list[Tokens] = []

    def named(self, cell: Combination, rule: str, **result: Any) -> Check:
        place = {"drafter": cell.drafter, "asynchronous": cell.asynchronous, "scene": cell.scene}
        return Check(runner=self.runner, rule=rule, **place, **result)  # type: ignore[arg-type]

    def missing(self, cell: Combination, rules: Sequence[str]) -> list[str]:
        return [rule for rule in rules if self.named(cell, rule).name not in self.journal.checks]

    def learn_truth(self) -> None:
        from nwor_vllm.bench.backends import vllm as backend

        if not self.truth:
            with backend.engine(self.pair.target, None, **engine_settings(Combination("", False, "plain"))) as llm:
                self.truth = backend.generate(llm, self.prompts, **self.ask)

    def run(self, cell: Combination, rules: Sequence[str]) -> None:
        from nwor_vllm.bench.backends import vllm as backend

        drafter = {"method": cell.drafter, "model": str(self.pair.drafters[cell.drafter]), "num_speculative_tokens": K}
        start = next((RULES[rule] for rule in rules if rule != PLANTED), RULES["early exit"])
        settings = engine_settings(cell) | {"additional_config": {"nwor": start}}
        with contextlib.ExitStack() as stack:
            try:
                llm = stack.enter_context(backend.engine(self.pair.target, drafter, **settings))
                backend.demand(llm, self.runner, cell.asynchronous)
            except REFUSALS as error:
                reason = " ".join(str(error).split())
                for rule in rules:
                    self.journal.add(self.named(cell, rule, refused=reason))
                return
            for rule in rules:
                if rule == PLANTED:
                    self.journal.add(self.planted(llm, cell))
                else:
                    backend.switch(llm, {} if RULES[rule] is start else RULES[rule])
                    self.journal.add(self.honest(llm, cell, rule))

    def planted(self, llm: Any, cell: Combination) -> Check:
        from nwor_vllm.bench.backends import vllm as backend

        backend.switch(llm, {"policy": "fixed", "early_exit": {"threshold": 0.0, "min_survival": 0.0}})
        with backend.keep_unverified():
            wrong = self.wrong(backend.generate(llm, self.prompts, **self.ask))
        return self.named(cell, PLANTED, planted=True, compared=len(self.prompts), differences=wrong, caught=wrong > 0)

    def honest(self, llm: Any, cell: Combination, rule: str) -> Check:
        from nwor_vllm.bench.backends import vllm as backend

        with _happening(llm, cell.scene, self.prompts) as seen:
            got = backend.generate(llm, self.prompts, **self.ask)
        counts = backend.counters(llm)
        found = {name: counts[name] for name in COUNTS} | seen
        met = found["verified_tokens"] > 0 and all(seen.values())
        wrong = self.wrong(got)
        return self.named(cell, rule, compared=len(got), differences=wrong, met=met, counts=found)

    def wrong(self, got: Sequence[Tokens]) -> int:
        return sum(a != b for a, b in zip(got, self.truth, strict=True))


@contextlib.contextmanager
def _happening(llm: Any, scene: str, prompts: Sequence[Tokens]) -> Iterator[dict[str, int]]:
    """How often what the scene is about happened in the block; empty for a plain one."""
    from nwor_vllm.bench.backends import vllm as backend

    counters = {"prefix cache": backend.prefix_hits, "preemption": backend.preemptions}
    seen: dict[str, int] = {}
    before = counters[scene](llm) if scene in counters else 0
    yield seen
    if scene in counters:
        seen[{"prefix cache": "prefix_hits", "preemption": "preemptions"}[scene]] = counters[scene](llm) - before
    elif scene == "chunked prefill":
        seen["prompts_in_chunks"] = sum(len(p) > SCENES[scene]["max_num_batched_tokens"] for p in prompts)


def rules_of(index: int) -> list[str]:
    """All rules. The first is what the engine starts with, by `additional_config`: another one than in the same scene
    of the drafter before."""
    names = list(RULES)
    first = (index + index // len(names)) % len(names)
    return names[first:] + names[:first]


def check(runner: str, pair: Pair, cells: Sequence[Combination], journal: Journal) -> None:
    proof = _Proof(runner, pair, journal)
    cells = [c for c in cells if c.drafter in pair.drafters]
    firsts = [next((c for c in cells if c.asynchronous is mode), None) for mode in (False, True)]
    rules = {cell: [*rules_of(index), *([PLANTED] if cell in firsts else [])] for index, cell in enumerate(cells)}
    journal.expect([proof.named(cell, rule).name for cell in cells for rule in rules[cell]])
    for cell in cells:
        if missing := proof.missing(cell, rules[cell]):
            proof.learn_truth()
            proof.run(cell, missing)
