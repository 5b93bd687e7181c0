"""`nwor profile --cost`: what a step of this engine takes, by requests, verified tokens, draft steps and context.

One engine with the plugin in it. Every step draws anew how far to draft and whether the drafts are judged, so that
what a step verifies (the draft of the step before) and what it drafts vary independently. Batch sizes and contexts take
turns in short bursts, so that a machine that slows down for a while slows all of them. A row of the profile is the
median of the steps that agree.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nwor_vllm.bench import provenance
from nwor_vllm.errors import ConfigError
from nwor_vllm.policy import Plan, profile

LENGTHS = (0, 1, 2, 3, 5, 8, 10, 15)
CONTEXTS = (48, 320)  # prompt tokens
MAX_MODEL_LEN, NEW_TOKENS = 512, 96
SETTLE = 8  # steps of a burst that are not counted: the batch fills, caches warm
BURST, LARGE = 72, 16  # counted steps of a burst; half of that above batch 16, where steps are long and alike


Samples = dict[tuple[int, ...], list[tuple[float, float]]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], help="with --cost: batch sizes"
    )
    parser.add_argument("--rounds", type=int, default=6, help="with --cost: bursts per batch size and context")
    parser.add_argument("--dtype", default="bfloat16", help="with --cost: of the target")


def run(args: argparse.Namespace) -> int:
    if min(args.concurrency) < 1 or args.rounds < 1:
        raise ConfigError("--concurrency and --rounds are counts; expected whole numbers from 1 up")
    target, drafter, method = args.target or "zoo:target", args.drafter or "zoo:eagle", args.method or "eagle"
    out, environment = args.output or Path("cost.json"), provenance.environment(os.environ)  # vLLM adds to it
    samples = measure(target, method, drafter, sorted(set(args.concurrency)), args.rounds, args.dtype)
    about = {
        "target": target, "drafter": drafter, "method": method, "dtype": args.dtype, "rounds": args.rounds,
        "steps": sum(map(len, samples.values())), "load_average": os.getloadavg()[0],
        "command": shlex.join(["nwor", *sys.argv[1:]]), "hardware": provenance.hardware(),
        "versions": provenance.versions(), "git": provenance.git()["sha"],
        "environment": environment,
    }  # fmt: skip
    table = rows(samples)
    profile.write(table, about, out)
    print(f"{out}: {len(table)} rows from {about['steps']} steps")
    return 0


def measure(target: str, method: str, drafter: str, sizes: Sequence[int], rounds: int, dtype: str) -> Samples:
    """(requests, verified, draft steps, of them judged, prompt length) -> [(context, seconds)]."""
    from nwor_vllm.bench.backends import drafts

    rng = random.Random(0)
    samples: Samples = {}
    settings = {
        "dtype": dtype, "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": max(2048, max(sizes) * (max(LENGTHS) + 1), MAX_MODEL_LEN),
    }  # fmt: skip
    with drafts.watched(target, method, drafter, max(LENGTHS), max(sizes), **settings) as llm:
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        for number in range(rounds + 1):  # the first warms up
            turns = [(size, context) for size in sizes for context in CONTEXTS]
            rng.shuffle(turns)
            for size, context in turns:
                prompts = _prompts(rng, context, vocabulary)
                count = SETTLE if number == 0 else SETTLE + (BURST if size <= LARGE else BURST // 2)
                steps = drafts.burst(llm, prompts, size, _plans(rng), count, max_tokens=NEW_TOKENS)
                for plan, step in steps[SETTLE:]:
                    judged = step.draft_steps if plan.watch else 0
                    key = (step.requests, step.verified_tokens, step.draft_steps, judged, context)
                    samples.setdefault(key, []).append((step.context_tokens, step.seconds))
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return samples


def _prompts(rng: random.Random, length: int, vocabulary: int) -> Iterator[tuple[int, ...]]:
    while True:
        yield tuple(rng.randrange(vocabulary) for _ in range(length))


def _plans(rng: random.Random) -> Iterator[Plan]:
    while True:
        yield Plan(rng.choice(LENGTHS), watch=rng.random() < 0.5)


def rows(samples: Samples) -> list[tuple[float, ...]]:
    """Medians, in the columns of `policy.profile`. Steps whose drafts were short of the plan are not common enough."""
    table: list[tuple[float, ...]] = []
    for (requests, verified, steps, judged, _), found in sorted(samples.items()):
        if (verified - requests) % requests == 0 and (verified - requests) // requests in LENGTHS:
            context, seconds = (statistics.median(column) for column in zip(*found, strict=True))
            table.append((requests, verified, steps, judged, round(context), round(seconds, 7)))
    return table
