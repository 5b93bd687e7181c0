"""The headline: elastic drafting against no speculation, every fixed draft length and vLLM's own table, on real vLLM.

    python benchmarks/elastic_vs_fixed.py --target wide --workloads mixed code --concurrency 1 16 --blocks 6

All arms run in one process, interleaved: a block runs every arm on the same prompts, in an order that is reversed the
next time, and they take turns: request by request where one is in flight, else by three for each. A machine's speed
drifts over seconds, and short turns leave little of that. The drafting arms share one engine and are switched
live; an arm's policy goes on where it stopped. No speculation and vLLM's table
have engines of their own, without the plugin. The clock runs while `--concurrency` requests are in flight.

The best fixed length is chosen in hindsight on the very blocks it is judged by, which favours it. Results are kept cell
by cell in --out: a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nwor_vllm import zoo
from nwor_vllm.bench import provenance, record, stats
from nwor_vllm.errors import ConfigError, CorruptFileError

VERSION = 6
LENGTHS = (1, 2, 3, 5, 8, 10, 15)
LADDER = (0, *LENGTHS)
TABLE = [[1, 4, 5], [5, 16, 3], [17, 256, 1]]  # vLLM's: [from, to, K]
NO_SPECULATION, BATCH_TABLE = "no_speculation", "batch_table"
ELASTIC: dict[str, dict[str, Any]] = {
    "acceptance_biased": {"policy": "acceptance", "policy_params": {"biased": True}},
    "throughput": {"policy": "throughput", "policy_params": {}},
    "goodput": {"policy": "goodput", "policy_params": {}},
}
SWITCH = "regime_switch"
BOTH = "both"  # all domains, every other request greedy


def arms() -> list[str]:
    return [NO_SPECULATION, *(f"fixed_{k}" for k in LENGTHS), BATCH_TABLE, *ELASTIC]


def setting(arm: str) -> dict[str, Any]:
    """What the plugin's live control is told."""
    if arm in ELASTIC:
        return {**ELASTIC[arm], "early_exit": {"policy_rule": True}}
    return {"policy": "fixed", "policy_params": {"k": int(arm.removeprefix("fixed_"))}}


def worthless() -> Path:
    """The EAGLE head of the pair with noise for weights: costs what a good one does, and hardly ever guesses right."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(tempfile.mkdtemp(prefix="nwor-worthless-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(zoo.path("eagle"), folder, dirs_exist_ok=True)
    noise = torch.Generator().manual_seed(0)
    for file in folder.glob("*.safetensors"):
        weights = {
            name: w if w.dim() < 2 else (torch.randn(w.shape, generator=noise) * w.float().std()).to(w.dtype)
            for name, w in load_file(file).items()
        }
        save_file(weights, file)
    return folder


class Engines:
    """Three engines in one process, and what each elastic arm has learnt so far."""

    def __init__(self, target: str, drafter: str, max_num_seqs: int) -> None:
        import vllm

        common: dict[str, Any] = {
            "model": str(zoo.path(target)), "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512,
            "max_num_seqs": max_num_seqs, "enable_prefix_caching": False, "async_scheduling": False, "seed": 0,
        }  # fmt: skip
        method = {"eagle3": "eagle3", "draft": "draft_model"}.get(drafter, "eagle")
        folder = worthless() if drafter == "worthless" else zoo.path(drafter)
        drafts = {"method": method, "model": str(folder), "num_speculative_tokens": max(LENGTHS)}
        self.plain = vllm.LLM(**common)
        table = {**drafts, "num_speculative_tokens_per_batch_size": TABLE}
        self.table = vllm.LLM(**common, speculative_config=table)
        self.elastic = vllm.LLM(
            **common, speculative_config=drafts, additional_config={"nwor": {"policy": "fixed", "ladder": LADDER}}
        )
        self.sampling = vllm.SamplingParams
        self.tokenizer = self.plain.get_tokenizer()
        self.learnt: dict[str, Any] = {}
        self.current = ""
        for llm in (self.plain, self.table, self.elastic):
            self._warm(llm, min(max_num_seqs * (max(LENGTHS) + 1), 500))

    def _warm(self, llm: Any, most: int) -> None:
        """One step of every size. oneDNN compiles for each, longer than a step of a small model takes: a server does
        so once, a measurement of seconds would do little else."""
        params = self.sampling(temperature=0.0, max_tokens=1)
        for rows in range(1, most + 1):
            llm.generate({"prompt_token_ids": [1] * rows}, params, use_tqdm=False)

    def of(self, arm: str) -> Any:
        from nwor_vllm.plugin import control

        if arm in (NO_SPECULATION, BATCH_TABLE):
            return self.plain if arm == NO_SPECULATION else self.table
        if arm != self.current:
            if self.current in ELASTIC:
                self.learnt[self.current] = control.snapshot(self.elastic)["policy"]
            change = setting(arm)
            if arm in self.learnt:
                change["restore"] = self.learnt[arm]
            control.apply(self.elastic, change)
            self.current = arm
        control.apply(self.elastic, {"reset": True})
        return self.elastic

    def counters(self, arm: str) -> dict[str, Any] | None:
        from nwor_vllm.plugin import control

        if arm in (NO_SPECULATION, BATCH_TABLE):
            return None
        found: dict[str, Any] = control.snapshot(self.elastic)["counters"]
        return found

    def forget(self) -> None:
        """A new cell is a new server: nothing learnt is carried over."""
        self.learnt, self.current = {}, ""


def texts(workload: str, requests: int, seed: int, block: int, blocks: int) -> list[str]:
    """Distinct prompts of a block, -1 the first. Mixed domains take turns; the regime switches from code to creative in
    the middle of the cell."""
    domain = {SWITCH: "creative" if 2 * block >= blocks else "code", "mixed": "all", BOTH: "all"}.get(
        workload, workload
    )
    rows = zoo.prompts(domain, requests * (blocks + 1), seed)
    return [row["prompt"] for row in rows[requests * (block + 1) : requests * (block + 2)]]


def temperatures(cell: Mapping[str, Any], block: int) -> list[float]:
    """Of a block's requests. Domains take turns, and in each of them greedy and sampled requests do."""
    requests = range(cell["requests"] * (block + 1), cell["requests"] * (block + 2))
    greedy = [cell["workload"] == BOTH and (i + i // len(zoo.DOMAINS)) % 2 == 0 for i in requests]
    return [0.0 if g else cell["temperature"] for g in greedy]


def run_block(llm: Any, prompts: Sequence[Any], params: Sequence[Any], concurrency: int, tag: str) -> tuple[float, int]:
    """Seconds and output tokens while `concurrency` requests are in flight. What is left when no next one can take the
    place of one that ended is aborted: how a batch drains says who is served evenly, not who is served fast."""
    engine, waiting, flying = llm.llm_engine, list(enumerate(zip(prompts, params, strict=True))), set[str]()
    tokens: dict[str, int] = {}
    waiting.reverse()
    full = min(concurrency, len(waiting))
    started = time.perf_counter()
    while waiting or len(flying) == full:
        while waiting and len(flying) < full:
            index, (prompt, sampling) = waiting.pop()
            flying.add(f"{tag}-{index}")
            engine.add_request(f"{tag}-{index}", {"prompt_token_ids": prompt}, sampling)
        for output in engine.step():
            tokens[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                flying.remove(output.request_id)
    seconds = time.perf_counter() - started
    engine.abort_request(sorted(flying))
    while engine.has_unfinished_requests():
        engine.step()
    return seconds, sum(tokens.values())


def turns(
    names: Sequence[str], block: int, requests: int, concurrency: int
) -> Iterator[tuple[int, slice, Sequence[str]]]:
    """The turns of a block: number, requests, and the arms in their order. With one request in flight that is a request
    each, else three for each, or seconds of a slow machine would be one arm's; no arm always follows the same one."""
    size = 1 if concurrency == 1 else 3 * concurrency
    for first in range(0, requests, size):
        number = block * math.ceil(requests / size) + first // size
        order = list(names) if number % 2 == 0 else list(names)[::-1]
        start = (number // 2) * 5 % len(order)
        yield number, slice(first, first + size), [*order[start:], *order[:start]]


def measure(engines: Engines, cell: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """One cell: per arm, tokens per second of every block."""
    engines.forget()
    names = arms()
    rates: dict[str, list[float]] = {arm: [] for arm in names}
    totals: dict[str, dict[str, Any]] = {}
    for block in range(-1, cell["blocks"]):  # block -1 warms up
        seed = 1000 * cell["seed"] + block + 1
        prompts = [
            engines.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in texts(cell["workload"], cell["requests"], cell["seed"], block, cell["blocks"])
        ]
        params = [
            engines.sampling(temperature=temperature, max_tokens=cell["max_tokens"], seed=seed * 64 + i)
            for i, temperature in enumerate(temperatures(cell, block))
        ]
        clock = {arm: [0.0, 0] for arm in names}
        for turn, mine, order in turns(names, block, len(prompts), cell["concurrency"]):
            for arm in order:
                llm = engines.of(arm)
                spent = run_block(llm, prompts[mine], params[mine], cell["concurrency"], f"{arm}-{turn}")
                clock[arm] = [sum(pair) for pair in zip(clock[arm], spent, strict=True)]
                if block >= 0:
                    _count(totals.setdefault(arm, {}), engines.counters(arm))
        if block >= 0:
            for arm, (seconds, tokens) in clock.items():
                rates[arm].append(tokens / seconds)
        say(f"  block {block + 1}/{cell['blocks']}")
    counted = {arm: total for arm, total in totals.items() if total}
    return {"cell": dict(cell), "tokens_per_s": rates, "counters": counted, "summary": summarise(rates)}


def _count(total: dict[str, Any], counters: Mapping[str, Any] | None) -> None:
    if counters is None:
        return
    for name in ("rounds", "drafted_tokens", "verified_tokens", "accepted_tokens", "draft_forwards"):
        total[name] = total.get(name, 0) + counters[name]
    histogram = total.setdefault("length_histogram", {})
    for k, n in counters["length_histogram"].items():
        histogram[str(k)] = histogram.get(str(k), 0) + n


def summarise(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The best fixed length in hindsight, and every arm against it and against no speculation."""
    fixed = [arm for arm in rates if arm.startswith("fixed_")]
    best = max(fixed, key=lambda arm: statistics.geometric_mean(rates[arm]))
    against: dict[str, Any] = {}
    for arm in rates:
        entry: dict[str, Any] = {"median_tokens_per_s": statistics.median(rates[arm])}
        for name, other in (("best_fixed", best), (NO_SPECULATION, NO_SPECULATION)):
            result = stats.paired_ratio(rates[arm], rates[other])
            median = statistics.median(x / y for x, y in zip(rates[arm], rates[other], strict=True))
            entry[f"over_{name}"] = {"ratio": result.ratio, "low": result.low, "high": result.high, "median": median}
        against[arm] = entry
    return {"best_fixed": best, "arms": against}


def markdown(results: Mapping[str, Any]) -> str:
    lines = [
        "# Elastic against fixed draft lengths", "", f"`{results['command']}`", "",
        "Ratios of tokens per second in paired blocks: geometric mean, 95 % t interval on log ratios, and the median",
        "block, which a machine that stood still for a while does not move. The best fixed length is chosen in",
        "hindsight on the same blocks.", "",
        "| workload | T | requests | best fixed K | best fixed / none | goodput / none | goodput / best fixed "
        "| throughput / best fixed | acceptance (biased) / best fixed | vLLM table / best fixed |",
        "| --- " * 10 + "|",
    ]  # fmt: skip
    for done in results["cells"].values():
        cell, summary = done["cell"], done["summary"]

        def show(arm: str, over: str, of: Mapping[str, Any] = summary) -> str:
            ratio = of["arms"][arm][f"over_{over}"]
            interval = "" if ratio["low"] is None else f" ({ratio['low']:.2f}-{ratio['high']:.2f})"
            return f"{ratio['ratio']:.3f}{interval}; {ratio['median']:.3f}"

        row = [
            cell["workload"], f"{cell['temperature']:g}", str(cell["concurrency"]),
            summary["best_fixed"].removeprefix("fixed_"), show(summary["best_fixed"], NO_SPECULATION),
            show("goodput", NO_SPECULATION),
            *(show(arm, "best_fixed") for arm in ("goodput", "throughput", "acceptance_biased", BATCH_TABLE)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    hardware = results["hardware"]
    return "\n".join([*lines, "", f"Target {results['target']}, drafter {results['drafter']}; {hardware}."]) + "\n"


def load(path: Path, fresh: Mapping[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return dict(fresh)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = all(found[key] == fresh[key] for key in ("version", "target", "drafter", "table", "versions", "code"))
    except (ValueError, KeyError):
        raise CorruptFileError(f"{path} is not a result of this benchmark; name another --out or remove it") from None
    if not same:
        raise ConfigError(f"{path} was measured with other code, versions or models; name another --out or remove it")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*zoo.DOMAINS, "mixed", SWITCH, BOTH]
    parser.add_argument(
        "--target", default="target", choices=[m for m in zoo.MEMBERS if m not in ("eagle", "eagle3", "draft")]
    )
    parser.add_argument("--drafter", default="eagle", choices=["eagle", "eagle3", "draft", "worthless"])
    parser.add_argument("--workloads", nargs="+", default=everything, choices=everything, metavar="NAME")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--blocks", type=int, default=12, help="paired blocks a cell; an even number")
    parser.add_argument("--requests", type=int, default=0, help="requests a block; 0 = 9 for each in flight")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/elastic_vs_fixed.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # made for one engine, and here are three
    fresh = {
        "version": VERSION, "command": shlex.join(["python", "benchmarks/elastic_vs_fixed.py", *argv]),
        "target": args.target, "drafter": args.drafter, "table": TABLE, "code": provenance.code(),
        "git": provenance.git()["sha"], "versions": provenance.versions(), "hardware": provenance.hardware(),
        "cells": {},
    }  # fmt: skip
    results = load(args.out, fresh)
    cells = [
        {
            "workload": workload, "temperature": temperature, "concurrency": concurrency, "blocks": args.blocks,
            "requests": args.requests or 9 * concurrency, "max_tokens": args.max_tokens, "seed": args.seed,
        }
        for concurrency in args.concurrency for temperature in args.temperatures for workload in args.workloads
        if temperature or workload != BOTH
    ]  # fmt: skip
    todo = [cell for cell in cells if json.dumps(cell) not in results["cells"]]
    print(f"{len(todo)} of {len(cells)} cells to measure", flush=True)
    engines = Engines(args.target, args.drafter, max(args.concurrency)) if todo else None
    for number, cell in enumerate(todo, 1):
        assert engines is not None
        print(f"[{number}/{len(todo)}] {cell}", flush=True)
        results["cells"][json.dumps(cell)] = measure(engines, cell, lambda text: print(text, flush=True))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record.replace_text(args.out, json.dumps(results, indent=1) + "\n")
        record.replace_text(args.out.with_suffix(".md"), markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
