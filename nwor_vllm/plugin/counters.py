"""What happened since the engine started, counted where the scheduler lives: true under trimming, one flat JSON."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nwor_vllm.plugin.messages import DraftReport
from nwor_vllm.policy import Round, Step

LATER = 512  # rounds that are counted in one go: a few at a time, out of a cold cache, take several times as long


@dataclass
class Counters:
    """KV bytes are logical: rows times the bytes of one row over all layers of that model."""

    draft_row_bytes: int = 0
    target_row_bytes: int = 0
    steps: int = 0
    draft_forwards: int = 0
    draft_forwards_saved: int = 0  # the step's draft length would have run them
    drafted: int = 0  # proposed, before trimming
    stopped_by_confidence: int = 0  # tokens the step's draft length would have drafted, counted once each
    draft_rows_written: int = 0
    draft_rows_avoided: int = 0
    target_rows_written: int = 0
    target_rows_avoided: int = 0
    step_seconds: float = 0.0
    length_histogram: Counter[int] = field(default_factory=Counter)  # planned draft length -> steps
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (verified, accepted) -> rounds
    rounds: list[Round] = field(default_factory=list)  # not counted yet
    number: int = field(default_factory=itertools.count().__next__)  # a step counts where it was planned

    def report(self, report: DraftReport, skipped_rows: int, caps: Mapping[str, int]) -> None:
        """A drafting; `skipped_rows` target rows will not be verified because of it."""
        self.draft_forwards += report.forwards
        self.draft_forwards_saved += max(report.k - report.forwards, 0)
        self.draft_rows_written += report.rows_written
        self.draft_rows_avoided += report.rows_avoided
        self.target_rows_avoided += skipped_rows
        for request_id, length in report.lengths.items():
            self.stopped_by_confidence += max(min(report.k, caps.get(request_id, report.k)) - length, 0)

    def step(self, step: Step, thought: float = 0.0) -> None:
        """`thought`: seconds that the policy took beside it."""
        self.steps += 1
        self.length_histogram[step.k] += 1
        self.target_rows_written += step.verified_tokens + step.prefill_tokens
        if step.seconds > 0:
            self.step_seconds += step.seconds + thought
        self.rounds += step.rounds
        if len(self.rounds) >= LATER:
            self._count()

    def _count(self) -> None:
        self.drafted += sum([r.drafted for r in self.rounds])
        self.outcomes.update([(r.verified, r.accepted) for r in self.rounds])
        self.rounds.clear()

    def snapshot(self) -> dict[str, Any]:
        """Plain types. The keys are the metrics' names without `nwor_`."""
        self._count()
        verified: Counter[int] = Counter()  # length -> rounds
        accepted: Counter[int] = Counter()
        for (v, a), n in self.outcomes.items():
            verified[v] += n
            accepted[a] += n
        return {
            "steps": self.steps,
            "rounds": self.outcomes.total(),
            "draft_forwards": self.draft_forwards,
            "draft_forwards_saved": self.draft_forwards_saved,
            "drafted_tokens": self.drafted,
            "verified_tokens": sum(length * n for length, n in verified.items()),
            "accepted_tokens": sum(length * n for length, n in accepted.items()),
            "tokens_stopped_by_confidence": self.stopped_by_confidence,
            "draft_kv_bytes_written": self.draft_rows_written * self.draft_row_bytes,
            "draft_kv_bytes_avoided": self.draft_rows_avoided * self.draft_row_bytes,
            "target_kv_bytes_written": self.target_rows_written * self.target_row_bytes,
            "target_kv_bytes_avoided": self.target_rows_avoided * self.target_row_bytes,
            "step_seconds": self.step_seconds,
            "length_histogram": {str(k): n for k, n in sorted(self.length_histogram.items())},
            "verified_per_position": _per_position(verified),
            "accepted_per_position": _per_position(accepted),
        }


class RequestCounts:
    """What the latest requests drafted and kept. Bounded: a server sees requests without end."""

    KEPT = 4096

    def __init__(self) -> None:
        self.requests: OrderedDict[str, list[int]] = OrderedDict()  # rounds, drafted, verified, accepted
        self.rounds: list[Round] = []  # not counted yet

    def add(self, rounds: Sequence[Round]) -> None:
        self.rounds += rounds
        if len(self.rounds) >= LATER:
            self._count()

    def _count(self) -> None:
        for r in self.rounds:
            counts = self.requests.get(r.request_id)
            if counts is None:
                counts = self.requests[r.request_id] = [0, 0, 0, 0]
                if len(self.requests) > self.KEPT:
                    self.requests.popitem(last=False)
            counts[0] += 1
            counts[1] += r.drafted
            counts[2] += r.verified
            counts[3] += r.accepted
        self.rounds.clear()

    def snapshot(self) -> dict[str, dict[str, int]]:
        self._count()
        names = ("rounds", "drafted", "verified", "accepted")
        return {i: dict(zip(names, counts, strict=True)) for i, counts in self.requests.items()}


def _per_position(lengths: Mapping[int, int]) -> list[int]:
    """How many rounds were at least as long as each position, from how many had each length."""
    longest = max(lengths, default=0)
    return [sum(n for length, n in lengths.items() if length > position) for position in range(longest)]
