"""`nwor verify`: is the output the target's own? Token for token at temperature 0, in distribution above it.

Each check carries its negative control: a rule that is wrong, and must be noticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
K, MAX_TOKENS, REQUESTS = 5, 32, 12
RUNNERS = ("v1", "v2")
MIN_CONTROL_Z = 6.0
LIMIT_Z = 3.5


@dataclass
class Verdict:
    compared: int = 0
    differences: int = 0
    max_abs_z: float | None = None
    negative_control_caught: bool | None = None
    seconds: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        close = self.max_abs_z is None or self.max_abs_z < LIMIT_Z
        return self.compared > 0 and not self.differences and close and bool(self.negative_control_caught)


@dataclass(frozen=True)
class Pair:
    target: Path
    drafters: Mapping[str, Path]
    vocab: int
    embedded: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every combination, on both model runners")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 compares tokens, 1 compares distributions")
    parser.add_argument("--samples", type=int, default=20000, help="continuations per rule at temperature 1")
    parser.add_argument("--seed", type=int, default=0, help="which combinations are sampled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runner", choices=RUNNERS, help="vLLM's model runner; default v1, with --full both")
    parser.add_argument("--target", type=Path, help="a model folder in place of the embedded target")
    parser.add_argument(
        "--drafter", action="append", default=[], metavar="METHOD=DIR", help="its drafters, with --target; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    if args.temperature not in (0.0, 1.0):
        raise ConfigError(f"--temperature is {args.temperature}; expected 0 (token identity) or 1 (distribution)")
    if args.samples < 20000:
        raise ConfigError(f"--samples is {args.samples}; expected at least 20000, or the control may pass unnoticed")
    verdict = Verdict()
    if args.temperature:
        from nwor_vllm.bench.verify_sampling import check

        check(verdict, args.samples, not args.json)
    else:
        if args.runner != "v2":
            identity(verdict, pair_of(args), combinations(args.full, args.seed), not args.json)
        if args.runner == "v2" or (args.full and args.runner is None):
            on_v2(verdict, args)
    verdict.seconds = round(time.monotonic() - started, 1)
    show(verdict, args.json)
    return 0 if verdict.passed else 1


def show(verdict: Verdict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(verdict) | {"passed": verdict.passed}))
        return
    z = "" if verdict.max_abs_z is None else f", largest |z| {verdict.max_abs_z:.2f}"
    control = "caught" if verdict.negative_control_caught else "NOT CAUGHT"
    print(
        f"{'passed' if verdict.passed else 'FAILED'}: {verdict.compared} outputs compared, {verdict.differences} differ"
        f"{z}; the planted wrong rule was {control}; {verdict.seconds:.0f} s"
    )


def pair_of(args: argparse.Namespace) -> Pair:
    if args.target is None:
        from nwor_vllm import zoo

        paths = {"draft_model": zoo.path("draft"), "eagle": zoo.path("eagle"), "eagle3": zoo.path("eagle3")}
        return Pair(zoo.path("target"), paths, _vocab(zoo.path("target")), embedded=True)
    drafters = {}
    for text in args.drafter:
        method, _, folder = text.partition("=")
        if method not in DRAFTERS or not folder:
            raise ConfigError(f"--drafter is {text!r}; expected METHOD=DIR with METHOD one of {', '.join(DRAFTERS)}")
        drafters[method] = Path(folder)
    if not drafters:
        raise ConfigError("--target needs at least one --drafter METHOD=DIR")
    return Pair(args.target, drafters, _vocab(args.target))


def on_v2(verdict: Verdict, args: argparse.Namespace) -> None:
    """The same on the V2 runner. Without a GPU its kernels are interpreted, which takes a process of its own."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":  # this is that process
        identity(verdict, pair_of(args), combinations(args.full, args.seed), not args.json)
        return
    command = [sys.executable, "-m", "nwor_vllm.plugin.v2_interpreter", "nwor_vllm.bench.cli", "verify"]
    command += ["--json", "--runner", "v2", "--seed", str(args.seed), *(["--full"] if args.full else [])]
    command += ["--target", str(args.target)] if args.target is not None else []
    command += [part for drafter in args.drafter for part in ("--drafter", drafter)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"compared"')]
    if not lines:
        raise MissingError(f"the check of the V2 runner ended with code {done.returncode} and no result; see above")
    found = json.loads(lines[-1])
    both = [c for c in (verdict.negative_control_caught, found["negative_control_caught"]) if c is not None]
    verdict.compared += found["compared"]
    verdict.differences += found["differences"]
    verdict.negative_control_caught = all(both) if both else None
    for row in found["checks"]:
        verdict.checks.append(row | {"runner": "v2"})
        if not args.json:
            print(f"v2 {_line(row)}", flush=True)


def _vocab(target: Path) -> int:
    try:
        return int(json.loads((target / "config.json").read_text())["vocab_size"])
    except (OSError, KeyError, ValueError) as error:
        raise MissingError(f"{target} is no model folder: {error}; expected a config.json with vocab_size") from error


@dataclass(frozen=True)
class Combination:
    drafter: str
    asynchronous: bool
    scene: str


def combinations(full: bool, seed: int) -> list[Combination]:
    """All of them, or one scene for every drafter and scheduler, each scene at least once."""
    everything = [Combination(*c) for c in itertools.product(DRAFTERS, (False, True), SCENES)]
    if full:
        return everything
    pairs = list(itertools.product(DRAFTERS, (False, True)))
    scenes = list(itertools.islice(itertools.cycle(SCENES), len(pairs)))
    random.Random(seed).shuffle(scenes)
    return [Combination(d, a, s) for (d, a), s in zip(pairs, scenes, strict=True)]


def prompts_of(vocab: int, seed: int = 1) -> list[Tokens]:
    """Random prompts; half of them share a beginning that fills whole cache blocks."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(2, vocab) for _ in range(48))
    rows = []
    for index in range(REQUESTS):
        own = tuple(rng.randrange(2, vocab) for _ in range(rng.randrange(4, 40)))
        rows.append(shared + own if index % 2 else own)
    return rows


def chats(target: Path) -> list[Tokens]:
    """What the embedded pair was trained for, from every domain; half of it behind a shared conversation."""
    from transformers import AutoTokenizer

    from nwor_vllm import zoo

    tokenizer = AutoTokenizer.from_pretrained(str(target))
    texts = [row["prompt"] for row in zoo.prompts("all", REQUESTS, seed=3)]
    rows = []
    for index, text in enumerate(texts):
        said = texts[:1] if index % 2 else []
        turns = [{"role": "user", "content": t} for t in (*said, text)]
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        rows.append(tuple(tokenizer(whole, add_special_tokens=False)["input_ids"]))
    return rows


def engine_settings(combination: Combination) -> dict[str, Any]:
    base = {"max_model_len": 256, "max_num_seqs": 6, "block_size": 32, "disable_log_stats": False}
    return base | {"async_scheduling": combination.asynchronous} | SCENES[combination.scene]


def speculation(pair: Pair, drafter: str) -> dict[str, Any]:
    return {"method": drafter, "model": str(pair.drafters[drafter]), "num_speculative_tokens": K}


def identity(verdict: Verdict, pair: Pair, cells: Sequence[Combination], talk: bool) -> None:
    from nwor_vllm.bench.backends import vllm as backend

    prompts = prompts_of(pair.vocab) if not pair.embedded else chats(pair.target)
    ask = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    with backend.engine(pair.target, None, **engine_settings(Combination("", False, "plain"))) as llm:
        truth = backend.generate(llm, prompts, **ask)
    cells = [c for c in cells if c.drafter in pair.drafters]
    for cell in cells:
        with backend.engine(pair.target, speculation(pair, cell.drafter), **engine_settings(cell)) as llm:
            for name, rule in RULES.items():
                backend.switch(llm, rule)
                got = backend.generate(llm, prompts, **ask)
                wrong = sum(a != b for a, b in zip(got, truth, strict=True))
                verdict.compared += len(got)
                verdict.differences += wrong
                row = dataclasses.asdict(cell) | {"rule": name, "differences": wrong, **_work(backend.counters(llm))}
                if cell.scene == "preemption":
                    row["preemptions"] = backend.preemptions(llm)
                verdict.checks.append(row)
                if talk:
                    print(_line(row), flush=True)
            if cell is cells[-1]:
                backend.switch(llm, {"policy": "fixed"})
                with backend.keep_unverified():
                    planted = backend.generate(llm, prompts, **ask)
                verdict.negative_control_caught = planted != truth


def _work(counters: Mapping[str, Any]) -> dict[str, Any]:
    names = ("drafted_tokens", "verified_tokens", "accepted_tokens", "draft_forwards")
    return {name: counters[name] for name in names}


def _line(row: Mapping[str, Any]) -> str:
    mode = "async" if row["asynchronous"] else "sync"
    state = "identical" if not row["differences"] else f"{row['differences']} DIFFER"
    work = f"accepted {row['accepted_tokens']} of {row['verified_tokens']} verified, {row['drafted_tokens']} drafted"
    return f"{row['drafter']:<12} {mode:<5} {row['scene']:<16} {row['rule']:<12} {state:<10} {work}"
