"""What the plugin adds to an engine step: the same greedy requests under settings that draft the same, interleaved.

    python benchmarks/step_overhead.py --target wide --requests 1 --k 5 --blocks 10 [--pieces]

Every arm but `goodput` drafts and verifies the same tokens as `fixed`, so the ratio of their times is what watching
and judging cost. All run in one process and one engine, in an order that turns with each block. Times are the engine
thread's CPU time, so that other work on the machine hardly shows. `--pieces` times the methods in which that happens,
per step and of themselves alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from nwor_vllm import zoo
from nwor_vllm.bench import stats

ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"policy": "fixed", "early_exit": {"threshold": 0.0}},
    "fixed_again": {"policy": "fixed", "early_exit": {"threshold": 0.0}},
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
        "_prepare_inputs", "_build_attention_metadata", "_model_forward", "_sample", "_bookkeeping_sync", "nwor_skip",
        "nwor_replay",
    ),
    "drafter": (
        "propose", "_sample_draft_tokens", "_sample_from_logits", "_get_slot_mapping", "_nwor_rejected",
        "set_inputs_first_pass", "build_per_group_and_layer_attn_metadata", "_update_positions_dependent_metadata",
    ),
}  # fmt: skip


class Pieces:
    """Time in methods, without the time in other timed methods below them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.below = [0.0]

    def time(self, owner: Any, name: str, label: str) -> None:
        stock = getattr(owner, name, None)
        if stock is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.below.append(0.0)
            start = time.thread_time()
            try:
                return stock(*args, **kwargs)
            finally:
                taken = time.thread_time() - start
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


def run(llm: Any, prompts: Sequence[Any], params: Any) -> tuple[float, int]:
    """Seconds and number of the engine steps that hold no prefill."""
    engine = llm.llm_engine
    for index, prompt in enumerate(prompts):
        engine.add_request(f"r{index}", {"prompt_token_ids": prompt}, params)
    engine.step()
    steps, started = 0, time.thread_time()
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    return time.thread_time() - started, steps


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="target", choices=["target", "wide", "wider"])
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--pieces", action="store_true")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # all work in the thread that is timed
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    from nwor_vllm.plugin import control

    llm = vllm.LLM(
        model=str(zoo.path(args.target)), dtype="bfloat16", enforce_eager=True, max_model_len=512, seed=0,
        max_num_seqs=args.requests, enable_prefix_caching=False, async_scheduling=False,
        speculative_config={"method": "eagle", "model": str(zoo.path("eagle")), "num_speculative_tokens": args.k},
        additional_config={"nwor": {"policy": "fixed"}},
    )  # fmt: skip
    core: Any = llm.llm_engine
    runner = core.model_executor.driver_worker.worker.model_runner
    pieces = Pieces()
    if args.pieces:
        owners = {"scheduler": core.engine_core.engine_core.scheduler, "runner": runner, "drafter": runner.drafter}
        for owner, names in PIECES.items():
            for name in names:
                pieces.time(owners[owner], name, f"{owner}.{name}")
        pieces.time(runner.drafter.model, "forward", "drafter.model")
        pieces.time(runner.drafter.model, "compute_logits", "drafter.compute_logits")
    params = vllm.SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    tokenizer = llm.get_tokenizer()
    per_step: dict[str, list[float]] = {arm: [] for arm in args.arms}
    split: dict[str, dict[str, list[float]]] = {}
    learnt: dict[str, dict[str, Any]] = {}
    for block in range(-1, args.blocks):  # block -1 warms up
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
            )
            for row in zoo.prompts("all", args.requests, block + 1)
        ]
        shift = block % len(args.arms)
        order = [*args.arms[shift:], *args.arms[:shift]]
        for arm in order if block % 2 else order[::-1]:
            control.apply(llm, ARMS[arm] | learnt.get(arm, {}))
            pieces.take(1)
            seconds, steps = run(llm, prompts, params)
            if arm == "goodput":
                learnt[arm] = {"restore": control.snapshot(llm)["policy"]}
            if block >= 0:
                per_step[arm].append(seconds / steps)
                split[arm] = pieces.take(steps)
    report: dict[str, Any] = {"target": args.target, "requests": args.requests, "k": args.k, "arms": {}}
    for arm, seconds_per_step in per_step.items():
        ratio = stats.paired_ratio(seconds_per_step, per_step[args.arms[0]])
        report["arms"][arm] = {
            "us_per_step": round(1e6 * statistics.median(seconds_per_step)),
            f"over_{args.arms[0]}": [round(x, 4) for x in (ratio.ratio, ratio.low or 0.0, ratio.high or 0.0)],
        }
    print(json.dumps(report, indent=1))
    if args.pieces:
        names = sorted({n for found in split.values() for n in found})
        print(f"{'us per step (calls)':58}" + "".join(f"{arm:>16}" for arm in split))
        for name in names:
            cells = [split[arm].get(name, [0.0, 0.0]) for arm in split]
            print(f"{name:58}" + "".join(f"{us:9.0f} ({calls:4.1f})" for us, calls in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
