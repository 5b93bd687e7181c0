"""The temperature-1 half of `nwor verify`: a random pair of eight tokens, whose distribution can be enumerated."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nwor_vllm.bench import distribution, tiny_pair
from nwor_vllm.bench.backends import vllm as backend
from nwor_vllm.bench.verify import MIN_CONTROL_Z, Verdict

VOCAB, LENGTH, BATCH = 8, 4, 250
SHAPE = tiny_pair.Shape(vocab=VOCAB, sharpness=0.14, noise=0.06)
PROMPT = (3, 1, 4, 1, 5, 2, 6, 5)
# The distribution of a drafter of eight tokens is seldom below .3: thresholds sit where they cut about half.
RULES: dict[str, dict[str, Any]] = {
    "fixed": {"policy": "fixed", "early_exit": {"threshold": 0.0, "min_survival": 0.0}},
    "adaptive": {"policy": "goodput", "early_exit": {"threshold": 0.0, "min_survival": 0.0}},
    "early exit": {"policy": "fixed", "early_exit": {"threshold": 0.35, "min_survival": 0.0}},
    "survival": {"policy": "fixed", "early_exit": {"threshold": 0.0, "min_survival": 0.15}},
}
CONTROL: dict[str, Any] = RULES["early exit"]


def check(verdict: Verdict, samples: int, talk: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target, draft = tiny_pair.build(Path(folder), SHAPE, seed=2)
        truth = exact(target)
        for drawn in ("greedy", "probabilistic"):
            speculative = {
                "method": "draft_model",
                "model": str(draft),
                "num_speculative_tokens": LENGTH - 1,
                "draft_sample_method": drawn,
            }
            with backend.engine(target, speculative, **settings()) as llm:
                for name, rule in RULES.items():
                    _record(verdict, f"{name}, {drawn} drafts", _z(llm, rule, samples, truth), samples, talk, llm)
                if drawn == "probabilistic":
                    with backend.keep_by_drawn_token():
                        z = _z(llm, CONTROL, samples, truth)
                    worst = max(abs(value) for value in z.values())
                    verdict.negative_control_caught = worst > MIN_CONTROL_Z
                    verdict.checks.append({"rule": "planted: probability of the drawn token", "z": z})
                    if talk:
                        print(f"planted wrong rule: largest |z| {worst:.1f}", flush=True)


def settings() -> dict[str, Any]:
    return {"max_model_len": 64, "max_num_seqs": BATCH, "max_num_batched_tokens": 4096, "async_scheduling": False}


def exact(target: Path) -> dict[tuple[int, ...], float]:
    """P(continuation) of the target alone, from its own probabilities."""
    prefixes = [t for n in range(LENGTH) for t in itertools.product(range(VOCAB), repeat=n)]
    with backend.engine(target, None, max_logprobs=VOCAB, **settings()) as llm:
        rows = backend.probabilities(llm, [PROMPT + p for p in prefixes], VOCAB)
    return distribution.joint(dict(zip(prefixes, rows, strict=True)), LENGTH)


def _z(llm: Any, rule: Mapping[str, Any], samples: int, truth: Mapping[tuple[int, ...], float]) -> dict[str, float]:
    backend.switch(llm, rule)
    got = backend.generate(llm, [PROMPT] * samples, temperature=1.0, max_tokens=LENGTH)
    return distribution.z_scores(got, truth)


def _record(verdict: Verdict, name: str, z: Mapping[str, float], samples: int, talk: bool, llm: Any) -> None:
    worst = max(abs(value) for value in z.values())
    verdict.compared += samples
    verdict.max_abs_z = max(worst, verdict.max_abs_z or 0.0)
    counts = backend.counters(llm)
    verdict.checks.append({"rule": name, "z": dict(z), "verified_per_position": counts["verified_per_position"]})
    if talk:
        print(f"{name:<32} largest |z| {worst:.2f}  verified {counts['verified_per_position']}", flush=True)
