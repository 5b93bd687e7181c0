"""What the plugin adds to an engine step: the same greedy requests in stock vLLM and under several settings.

    python benchmarks/step_overhead.py --target wide --requests 1 --blocks 10 [--pieces]
    python benchmarks/step_overhead.py --arms no_speculation off stock_off --requests 32     what draft length 0 costs

`stock`, `fixed`, `watched` and `never_stops` draft and verify the same tokens, so the ratio of their times is what the
plugin, watching and judging cost; `off` and `no_speculation` draft nothing. All arms run in one process, in an order
that turns with each block; those of the plugin share an engine. Ratios are to the first arm: per step, and for the
same output tokens. What a step does outside the target's forward is given too: forwards of two engines differ by more
than that, for where their memory lies. Times are the engine thread's CPU time, so that other work on the machine shows
less; `--wall` takes the clock's. `--pieces` times the methods in which that happens, per step and of themselves alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from nwor_vllm import zoo
from nwor_vllm.bench import stats

ARMS: dict[str, dict[str, Any] | None] = {  # None: an engine without the plugin
    "no_speculation": None,
    "stock": None,
    "stock_off": None,  # vLLM's own table of draft lengths, saying 0
    "off": {"policy": "off", "early_exit": {"threshold": 0.0}},
    "fixed": {"policy": "fixed", "early_exit": {"threshold": 0.0}},
    "watched": {"policy": "fixed", "policy_params": {"watch": True}, "early_exit": {"threshold": 0.0}},
    "never_stops": {"policy": "fixed", "early_exit": {"threshold": 1e-6}},
    "goodput": {"policy": "goodput", "early_exit": {"threshold": 0.0}},
}
PIECES = {
    "scheduler": (
        "schedule", "update_from_output", "nwor_decide", "nwor_orders", "nwor_observe", "nwor_take", "nwor_publish",
        "make_spec_decoding_stats", "update_draft_token_ids",
    ),
    "runner": (
        "execute_model", "sample_tokens", "propose_draft_token_ids", "take_draft_token_ids", "_update_states",
        "_prepare_inputs", "_build_attention_metadata", "_get_slot_mappings", "_model_forward", "_sample",
        "_bookkeeping_sync", "nwor_skip", "nwor_replay",
    ),
    "drafter": (
        "propose", "_sample_draft_tokens", "_sample_from_logits", "_get_slot_mapping", "_nwor_rejected",
        "set_inputs_first_pass", "build_per_group_and_layer_attn_metadata", "_update_positions_dependent_metadata",
        "prepare_next_token_ids_padded", "prepare_inputs_padded",
    ),
}  # fmt: skip

MODEL = "runner._model_forward"


class Pieces:
    """Time in methods, without the time in other timed methods below them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.below = [0.0]

    def watch(self, core: Any, every: bool) -> None:
        runner = core.model_executor.driver_worker.worker.model_runner
        if not every:
            self.time(runner, "_model_forward", MODEL)
            return
        owners = {"scheduler": core.engine_core.engine_core.scheduler, "runner": runner}
        if hasattr(runner, "drafter"):
            owners["drafter"] = runner.drafter
            for name in ("forward", "compute_logits"):
                self.time(runner.drafter.model, name, f"drafter.model.{name}")
        for owner, found in owners.items():
            for name in PIECES[owner]:
                self.time(found, name, f"{owner}.{name}")

    def time(self, owner: Any, name: str, label: str) -> None:
        stock = getattr(owner, name, None)
        if stock is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.below.append(0.0)
            start = self.clock()
            try:
                return stock(*args, **kwargs)
            finally:
                taken = self.clock() - start
                self.seconds[label] += taken - self.below.pop()
                self.calls[label] += 1
                self.below[-1] += taken

        setattr(owner, name, timed)

    def take(self, steps: int) -> dict[str, list[float]]:
        """Microseconds and calls per step since the last time."""
        found = {p: [1e6 * s / steps, self.calls[p] / steps] for p, s in self.seconds.items()}
        self.seconds.clear()
        self.calls.clear()
        return found


def engine(arm: str, target: str, requests: int, k: int, prefixes: bool) -> Any:
    import vllm

    settings: dict[str, Any] = {}
    if arm != "no_speculation":
        drafts = {"method": "eagle", "model": str(zoo.path("eagle")), "num_speculative_tokens": k}
        if arm.startswith("stock"):
            drafts["num_speculative_tokens_per_batch_size"] = [[1, requests, k if arm == "stock" else 0]]
        else:
            settings["additional_config"] = {"nwor": {"policy": "fixed"}}
        settings["speculative_config"] = drafts
    return vllm.LLM(
        model=str(zoo.path(target)), dtype="bfloat16", enforce_eager=True, max_model_len=512, seed=0,
        max_num_seqs=requests, enable_prefix_caching=prefixes, async_scheduling=False, block_size=32,
        num_gpu_blocks_override=16 * requests + 2, **settings,
    )  # fmt: skip


def run(llm: Any, prompts: Sequence[Any], params: Any, pieces: Pieces) -> tuple[float, int]:
    """Seconds and number of the engine steps after the first, which holds the prefill."""
    core = llm.llm_engine
    for index, prompt in enumerate(prompts):
        core.add_request(f"r{index}", {"prompt_token_ids": prompt}, params)
    core.step()
    pieces.take(1)
    steps, started = 0, pieces.clock()
    while core.has_unfinished_requests():
        core.step()
        steps += 1
    return pieces.clock() - started, steps


def prompts_of(tokenizer: Any, requests: int, seed: int) -> list[Any]:
    chats = [[{"role": "user", "content": row["prompt"]}] for row in zoo.prompts("all", requests, seed)]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def ratio(a: Sequence[float], b: Sequence[float]) -> list[float | None]:
    found = stats.paired_ratio(a, b)
    return [None if x is None else round(x, 4) for x in (found.ratio, found.low, found.high)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="target", choices=["target", "wide", "wider"])
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument(
        "--arms", nargs="+", default=["stock", "fixed", "watched", "never_stops", "goodput"], choices=ARMS
    )
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--pieces", action="store_true")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # all work in the thread that is timed
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    from nwor_vllm.plugin import control

    pieces = Pieces(time.perf_counter if args.wall else time.thread_time)
    engines: dict[str, Any] = {}
    for arm in args.arms:
        kind = arm if ARMS[arm] is None else "plugin"
        if kind not in engines:
            engines[kind] = engine(kind, args.target, args.requests, args.k, args.prefix_caching)
            pieces.watch(engines[kind].llm_engine, args.pieces)
        engines[arm] = engines[kind]
    params = vllm.SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    seconds: dict[str, list[float]] = {arm: [] for arm in args.arms}
    steps: dict[str, list[int]] = {arm: [] for arm in args.arms}
    split: dict[str, list[dict[str, list[float]]]] = {arm: [] for arm in args.arms}
    learnt: dict[str, dict[str, Any]] = {}
    for block in range(-1, args.blocks):  # block -1 warms up
        prompts = prompts_of(engines[args.arms[0]].get_tokenizer(), args.requests, block + 1)
        shift = block // 2 % len(args.arms)
        order = [*args.arms[shift:], *args.arms[:shift]]
        for arm in order if block % 2 else order[::-1]:
            llm, setting = engines[arm], ARMS[arm]
            if setting is not None:
                control.apply(llm, setting | learnt.get(arm, {}))
            taken, made = run(llm, prompts, params, pieces)
            if arm == "goodput":
                learnt[arm] = {"restore": control.snapshot(llm)["policy"]}
            if block >= 0:
                seconds[arm].append(taken)
                steps[arm].append(made)
                split[arm].append(pieces.take(made))
    first = args.arms[0]
    outside = {
        arm: [1e6 * s / n - found[MODEL][0] for s, n, found in zip(seconds[arm], steps[arm], split[arm], strict=True)]
        for arm in args.arms
    }
    each = {arm: [s / n for s, n in zip(seconds[arm], steps[arm], strict=True)] for arm in args.arms}
    report = {
        arm: {
            "us_per_step": round(1e6 * statistics.median(each[arm])),
            "steps": sum(steps[arm]),
            f"step_over_{first}": ratio(each[arm], each[first]),
            f"tokens_over_{first}": ratio(seconds[arm], seconds[first]),
            "us_outside_the_model": round(statistics.median(outside[arm])),
        }
        for arm in args.arms
    }
    print(json.dumps({"target": args.target, "requests": args.requests, "k": args.k, "load": os.getloadavg()}))
    for arm, row in report.items():
        print(json.dumps({"arm": arm} | row))
    if args.pieces:
        names = sorted({n for blocks in split.values() for found in blocks for n in found})
        print(f"{'us per step (calls), medians':58}" + "".join(f"{arm:>16}" for arm in split))
        for name in names:
            rows = [[found.get(name, [0.0, 0.0]) for found in blocks] for blocks in split.values()]
            cells = [[statistics.median(column) for column in zip(*blocks, strict=True)] for blocks in rows]
            print(f"{name:58}" + "".join(f"{us:9.0f} ({calls:4.1f})" for us, calls in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
