"""The record of a run: what its JSON may hold, how it is written, how it is read.

Unknown is null with a reason, never 0, and NaN cannot be expressed. A file under its final name is always complete and
valid: it is written beside, checked, and renamed. A failed run is a record too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from nwor_vllm.bench.grid import Cell, Frozen, first_problem
from nwor_vllm.errors import CorruptFileError, MissingError

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).parent / "schema" / "record.schema.json"
UNREADABLE = (CorruptFileError, MissingError)
MAX_ATTEMPTS = 3  # a run that failed this often waits for --retry-failed


class Measured(Frozen):
    """Every null measurement says why in `reasons`; nothing that was measured may have a reason."""

    reasons: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _null_has_a_reason(self) -> Measured:
        null = {name for name in type(self).model_fields if getattr(self, name) is None}
        if missing := sorted(null - self.reasons.keys()):
            raise ValueError(f"{missing[0]} is null without a reason in `reasons`")
        if extra := sorted(self.reasons.keys() - null):
            raise ValueError(f"`reasons` explains {extra[0]}, which is not null")
        return self


class Distribution(Measured):
    """Seconds, over requests or batches. A tail quantile that the sample cannot carry is null."""

    n: int = Field(ge=0)
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


class Batch(Frozen):
    index: int = Field(ge=0)
    position: int = Field(ge=0)  # when the arm ran within the batch's interleaving
    seconds: float = Field(gt=0)
    tokens: int = Field(ge=0)
    prompts_sha256: str
    request_latency_s: float | None = None  # mean over its requests
    spec_num_draft_tokens: int | None = None
    spec_num_accepted_tokens: int | None = None


class Ncu(Measured):
    """Nsight Compute, or why not. The three byte counts stand side by side with what arithmetic expects."""

    status: Literal["ok", "not_requested", "unavailable", "denied", "timeout", "empty", "failed", "contradiction"]
    reason: str = ""
    window: str = ""  # what was profiled
    kernels: int | None  # that were profiled
    store_bytes: float | None  # sectors the kernels wrote to L2, times 32
    dram_bytes: float | None  # DRAM writes of the window
    logical_bytes: float | None  # K/V rows our counters say were written
    analytic_bytes: float | None  # K/V rows times bytes a row, from the model's shape


class Mode(Measured):
    """One arm as measured. `per_mode[0]` is the run's subject; the others were interleaved with it on equal prompts."""

    mode: Literal["vanilla", "vanilla_engine", "fixed", "adaptive", "early_exit", "both", "repeat"]
    role: Literal["subject", "reference"]
    no_speculation: Literal["k0_in_engine", "engine_without_drafter"] | None  # how this arm does without
    policy: str
    draft_length: int = Field(ge=0)
    threshold: float = Field(ge=0, le=1)
    latency_avg_s: float = Field(gt=0)  # of a batch
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    throughput_tok_s: float = Field(gt=0)
    total_tokens: int = Field(ge=0)
    requests: int = Field(ge=1)
    finish_reasons: dict[str, int]
    request_latency_s: Distribution
    ttft_s: Distribution
    tpot_s: Distribution
    queue_s: Distribution  # from the scheduled arrival until the engine took the request up
    goodput_req_s: float | None  # requests a second that met every objective
    slo_met_share: float | None = Field(ge=0, le=1)  # and their share
    spec_num_draft_tokens: int | None
    spec_num_accepted_tokens: int | None
    spec_num_rounds: int | None
    spec_acceptance_ratio: float | None = Field(ge=0, le=1)
    spec_mean_accepted_length: float | None  # tau: accepted + 1
    spec_acceptance_per_position: list[float] | None
    tokens_stopped_by_confidence: int | None
    tokens_trimmed_by_survival: int | None
    draft_forwards: int | None
    k_histogram: dict[str, int] | None
    draft_kv_bytes_written: int | None  # logical: rows times the bytes of a row over all layers
    draft_kv_bytes_avoided: int | None
    target_kv_bytes_written: int | None
    target_kv_bytes_avoided: int | None
    cost_model_error: float | None  # median |predicted - measured| / measured of a step
    ncu_metrics: dict[str, float] | None
    ncu: Ncu
    outputs_sha256: dict[str, str]  # request id -> hash of its token ids
    batches: list[Batch] = Field(min_length=1)


class Divergence(Measured):
    """Where one request's output first differs between two arms."""

    request: str
    index: int = Field(ge=0)  # of the token
    subject_token: int | None
    other_token: int | None
    margin: float | None  # how far the less probable of the two lies below the target's first choice, in nats
    verdict: Literal["near_tie", "violation", "sampled"]


class Ratio(Measured):
    """A paired comparison of the subject with another arm of the same run: below 1 the subject took less time."""

    against: str
    metric: Literal["latency_s", "request_latency_s"]  # of batches; of requests, where they arrive over time
    n: int = Field(ge=1)
    ratio: float = Field(gt=0)
    low: float | None
    high: float | None
    p: float | None = Field(ge=0, le=1)
    mde: float | None  # the smallest relative change that n batches would have shown, at 80 % power
    verdict: Literal["identical", "near_tie", "violation", "sampled"]  # on the outputs
    outputs: str  # the same in words
    divergences: list[Divergence] = Field(default_factory=list)  # the first of them, violations before near ties


class BestFixed(Measured):
    """The fixed draft length that was best in hindsight, and the subject against it.

    The luckiest of several is chosen after the fact, so the comparison leans against the subject.
    """

    draft_length: int = Field(ge=1)
    metric: Literal["latency_s", "request_latency_s"]
    candidates: dict[str, float]  # draft length -> mean of the metric
    tied_with: list[int]  # lengths that the batches do not tell from the best, at 95 %
    n: int = Field(ge=1)
    ratio: float = Field(gt=0)
    low: float | None
    high: float | None
    p: float | None = Field(ge=0, le=1)
    mde: float | None


class Summary(Measured):
    per_mode: list[Mode] = Field(min_length=1)
    best_fixed: BestFixed | None


class Warmup(Measured):
    """How far the arms had settled: the median time of a token in the later half of their blocks over the earlier."""

    blocks: int = Field(ge=0)
    limit: int = Field(ge=0)
    tolerance: float
    settled: bool | None
    changes: dict[str, float]  # arm -> relative change


class Failure(Frozen):
    exception: str
    message: str
    advice: str
    log_tail: list[str] = Field(max_length=40)


class Record(Measured):
    schema_version: Literal[1] = 1
    status: Literal["done", "failed"]
    grid: str
    id: str
    file: str
    key: str  # hash of the cell's content: settings, versions, dataset, models, hardware, code
    config_key: str  # hash of its settings and dataset alone: what comparisons pair by
    panel: str
    headline: bool
    attempts: int = Field(ge=1)
    started_at: str
    seconds: float = Field(ge=0)
    cell: Cell
    provenance: dict[str, Any]
    flags: list[str] = Field(default_factory=list)  # what a reader should know: throttling, noise, unsettled warm-up
    warmup: Warmup | None
    peak_memory_bytes: int | None
    summary: Summary | None
    comparisons: list[Ratio] = Field(default_factory=list)
    failure: Failure | None

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if self.status == "done":
            if self.summary is None:
                raise ValueError("a done run needs a summary")
            subject = self.summary.per_mode[0]
            if subject.mode != self.cell.arm or subject.role != "subject":
                raise ValueError(
                    f"per_mode[0] is {subject.mode!r} as {subject.role}; expected the subject {self.cell.arm!r}"
                )
        elif self.failure is None:
            raise ValueError("a failed run needs a failure")
        return self


def to_json(record: Record) -> str:
    return json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def parse(text: str, where: str) -> Record:
    """A record from text; anything else is a CorruptFileError that says what is wrong."""
    if not text.strip():
        raise CorruptFileError(f"{where} is empty")
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_int=_small)
        if "\\ud" in text.casefold():  # half a surrogate pair is JSON, and no text that could be shown
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is not JSON: {str(error)[:120]}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise CorruptFileError(f"{where} has schema_version {version!r}; this program reads {SCHEMA_VERSION}")
    try:
        record: Record = Record.model_validate(data)
    except ValidationError as error:
        raise CorruptFileError(str(first_problem(error, where))) from None
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _small(digits: str) -> int:
    """Nothing that is counted here fills 64 bits, and a float cannot hold what is much larger."""
    if len(digits) > 19:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def read(path: Path) -> Record:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def write(record: Record, path: Path) -> None:
    """Beside, checked, renamed: a reader of `path` sees the old record or the new one, complete."""
    text = to_json(record)
    parse(text, str(path))
    replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def schema_text() -> str:
    return json.dumps(Record.model_json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
