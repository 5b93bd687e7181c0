#!/usr/bin/env python3
"""Every kernel against its plain-torch twin, torch.compile of it and vLLM's own nearest kernel.

    python benchmarks/kernels.py        writes benchmarks/results/kernels_<gpu>.json and prints the table

Calls are captured in a CUDA graph where they can be, one call for each of enough input copies to outgrow the L2 cache,
and timed with CUDA events; the figure is the median replay over its calls. Bandwidth counts the bytes the operation has
to move, and is set against a 1 GiB copy and against a copy of the same bytes, measured in the same run.
Exit code 3: no GPU here. Exit code 1: a result was wrong or a target was missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
L2_TWICE = 128 << 20
BATCHES = (1, 4, 16, 64, 256)
Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    bytes_moved: int
    make: Callable[[], Any]  # one fresh input
    contenders: dict[str, Call]  # "ours" and "torch" always
    compare: Callable[[Any, Any], None] | None = None  # ours, torch: raises where they differ
    targets: dict[str, float] = field(default_factory=dict)


def same_confidence(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours.max_prob, theirs.max_prob, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.log_odds, theirs.log_odds, rtol=1e-4, atol=1e-4)


def confidence_cases(device: str, batch: int, vocab: int) -> Iterator[Case]:
    from nwor_vllm.kernels import StopState, confidence, confidence_and_stop, sample_with_confidence
    from nwor_vllm.policy.base import StopRule

    def logits() -> torch.Tensor:
        return (torch.randn(batch, vocab, device=device) * 3).bfloat16()

    def eager(x: torch.Tensor) -> Any:
        return torch.softmax(x, dim=-1).max(dim=-1)

    def twin(x: torch.Tensor) -> Any:
        return confidence(x, backend="reference")

    targets = {"torch_speedup_min": 2.5, "compile_speedup_min": 1.0}
    targets |= {"copy_fraction_min": 0.85} if batch >= 16 else {}
    targets |= {"us_max": 10.0} if batch == 1 else {}
    contenders: dict[str, Call] = {"ours": confidence, "torch": eager, "compile": torch.compile(eager), "twin": twin}
    contenders |= vllm_confidence(device, batch)
    size = batch * vocab * 2
    # Eager's softmax rounds to bf16.
    close = lambda a, b: torch.testing.assert_close(a.max_prob, b.values.float(), rtol=1e-2, atol=1e-3)  # noqa: E731
    yield Case("confidence", batch, size, logits, contenders, close, targets)

    state = StopState.create(batch, 8, device)
    state.set_rule(StopRule(threshold=0.1, draft_cost=0.01))
    yield Case(
        "confidence_and_stop",
        batch,
        size,
        logits,
        {
            "ours": lambda x: confidence_and_stop(x, state, 0),
            "torch": lambda x: confidence_and_stop(x, state, 0, backend="reference"),
        },
        same_confidence,
    )
    seeds = torch.arange(batch, device=device)
    temperature = torch.full((batch,), 0.8, device=device)
    yield Case(
        "sample_with_confidence",
        batch,
        size,
        logits,
        {
            "ours": lambda x: sample_with_confidence(x, seeds, seeds, temperature),
            "torch": lambda x: sample_with_confidence(x, seeds, seeds, temperature, backend="reference"),
            **vllm_sample(batch, seeds, temperature),
        },
        lambda a, b: same_confidence(a[1], b[1]),
    )


def residual_cases(device: str, batch: int, vocab: int) -> Iterator[Case]:
    from nwor_vllm.kernels import residual_sample

    def probs() -> tuple[torch.Tensor, torch.Tensor]:
        p, q = torch.softmax(torch.randn(2, batch, vocab, device=device) * 3, dim=-1)
        return p, q

    seeds = torch.arange(batch, device=device)
    yield Case(
        "residual_sample",
        batch,
        batch * vocab * 8,
        probs,
        {
            "ours": lambda pq: residual_sample(*pq, seeds, seeds),
            "torch": lambda pq: residual_sample(*pq, seeds, seeds, backend="reference"),
        },
        lambda a, b: torch.testing.assert_close(a.mass, b.mass, rtol=1e-4, atol=1e-5),
    )


def kv_cases(device: str, batch: int) -> Iterator[Case]:
    from nwor_vllm.kernels import commit_kv, masked_kv_write

    heads, dim, block_size = 8, 128, 16
    slots = torch.randperm(batch * 32, device=device)[:batch]
    half = torch.arange(batch, device=device) % 2 == 0
    one = torch.ones(1, device=device)
    counters = torch.zeros(2, dtype=torch.int64, device=device)

    def paged() -> tuple[torch.Tensor, ...]:
        rows = torch.randn(2, batch, heads, dim, device=device).bfloat16()
        cache = torch.zeros(2, batch * 32 // block_size, block_size, heads, dim, device=device).bfloat16()
        return rows[0], rows[1], cache[0], cache[1]

    def write(x: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
        masked_kv_write(*x, slots, counters=counters, **options)
        return x[2]

    def commit(x: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
        accepted = torch.ones(batch, dtype=torch.int32, device=device)
        commit_kv(x[0][:, None], x[1][:, None], x[2], x[3], slots[:, None], accepted, counters=counters, **options)
        return x[2]

    def equal(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    row = 4 * heads * dim * 2  # K and V, read and written
    for name, live, options in (("kv_write", batch, {}), ("kv_write_half_dead", (batch + 1) // 2, {"alive": half})):
        contenders: dict[str, Call] = {
            "ours": lambda x, o=options: write(x, **o),
            "torch": lambda x, o=options: write(x, **o, backend="reference"),
        }
        contenders |= {} if options else vllm_kv_write(slots, one)
        yield Case(name, batch, live * row, paged, contenders, equal)
    contenders = {"ours": commit, "torch": lambda x: commit(x, backend="reference")}
    yield Case("commit_kv", batch, batch * row, paged, contenders, equal)


def vllm_confidence(device: str, batch: int) -> dict[str, Call]:
    try:
        from vllm.v1.worker.gpu.spec_decode.acceptance_estimator import OnlineAcceptanceEstimator
    except ImportError:
        return {}
    estimator = OnlineAcceptanceEstimator(batch, 8, torch.device(device))
    rows, step = (
        torch.arange(batch, device=device, dtype=torch.int32),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    probs, ones = torch.zeros(batch, 8, device=device), torch.ones(batch, device=device)
    return {"vllm": lambda x: estimator.predict(x, rows, step, probs, ones)}


def vllm_sample(batch: int, seeds: torch.Tensor, temperature: torch.Tensor) -> dict[str, Call]:
    try:
        from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    except ImportError:
        return {}
    rows = torch.arange(batch, device=seeds.device, dtype=torch.int32)
    return {"vllm": lambda x: gumbel_sample(x, rows, temperature, seeds, seeds, True, True)}


def vllm_kv_write(slots: torch.Tensor, one: torch.Tensor) -> dict[str, Call]:
    try:
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
    except ImportError:
        return {}
    return {"vllm": lambda x: triton_reshape_and_cache_flash(*x, slots, "auto", one, one)}


def cases(device: str, batches: tuple[int, ...], vocab: int) -> Iterator[Case]:
    for batch in batches:
        yield from confidence_cases(device, batch, vocab)
        yield from residual_cases(device, batch, vocab)
        yield from kv_cases(device, batch)


def median_us(call: Call, inputs: list[Any], repeats: int = 30) -> tuple[float, bool]:
    """(median microseconds a call, whether it ran as a CUDA graph)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in inputs[:3]:
            call(x)  # compiles, and warms the allocator on the stream that captures
    stream.synchronize()
    graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for x in inputs:
                call(x)
    except RuntimeError:  # something in it waits for the device, as boolean indexing does
        torch.cuda.synchronize()
        graph = None
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for x in inputs:
                call(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times), graph is not None


def copy_gbps(size: int) -> float:
    """Counts bytes read and bytes written: an operation that moves `size` bytes compares with a copy of half of it."""
    half = max(size // 2, 16)
    pairs = [torch.empty(2, half, dtype=torch.uint8, device="cuda") for _ in range(copies(size))]
    us, _ = median_us(lambda pair: pair[1].copy_(pair[0]), pairs)
    return 2 * half / us / 1e3


def copies(size: int) -> int:
    return max(2, min(1024, -(-L2_TWICE // max(size, 1))))


def measure(case: Case, roof_gbps: float) -> dict[str, Any]:
    x = case.make()
    if case.compare is not None:
        case.compare(case.contenders["ours"](x), case.contenders["torch"](x))
    inputs = [case.make() for _ in range(copies(case.bytes_moved))]
    row: dict[str, Any] = {"kernel": case.name, "batch": case.batch, "bytes": case.bytes_moved, "us": {}, "graph": {}}
    for name, call in case.contenders.items():
        row["us"][name], row["graph"][name] = median_us(call, inputs)
    row["gbps"] = case.bytes_moved / row["us"]["ours"] / 1e3
    row["of_copy_1gib"] = row["gbps"] / roof_gbps
    row["of_copy_same_size"] = row["gbps"] / copy_gbps(case.bytes_moved)
    row["missed"] = missed(case.targets, row)
    return row


def missed(targets: dict[str, float], row: dict[str, Any]) -> list[str]:
    us = row["us"]
    actual = {
        "torch_speedup_min": us["torch"] / us["ours"],
        "compile_speedup_min": us.get("compile", us["torch"]) / us["ours"],
        "copy_fraction_min": row["of_copy_1gib"],
        "us_max": us["ours"],
    }
    wrong = lambda name, limit: actual[name] > limit if name.endswith("max") else actual[name] < limit  # noqa: E731
    return [f"{name} {limit}: {actual[name]:.2f}" for name, limit in targets.items() if wrong(name, limit)]


def table(rows: list[dict[str, Any]]) -> str:
    names = ["ours", "torch", "compile", "twin", "vllm"]
    lines = ["| kernel | batch | " + " | ".join(f"{n} us" for n in names) + " | GB/s | of 1 GiB copy | of same copy |"]
    lines.append("|" + " --- |" * (len(names) + 5))
    for row in rows:
        times = " | ".join(f"{row['us'][n]:.1f}" if n in row["us"] else "" for n in names)
        roof = f"{row['of_copy_1gib']:.0%} | {row['of_copy_same_size']:.0%}"
        lines.append(f"| {row['kernel']} | {row['batch']} | {times} | {row['gbps']:.0f} | {roof} |")
    return "\n".join(lines)


def provenance() -> dict[str, Any]:
    import triton

    sha = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": "python benchmarks/kernels.py " + " ".join(sys.argv[1:]),
        "git_sha": sha or None,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/kernels_<gpu>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels: no CUDA GPU here, nothing to measure", file=sys.stderr)
        return 3
    # This file is called like the PyPI package that transformers, and so vLLM, imports.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    roof = copy_gbps(1 << 30)
    rows = [measure(case, roof) for case in cases("cuda", tuple(args.batch), args.vocab)]
    result = {**provenance(), "vocab": args.vocab, "copy_1gib_gbps": roof, "rows": rows}
    name = "".join(c if c.isalnum() else "_" for c in result["gpu"].lower())
    out = args.out or HERE / "results" / f"kernels_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"copy of 1 GiB: {roof:.0f} GB/s\n\n{table(rows)}\n\n{out}")
    failures = [f"{row['kernel']} batch {row['batch']}: {line}" for row in rows for line in row["missed"]]
    for line in failures:
        print(f"target missed: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
