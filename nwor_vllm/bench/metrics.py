"""From what an engine returned to the numbers of a record. Pure: the clock and the counters come in as arguments."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nwor_vllm.bench import load, stats
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.record import Batch, Distribution, Mode, Ncu
from nwor_vllm.errors import MissingError

Metric = Literal["latency_s", "request_latency_s"]
NO_COUNTERS = "the engine gave no counters"


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request by the engine's own timestamps; None where the engine gave none."""

    id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    ttft_s: float | None
    tpot_s: float | None
    latency_s: float | None
    prompt_tokens: int = 0
    text: str = ""
    rounds: int | None = None  # of speculation, for this request
    drafted: int | None = None
    accepted: int | None = None
    per_round: tuple[tuple[int, int], ...] | None = None  # (verified, accepted)
    arrival_s: float = 0.0  # scheduled, after the start of its batch; times count from here
    queue_s: float | None = None  # from then until the engine took it up


@dataclass(frozen=True, slots=True)
class Counters:
    """What an arm did in its batches: increments, never totals since engine start."""

    rounds: int
    drafted: int  # proposed by the drafter
    verified: int  # scheduled for the target
    accepted: int
    accepted_per_position: tuple[int, ...]
    stopped: int  # tokens never drafted because the drafter was unsure
    trimmed: int  # drafted, but not verified
    draft_forwards: int
    k_histogram: Mapping[int, int]
    draft_kv_bytes_written: int | None = None
    draft_kv_bytes_avoided: int | None = None
    target_kv_bytes_written: int | None = None
    target_kv_bytes_avoided: int | None = None
    cost_model_error: float | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    index: int
    position: int
    seconds: float
    prompts_sha256: str
    requests: tuple[RequestResult, ...]
    counters: Counters | None

    @property
    def tokens(self) -> int:
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def request_latency_s(self) -> float | None:
        """Mean over its requests; None where the engine gave no times."""
        known = [request.latency_s for request in self.requests if request.latency_s is not None]
        return sum(known) / len(known) if known and len(known) == len(self.requests) else None

    def time(self, metric: Metric) -> float:
        """What arms are compared by."""
        if metric == "latency_s":
            return self.seconds
        if self.request_latency_s is None:
            raise MissingError("the engine gave no request times, and arrivals over time are judged by nothing else")
        return self.request_latency_s


@dataclass(frozen=True, slots=True)
class ArmLabel:
    mode: Literal["vanilla", "vanilla_engine", "fixed", "adaptive", "early_exit", "both", "repeat"]
    role: Literal["subject", "reference"]
    policy: str
    draft_length: int
    threshold: float


def judged_by(cell: Cell) -> Metric:
    """A batch that arrives over time ends when its last request has come, however fast the engine is."""
    return "latency_s" if cell.request_rate == "inf" else "request_latency_s"


KV_FIELDS = ("draft_kv_bytes_written", "draft_kv_bytes_avoided", "target_kv_bytes_written", "target_kv_bytes_avoided")


def distribution(values: Sequence[float | None]) -> Distribution:
    known = [value for value in values if value is not None]
    reasons: dict[str, str] = {}
    if not known:
        gone = dict.fromkeys(("mean", "p50", "p95", "p99"), "the engine gave no such timestamps")
        return Distribution(n=0, mean=None, p50=None, p95=None, p99=None, reasons=gone)
    tails = {name: stats.quantile(known, q) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
    for name, q in (("p95", 0.95), ("p99", 0.99)):
        if tails[name] is None:
            reasons[name] = stats.not_estimable(len(known), q)
    return Distribution(n=len(known), mean=sum(known) / len(known), **tails, reasons=reasons)


def output_hash(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]


def combine(parts: Sequence[Counters]) -> Counters:
    """The counters of several batches as one."""
    longest = max((len(part.accepted_per_position) for part in parts), default=0)
    histogram: Counter[int] = Counter()
    for part in parts:
        histogram.update(part.k_histogram)

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    def known(name: str) -> int | None:
        found = [getattr(part, name) for part in parts]
        return None if None in found else sum(found)

    errors = sorted(part.cost_model_error for part in parts if part.cost_model_error is not None)
    return Counters(
        rounds=total("rounds"),
        drafted=total("drafted"),
        verified=total("verified"),
        accepted=total("accepted"),
        accepted_per_position=tuple(
            sum(part.accepted_per_position[i] for part in parts if i < len(part.accepted_per_position))
            for i in range(longest)
        ),
        stopped=total("stopped"),
        trimmed=total("trimmed"),
        draft_forwards=total("draft_forwards"),
        k_histogram=dict(sorted(histogram.items())),
        **{name: known(name) for name in KV_FIELDS},
        cost_model_error=errors[len(errors) // 2] if errors else None,
    )


def summarise(
    label: ArmLabel, batches: Sequence[BatchResult], slo: load.Slo, ncu: Ncu,
    ncu_metrics: dict[str, float] | None = None,
) -> Mode:  # fmt: skip
    """One arm of a record."""
    seconds = [batch.seconds for batch in batches]
    requests = [request for batch in batches for request in batch.requests]
    tokens, wall = sum(batch.tokens for batch in batches), sum(seconds)
    reasons: dict[str, str] = {}
    tails = {name: stats.quantile(seconds, q) for name, q in (("p95", 0.95), ("p99", 0.99))}
    for name, q in (("p95", 0.95), ("p99", 0.99)):
        if tails[name] is None:
            reasons[f"latency_{name}_s"] = stats.not_estimable(len(seconds), q)
    if ncu_metrics is None:
        reasons["ncu_metrics"] = ncu.reason or ncu.status
    good, why = _good(requests, slo)
    if good is None:
        reasons |= dict.fromkeys(("goodput_req_s", "slo_met_share"), why)
    no_speculation: Any = None
    if label.policy == "off":  # as a reference in the subject's engine; else that engine has no drafter at all
        in_engine = label.mode == "vanilla" and label.role == "reference"
        no_speculation = "k0_in_engine" if in_engine else "engine_without_drafter"
    else:
        reasons["no_speculation"] = "this arm speculates"
    found = [batch.counters for batch in batches]
    counters = combine([c for c in found if c is not None]) if found and None not in found else None
    speculation = _speculation(counters, reasons)
    return Mode(
        mode=label.mode, role=label.role, no_speculation=no_speculation, policy=label.policy,
        draft_length=label.draft_length, threshold=label.threshold,
        latency_avg_s=wall / len(seconds), latency_p50_s=stats.quantile(seconds, 0.5),
        latency_p95_s=tails["p95"], latency_p99_s=tails["p99"],
        throughput_tok_s=tokens / wall, total_tokens=tokens, requests=len(requests),
        finish_reasons=dict(sorted(Counter(request.finish_reason for request in requests).items())),
        request_latency_s=distribution([request.latency_s for request in requests]),
        ttft_s=distribution([request.ttft_s for request in requests]),
        tpot_s=distribution([request.tpot_s for request in requests]),
        queue_s=distribution([request.queue_s for request in requests]),
        goodput_req_s=None if good is None else good / wall,
        slo_met_share=None if good is None else good / len(requests), **speculation, ncu_metrics=ncu_metrics, ncu=ncu,
        outputs_sha256={f"{b.index}/{r.id}": output_hash(r.token_ids) for b in batches for r in b.requests},
        batches=[_batch(batch) for batch in batches], reasons=reasons,
    )  # fmt: skip


def _batch(batch: BatchResult) -> Batch:
    return Batch(
        index=batch.index, position=batch.position, seconds=batch.seconds, tokens=batch.tokens,
        prompts_sha256=batch.prompts_sha256, request_latency_s=batch.request_latency_s,
        spec_num_draft_tokens=batch.counters.drafted if batch.counters else None,
        spec_num_accepted_tokens=batch.counters.accepted if batch.counters else None,
    )  # fmt: skip


def _good(requests: Sequence[RequestResult], slo: load.Slo) -> tuple[int | None, str]:
    """How many requests met every objective; or None, and why."""
    if not slo:
        return None, "no objective was set: --slo ttft:MS tpot:MS e2el:MS"
    judged = [load.met(slo, r.ttft_s, r.tpot_s, r.latency_s) for r in requests]
    if None in judged:
        return None, "the engine gave no timestamps"
    return sum(map(bool, judged)), ""


def _speculation(counters: Counters | None, reasons: dict[str, str]) -> dict[str, Any]:
    """The speculative fields. Ratios of nothing are null, not 0."""
    names = ("spec_num_draft_tokens", "spec_num_accepted_tokens", "spec_num_rounds", "spec_acceptance_ratio",
             "spec_mean_accepted_length", "spec_acceptance_per_position", "tokens_stopped_by_confidence",
             "tokens_trimmed_by_survival", "draft_forwards", "k_histogram", "cost_model_error", *KV_FIELDS)  # fmt: skip
    fields: dict[str, Any] = dict.fromkeys(names)
    if counters is None:
        reasons.update(dict.fromkeys(names, NO_COUNTERS))
        return fields
    fields |= {
        "spec_num_draft_tokens": counters.drafted, "spec_num_accepted_tokens": counters.accepted,
        "spec_num_rounds": counters.rounds, "tokens_stopped_by_confidence": counters.stopped,
        "tokens_trimmed_by_survival": counters.trimmed, "draft_forwards": counters.draft_forwards,
        "k_histogram": {str(k): n for k, n in counters.k_histogram.items()},
        "cost_model_error": counters.cost_model_error, **{name: getattr(counters, name) for name in KV_FIELDS},
    }  # fmt: skip
    if counters.drafted:
        fields["spec_acceptance_ratio"] = counters.accepted / counters.drafted
    if counters.rounds:
        fields["spec_mean_accepted_length"] = 1 + counters.accepted / counters.rounds
        fields["spec_acceptance_per_position"] = [n / counters.rounds for n in counters.accepted_per_position]
    why = {
        "spec_acceptance_ratio": "nothing was drafted", "spec_mean_accepted_length": "no round speculated",
        "spec_acceptance_per_position": "no round speculated", "cost_model_error": "this policy has no cost model",
        **dict.fromkeys(KV_FIELDS, "the engine does not count K/V rows"),
    }  # fmt: skip
    reasons.update({name: text for name, text in why.items() if fields[name] is None})
    return fields
