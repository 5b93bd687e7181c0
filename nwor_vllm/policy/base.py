"""The one interface between policies and what runs rounds: the plugin, the local loop, the split loop, the simulator.

A step asks `plan` how far to draft, runs, and reports with `observe`. Nothing here knows torch, vLLM or the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class StopRule:
    """When the drafter stops inside a step. Zero thresholds and costs switch a clause off.

    The exact rule, for row r with cap_r and bias_r (from the plan; none = k and 0), draft position j = 1, 2, ..., k and
    c_rj the confidence there (the draft distribution's max probability; NaN counts as 0):

        p_rj = sigmoid(a_j + b_j * clip(log(c_rj / (1 - c_rj)), -12, 12) + bias_r),  (a_j, b_j) = calibration[j-1]
        S_rj = S_r,j-1 * p_rj,  R_rj = R_r,j-1 * c_rj,  S_r0 = R_r0 = 1,  every row with cap_r >= 1 starts alive
        an alive row keeps slot j if  c_rj >= threshold  and  R_rj >= min_survival  and  S_rj >= verify_cost;
        otherwise the slot is not verified and the row is dead; a row is also dead after keeping slot cap_r
        draft step j+1 runs if  j < k,  a row is alive,  and, where draft_cost > 0,
            sum over alive r of  max(0, S_rj * h_j+1 - verify_cost)  >  draft_cost,   h_j = hazard[j-1]

    Positions past the end of `calibration` or `hazard` use the last entry; empty calibration means (0, 1), empty hazard
    means p_rj itself. The first draft step always runs: a plan with k = 0 is how not to draft. Costs are in accepted
    tokens: what one verified slot, and one more draft step of the whole batch, must bring to pay for itself.
    `nwor_vllm.policy.stop.evaluate` is this rule in numpy.
    """

    threshold: float = 0.0
    min_survival: float = 0.0
    verify_cost: float = 0.0
    draft_cost: float = 0.0
    calibration: tuple[tuple[float, float], ...] = ()
    hazard: tuple[float, ...] = ()

    @property
    def active(self) -> bool:
        return bool(self.threshold or self.min_survival or self.verify_cost or self.draft_cost)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the coming step may draft: `k` for the batch, `caps` for requests that get less.

    `bias` shifts the log-odds of a request's calibrated confidences: what its own history says beyond the confidence.
    `watch` asks for the confidences where no rule needs them: they cost time at every draft position.
    """

    k: int
    caps: Mapping[str, int] = field(default_factory=dict)
    stop: StopRule | None = None
    bias: Mapping[str, float] = field(default_factory=dict)
    watch: bool = True


class Round(NamedTuple):
    """One request's finished round. Positions after `accepted` + 1 were not observed (the rejection censors them), and
    what lies beyond a text's end is neither verified nor accepted."""

    request_id: str
    drafted: int  # proposed by the drafter, before trimming
    verified: int  # scheduled for the target, after trimming
    accepted: int  # kept, without the bonus token
    confidence: tuple[float, ...] = ()  # of the drafted positions; empty where the drafter shows none


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step as measured. A round of every running request, plus what it cost."""

    rounds: Sequence[Round]
    k: int  # the draft length the step was planned with
    draft_steps: int  # draft forwards really run, at most k
    seconds: float  # wall time of the step, without the policy's own; NaN or <= 0 means unknown
    requests: int  # requests that decoded, speculating or not
    verified_tokens: int  # target rows: drafts verified + one per request
    context_tokens: int = 0  # sum of context lengths
    prefill_tokens: int = 0  # prompt tokens that the step computed beside its rounds
    judged_steps: int = 0  # draft forwards whose confidence was read
    prompts: int = 0  # requests that had no round in it, as their prompt was computed


def kind_of(temperature: float, label: str = "") -> str:
    """What is known of a request before its first draft: drafts for greedy ones are kept more often."""
    return f"{label} {'sampled' if temperature else 'greedy'}".strip()


class Policy(Protocol):
    """Decides draft lengths, learns from rounds. Deterministic: same calls, same answers."""

    name: str

    def begin(self, request_id: str, kind: str) -> None:
        """A request comes, and this is its kind. Of requests that were never begun nothing is known."""
        ...

    def plan(self, requests: Sequence[str], context_tokens: int = 0) -> Plan: ...

    def observe(self, step: Step) -> None: ...

    def forget(self, request_id: str) -> None:
        """The request is finished or aborted."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """The learnt state, JSON-serialisable; `restore` of it continues exactly."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def metrics(self) -> dict[str, float]:
        """Flat numbers for logs and Prometheus."""
        ...
