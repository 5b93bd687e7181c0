"""Does the laboratory see what is not there, and miss what is? Equal arms in one real engine, and a slowdown planted.

    python benchmarks/aa.py                    20 repetitions of 10 pairs: at most 3 may differ at 95 %
    python benchmarks/aa.py --planted 0.05     one of the arms really sleeps 5 % longer: it has to be found

Both arms are the same policy of the same engine on the same prompts, A B, then B A, as in every grid. A pair is a batch
of each. Ends with 1 where equal arms differ too often, or where most repetitions miss what was planted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from scipy import stats as distributions

from nwor_vllm.bench import provenance, record, stats, workload
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.errors import ConfigError, NworError

ALPHA = 1 - stats.CONFIDENCE
LUCK = 0.02  # how often equal arms may be called different by too many repetitions
Serve = Callable[[int], float]  # a batch by its number -> seconds


def repetition(serve: Serve, first: int, pairs: int, planted: float) -> stats.PairedRatio:
    """B over A: batch by batch, the order reversed from one to the next. B sleeps for its share of its own time."""
    times: dict[str, list[float]] = {"a": [], "b": []}
    for number in range(first, first + pairs):
        for arm in "ab" if number % 2 == 0 else "ba":
            started = time.perf_counter()
            seconds = serve(number)
            if arm == "b" and planted:
                time.sleep(planted * seconds)
                seconds = time.perf_counter() - started
            times[arm].append(seconds)
    return stats.paired_ratio(times["b"], times["a"])


def allowed(repetitions: int) -> int:
    """So many of equal arms may differ: more would be chance in fewer than one case of fifty. 3 of 20."""
    return int(distributions.binom.ppf(1 - LUCK, repetitions, ALPHA))


def found(results: Sequence[stats.PairedRatio]) -> int:
    return sum(result.p is not None and result.p < ALPHA for result in results)


def judge(results: Sequence[stats.PairedRatio], planted: float) -> tuple[bool, str]:
    n, seen = len(results), found(results)
    if planted:
        right = sum(r.p is not None and r.p < ALPHA and r.ratio > 1 for r in results)
        return right > n / 2, f"{planted:.0%} planted: found in {right} of {n} repetitions"
    return seen <= allowed(n), f"equal arms: {seen} of {n} repetitions differ at 95 %; at most {allowed(n)} may"


def cell_of(args: argparse.Namespace) -> Cell:
    engine = Engine(
        target=args.target, drafter=args.drafter, draft_length=args.draft_length, max_num_seqs=args.requests,
        max_model_len=1024, dtype="float32", enforce_eager=True,
    )  # fmt: skip
    return Cell(
        engine=engine, requests=args.requests, max_tokens=args.tokens, temperature=0.0, draft_length=args.draft_length,
        adaptive=args.adaptive, batches=args.repetitions * args.pairs, ignore_eos=True, references=(), id="aa",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.repetitions < 1 or args.pairs < 2 or not 0 <= args.planted < 10:
        raise ConfigError("expected --repetitions from 1, --pairs from 2 and --planted from 0 below 10")
    from nwor_vllm.bench import arms
    from nwor_vllm.bench.backends.engine import open_engine

    cell = cell_of(args)
    provenance.require_models([cell])
    work, driver = workload.build(cell), open_engine(cell.engine)
    driver.switch(arms.subject(cell).setting())

    def serve(number: int) -> float:
        return driver.generate(work.batches[number], cell)[0]

    for prompts in [*work.warmup, *work.warmup]:
        driver.generate(prompts, cell)
    results = []
    for number in range(args.repetitions):
        result = repetition(serve, number * args.pairs, args.pairs, args.planted)
        results.append(result)
        print(
            f"{number + 1:>3}  x{result.ratio:.4f} [{result.low:.4f}, {result.high:.4f}]  p {result.p:.3f}  "
            f"smallest detectable {result.mde:.1%}",
            flush=True,
        )
    driver.close()
    good, text = judge(results, args.planted)
    print(text)
    if args.out is not None:
        body = {
            "command": " ".join(sys.argv), "planted": args.planted, "pairs": args.pairs, "good": good, "verdict": text,
            "repetitions": [asdict(result) for result in results], "cell": cell.model_dump(mode="json"),
            "provenance": provenance.describe(cell, os.environ),
        }  # fmt: skip
        record.replace_text(args.out, json.dumps(body, indent=1, allow_nan=False) + "\n")
    return 0 if good else 1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=10, help="batches of each arm in a repetition")
    parser.add_argument("--planted", type=float, default=0.0, help="share of its time that one arm sleeps")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--target", default="zoo:target")
    parser.add_argument("--drafter", default="zoo:eagle")
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--adaptive", action="store_true", help="both arms follow the default policy")
    parser.add_argument("--out", type=Path, help="the results as JSON")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    configure(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NworError as error:
        sys.exit(f"aa.py: {error}")
