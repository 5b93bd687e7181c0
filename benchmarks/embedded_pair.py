#!/usr/bin/env python3
"""Mean accepted length of every drafter of the embedded pair on every domain, through real vLLM, as a table."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

METHODS = {"EAGLE-1": ("eagle", "eagle"), "EAGLE-3": ("eagle3", "eagle3"), "draft model": ("draft_model", "draft")}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="target", help="target, wide or wider")
    parser.add_argument("--k", type=int, default=5, help="draft tokens per round")
    parser.add_argument("-n", type=int, default=16, help="prompts per domain")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    return parser.parse_args()


def counters(llm: object) -> tuple[float, float]:
    """Rounds and accepted draft tokens so far."""
    found = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}  # type: ignore[attr-defined]
    return found["vllm:spec_decode_num_drafts"], found["vllm:spec_decode_num_accepted_tokens"]


def row(args: argparse.Namespace, speculative: dict[str, object], domains: Sequence[str]) -> list[str]:
    from vllm import LLM, SamplingParams

    from nwor_vllm import zoo

    llm = LLM(
        model=str(zoo.path(args.target)),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config={**speculative, "num_speculative_tokens": args.k},
    )
    cells = []
    for domain in domains:
        taus = []
        chats = [[{"role": "user", "content": p["prompt"]}] for p in zoo.prompts(domain, args.n, args.seed)]
        for temperature in args.temperatures:
            seed = args.seed if temperature else None
            before = counters(llm)
            sampling = SamplingParams(temperature=temperature, max_tokens=args.max_tokens, seed=seed)
            llm.chat(chats, sampling, use_tqdm=False)
            rounds, accepted = (now - then for now, then in zip(counters(llm), before, strict=True))
            taus.append(f"{accepted / rounds + 1:.2f}" if rounds else "no draft")
        cells.append(" / ".join(taus))
    del llm
    gc.collect()
    return cells


def main() -> None:
    args = parsed()
    from nwor_vllm import zoo
    from nwor_vllm.plugin import compat

    compat.fix_cpu_expand()
    print(f"| | {' | '.join(zoo.DOMAINS)} |")
    print(f"| --- |{' --- |' * len(zoo.DOMAINS)}")
    specs: dict[str, dict[str, object]] = {
        name: {"method": method, "model": str(zoo.path(member))} for name, (method, member) in METHODS.items()
    }
    specs["n-gram"] = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    for name, speculative in specs.items():
        print(f"| {name} | {' | '.join(row(args, speculative, zoo.DOMAINS))} |", flush=True)


if __name__ == "__main__":
    main()
