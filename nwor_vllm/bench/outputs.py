"""Were the generated tokens the same? Where they were not at temperature 0: a tie that rounding broke, or a violation.

A difference is judged at its first token: the target is asked once more, outside the measured time, how probable each
of the two tokens was after the text that both arms share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nwor_vllm.bench.metrics import BatchResult
from nwor_vllm.bench.record import Divergence

# Two tokens this close in log probability are a tie. 16-bit types: two units in the last place of a logit of 16..32,
# which both tokens' logits round to. float32: what sums of a few thousand terms differ by in another order.
NEAR_TIE = {"float32": 1e-3, "float16": 2 * 2.0**-6, "bfloat16": 2 * 2.0**-3}
KEPT = 20  # differences that a record spells out

# For each difference, the log probabilities of the most probable tokens after the shared text.
Score = Callable[[Sequence["Difference"]], Sequence[Mapping[int, float]]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of the subject from another arm in one request. A token is None where that arm had already ended."""

    batch: int
    request: str
    index: int  # of the first token that differs
    subject: int | None
    other: int | None
    shared: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.batch}/{self.request}"


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: Literal["identical", "near_tie", "violation", "sampled"]
    text: str
    differing: int
    violations: int | None
    divergences: tuple[Divergence, ...]


def differences(subject: Sequence[BatchResult], other: Sequence[BatchResult]) -> list[Difference]:
    found = []
    for a, b in zip(subject, other, strict=True):
        for left, right in zip(a.requests, b.requests, strict=True):
            x, y = left.token_ids, right.token_ids
            if x == y:
                continue
            at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
            one, two = x[at] if at < len(x) else None, y[at] if at < len(y) else None
            found.append(Difference(a.index, left.id, at, one, two, x[:at]))
    return found


def judge(
    subject: Sequence[BatchResult], other: Sequence[BatchResult], tolerance: float | None, score: Score
) -> Verdict:
    """`tolerance` None: outputs are sampled. Speculation then promises the distribution, not the draw."""
    found = differences(subject, other)
    if not found:
        return Verdict("identical", "identical", 0, 0, ())
    first = found[0]
    text = f"{len(found)} of {sum(len(b.requests) for b in subject)} differ, first {first.name} at token {first.index}"
    if tolerance is None:
        kept = tuple(_divergence(item, None, "sampled") for item in found[:KEPT])
        return Verdict("sampled", f"{text} (sampled)", len(found), None, kept)
    judged = [_judged(item, scores, tolerance) for item, scores in zip(found, score(found), strict=True)]
    wrong = [item for item in judged if item.verdict == "violation"]
    kept = tuple((wrong + [item for item in judged if item.verdict != "violation"])[:KEPT])
    if not wrong:
        return Verdict("near_tie", f"near tie: {text}", len(found), 0, kept)
    text = f"violation: {text}; {len(wrong)} no tie, first {wrong[0].request} at token {wrong[0].index}"
    return Verdict("violation", text, len(found), len(wrong), kept)


def _judged(item: Difference, scores: Mapping[int, float], tolerance: float) -> Divergence:
    """The margin is how far the less probable of the two lies below the most probable token of all."""
    if item.subject is None or item.other is None or not {item.subject, item.other} <= scores.keys():
        return _divergence(item, None, "violation")
    margin = max(scores.values()) - min(scores[item.subject], scores[item.other])
    return _divergence(item, margin, "near_tie" if margin <= tolerance else "violation")


def _divergence(item: Difference, margin: float | None, verdict: str) -> Divergence:
    why = "outputs are sampled" if verdict == "sampled" else "not both are among the target's most probable tokens"
    fields = {"subject_token": item.subject, "other_token": item.other, "margin": margin}
    reasons = {name: "this arm had ended" for name, value in fields.items() if value is None}
    if margin is None:
        reasons["margin"] = why
    return Divergence.model_validate(
        {"request": item.name, "index": item.index, "verdict": verdict, **fields, "reasons": reasons}
    )
