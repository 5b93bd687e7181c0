"""The sampled half of `nwor verify`: a random pair of eight tokens, whose distribution can be enumerated."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nwor_vllm.bench import distribution, tiny_pair
from nwor_vllm.bench.backends import vllm as backend
from nwor_vllm.bench.verify_journal import Check, Journal
from nwor_vllm.policy import Step

VOCAB, LENGTH, BATCH = 8, 4, 250
SHAPE = tiny_pair.Shape(vocab=VOCAB, sharpness=0.14, noise=0.06)
PROMPT = (3, 1, 4, 1, 5, 2, 6, 5)
MIN_CONTROL_Z = 6.0  # what the planted rule must reach
Truth = Mapping[tuple[int, ...], float]
Mode = tuple[bool, str]  # asynchronous; how drafts are drawn
MODES: tuple[Mode, ...] = tuple(itertools.product((False, True), ("greedy", "probabilistic")))


def _rule(policy: str, threshold: float = 0.0, survival: float = 0.0, **rest: Any) -> dict[str, Any]:
    exits = {"threshold": threshold, "min_survival": survival, "policy_rule": rest.pop("policy_rule", False)}
    return {"policy": policy, "policy_params": {}, "early_exit": exits, "per_request": False, **rest}


CUT = 0.35  # the likeliest of eight tokens seldom has less than .3: this cuts about half
RULES: dict[str, dict[str, Any]] = {
    "fixed": _rule("fixed"),
    "zero": _rule("fixed", policy_params={"k": 0}),
    "early exit": _rule("fixed", threshold=CUT),
    "survival": _rule("fixed", survival=0.15),
    "acceptance": _rule("acceptance"),
    "throughput": _rule("throughput"),
    "feedback": _rule("feedback"),
    "adaptive": _rule("goodput"),
    "stop rule": _rule("goodput", policy_rule=True),
    "per request": _rule("goodput", per_request=True),
    "both": _rule("goodput", threshold=CUT, survival=0.15, policy_rule=True, per_request=True),
}
FEW = ("fixed", "early exit", "both")  # where a worker trims, or another runner does: policies see no difference
WATCHED = _rule("fixed", threshold=0.01)  # stops nothing, and has every draft token pass the place of the mistake
PLANTED = "planted: probability of the drawn token"


def rules_of(runner: str, mode: Mode, interpreted: bool) -> list[str]:
    """Interpreted, where a continuation takes a tenth of a second: what has every way of ending a draft in it."""
    rules = FEW[-1:] if interpreted else FEW if mode[0] or runner == "v2" else tuple(RULES)
    return [*rules, *([PLANTED] if mode[1] == "probabilistic" else [])]


def check(runner: str, samples: int, journal: Journal, cells: Mapping[Mode, Sequence[str]] | None = None) -> None:
    """Every rule of `cells`, or of all modes, that the journal has not."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    cells = cells or {mode: rules_of(runner, mode, interpreted) for mode in MODES}
    missing = {
        mode: [rule for rule in rules if _named(runner, mode, rule).name not in journal.checks]
        for mode, rules in cells.items()
    }
    journal.expect([_named(runner, mode, rule).name for mode in cells for rule in cells[mode]])
    if not any(missing.values()):
        return
    with tempfile.TemporaryDirectory() as folder:
        target, draft = tiny_pair.build(Path(folder), SHAPE, seed=2)
        truth = exact(target)
        for (asynchronous, drawn), rules in missing.items():
            speculative = {
                "method": "draft_model",
                "model": str(draft),
                "num_speculative_tokens": LENGTH - 1,
                "draft_sample_method": drawn,
            }
            if not rules:
                continue
            with backend.engine(target, speculative, **settings(asynchronous)) as llm:
                backend.demand(llm, runner, asynchronous)
                for rule in rules:
                    journal.add(_measure(llm, _named(runner, (asynchronous, drawn), rule), samples, truth))


def settings(asynchronous: bool = False) -> dict[str, Any]:
    return {
        "max_model_len": 64,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": 4096,
        "async_scheduling": asynchronous,
    }


def exact(target: Path) -> dict[tuple[int, ...], float]:
    """P(continuation) of the target alone, from its own probabilities."""
    prefixes = [t for n in range(LENGTH) for t in itertools.product(range(VOCAB), repeat=n)]
    with backend.engine(target, None, max_logprobs=VOCAB, **settings()) as llm:
        rows = backend.probabilities(llm, [PROMPT + p for p in prefixes], VOCAB)
    return distribution.joint(dict(zip(prefixes, rows, strict=True)), LENGTH)


def _named(runner: Any, mode: Mode, rule: str) -> Check:
    place: dict[str, Any] = {"asynchronous": mode[0], "drafter": "draft_model", "scene": f"{mode[1]} drafts"}
    return Check(runner=runner, rule=rule, planted=rule == PLANTED, **place)


def _measure(llm: Any, named: Check, samples: int, truth: Truth) -> Check:
    if named.planted:
        with backend.keep_by_drawn_token(CUT):
            z = _z(llm, WATCHED, samples, truth)
        return named.model_copy(
            update={"compared": samples, "z": z, "caught": max(map(abs, z.values())) > MIN_CONTROL_Z}
        )
    rule = RULES[named.rule]
    z = _z(llm, rule, samples, truth)
    counts = backend.counters(llm)
    names = ("verified_tokens", "accepted_tokens", "draft_forwards_saved", "tokens_stopped_by_confidence")
    return named.model_copy(
        update={
            "compared": samples,
            "z": z,
            "met": _met(rule, counts, samples),
            "counts": {name: counts[name] for name in names},
            "verified_per_position": counts["verified_per_position"],
        }
    )


def _met(rule: Mapping[str, Any], counts: Mapping[str, int], samples: int) -> bool:
    """A rule that verified little proves little, and so does a threshold that stopped nothing."""
    if rule is RULES["zero"]:
        return not counts["verified_tokens"]
    exits = rule["early_exit"]["threshold"] or rule["early_exit"]["min_survival"]
    stopped = counts["tokens_stopped_by_confidence"] > samples / 4 or not exits
    return counts["verified_tokens"] > samples / 4 and stopped


def _seconds(step: Step) -> float:
    """On a CPU 250 requests of a tiny model are not worth a draft, and a policy that drafts nothing proves nothing."""
    return 1e-3 * (1.0 + 0.01 * step.draft_steps + 0.0001 * step.verified_tokens)


def _z(llm: Any, rule: Mapping[str, Any], samples: int, truth: Truth) -> dict[str, float]:
    backend.switch(llm, rule)
    backend.price(llm, _seconds)
    got = backend.generate(llm, [PROMPT] * samples, temperature=1.0, max_tokens=LENGTH)
    return distribution.z_scores(got, truth)
