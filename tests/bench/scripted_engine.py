"""An engine whose times are known: what a kill, a failure or a planted slowdown does must not depend on the machine.

scripted_bench.py is `nwor` with this engine.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nwor_vllm.bench import bench, grid, plan
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.measure import run_group
from nwor_vllm.bench.metrics import Counters, RequestResult
from nwor_vllm.bench.ncu import profile
from nwor_vllm.bench.session import Session
from nwor_vllm.bench.workload import Prompt


def models(folder: Path) -> dict[str, str]:
    """Two folders that count as models."""
    for name in ("target", "drafter"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
        (folder / name / "config.json").write_text(json.dumps(shape | {"dtype": "bfloat16"}), encoding="utf-8")
    return {"target": str(folder / "target"), "drafter": str(folder / "drafter")}


class Scripted:
    """Batch time: base, times the arm's factor, times log-normal noise of its own. A request takes as long in an open
    loop. `outputs` are an arm's own tokens, and `scores` what the target says of them."""

    def __init__(self, factors: Mapping[str, float], noise: float = 0.02, seed: int = 0, pause_s: float = 0.0) -> None:
        self.factors, self.noise, self.pause_s = factors, noise, pause_s
        self.rng = random.Random(seed)
        self.arm, self.drafted, self.calls = "", 0, 0
        self.fail_on: str | None = None
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.scores: dict[int, float] = {}
        self.asked: list[tuple[str, list[int]]] = []

    def switch(self, setting: Mapping[str, Any]) -> None:
        threshold = setting["early_exit"]["threshold"]
        length = setting["policy_params"].get("k", "")
        self.arm = setting["policy"] + (f"@{threshold}" if threshold else "")
        self.length = f"fixed_k{length}" if length and not threshold else self.arm

    def generate(self, prompts: Sequence[Prompt], cell: Cell) -> tuple[float, list[RequestResult]]:
        self.calls += 1
        if self.fail_on is not None and self.fail_on in cell.id:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        time.sleep(self.pause_s)
        factor = self.factors.get(self.length, self.factors.get(self.arm, 1.0))
        seconds = factor * self.rng.lognormvariate(0, self.noise)
        self.drafted = 0 if self.arm == "off" else len(prompts) * 10
        results = []
        for prompt in prompts:
            tokens = self.outputs.get(self.arm) or tuple(hashlib.sha256(prompt.text.encode()).digest()[:8])
            rounds = None if self.arm == "off" else ((10, 5), (10, 0))
            latency = 0.024 if cell.request_rate == "inf" else seconds
            results.append(
                RequestResult(
                    prompt.id, tokens, "length", 0.01, 0.002, latency, 12, "text", per_round=rounds,
                    arrival_s=prompt.arrival_s, queue_s=0.001,
                )
            )  # fmt: skip
        return max(seconds, *(prompt.arrival_s for prompt in prompts)), results

    def top_logprobs(self, texts: Sequence[tuple[Prompt, Sequence[int]]], cell: Cell) -> list[dict[int, float]]:
        self.asked += [(prompt.id, list(more)) for prompt, more in texts]
        return [dict(self.scores) for _ in texts]

    def dtype(self) -> str:
        return "float32"

    def counters(self) -> Counters | None:
        return Counters(
            rounds=self.drafted // 10, drafted=self.drafted, verified=self.drafted, accepted=self.drafted // 2,
            accepted_per_position=(self.drafted // 10,), stopped=3 if "@" in self.arm else 0, trimmed=0,
            draft_forwards=self.drafted // 10, k_histogram={10: 1}, draft_kv_bytes_written=0, draft_kv_bytes_avoided=0,
            target_kv_bytes_written=1024, target_kv_bytes_avoided=0,
        )  # fmt: skip

    def peak_memory_bytes(self) -> tuple[int | None, str]:
        return None, "scripted"

    def close(self) -> None:
        pass


def session(driver: Scripted, say: Any = lambda text: None, beside: Any = None) -> Session:
    def open_engine(engine: Engine) -> Scripted:
        return driver

    def no_gpu(cell: Cell) -> profile.Profiled:
        return profile.Profiled("unavailable", "no NVIDIA GPU on this machine") if cell.ncu else profile.NOT_REQUESTED

    return Session(open_engine, beside or open_engine, no_gpu, say, {})


def run_grid(path: Path, out: Path, driver: Scripted, only: str = "") -> list[plan.Planned]:
    loaded = grid.load(path, "embedded", models(out.parent / "models"))
    with bench.locked(out, wait=False):
        groups: dict[str, list[plan.Planned]] = {}
        planned = plan.examine_all(loaded, out, only)
        bench.sweep_temporaries([item for item in planned if item.runnable])
        for item in planned:
            if item.runnable:
                groups.setdefault(item.cell.engine.group, []).append(item)
        return [item for group in groups.values() for item in run_group(group, session(driver))]
