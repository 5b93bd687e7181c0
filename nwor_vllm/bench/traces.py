"""Acceptance traces: what a drafter would have drafted, and the target kept, from EVERY position of every output.

A recording of round starts at one draft length cannot be replayed at another: rounds then start elsewhere. So a trace
holds, for each output position of each request, the round of the full draft length that starts there: how many drafts
are kept and the drafter's confidences. Any policy can then be replayed exactly: a round that verifies k of them
advances by min(k, accepted) + 1. One file is a zip of arrays (numpy's .npz) with a JSON header; confidences are bytes
of log-odds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.errors import CorruptFileError, MissingError
from nwor_vllm.policy import kind_of

FORMAT, VERSION = "nwor-trace", 1
LOG_ODDS_LIMIT = 12.0
UNKNOWN = 255  # the drafter showed no confidence at this position


@dataclass(frozen=True)
class Trace:
    """Rounds by output position, request after request. `steps` rows: requests, verified, drafts, context, seconds."""

    starts: NDArray[np.int64]  # request r owns positions starts[r] .. starts[r + 1]
    accepted: NDArray[np.int64]  # [positions], 0..k_max
    confidence: NDArray[np.float64]  # [positions, k_max], NaN = none
    categories: tuple[str, ...]  # one per request
    steps: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 5)))
    about: dict[str, Any] = field(default_factory=dict)  # pair, temperature, drafter, versions, command
    kinds: tuple[str, ...] = ()  # as a policy is told them, one per request; none = it is told nothing

    def __post_init__(self) -> None:
        positions, k_max = self.confidence.shape
        problem = (
            "accepted and confidence differ in length" * (len(self.accepted) != positions)
            or "categories and starts differ in length" * (len(self.starts) != len(self.categories) + 1)
            or "kinds and categories differ in length" * (len(self.kinds) not in (0, len(self.categories)))
            or "no request" * (len(self.categories) == 0)
            or "starts do not ascend from 0 to the last position"
            * (self.starts[0] != 0 or self.starts[-1] != positions or bool((np.diff(self.starts) <= 0).any()))
            or "accepted outside 0..k_max" * bool(((self.accepted < 0) | (self.accepted > k_max)).any())
            or "steps need 5 columns" * (self.steps.ndim != 2 or self.steps.shape[1] != 5)
        )
        if problem:
            raise CorruptFileError(f"not a consistent trace: {problem}")

    @property
    def k_max(self) -> int:
        return int(self.confidence.shape[1])

    @property
    def requests(self) -> int:
        return len(self.categories)


def save(trace: Trace, path: Path) -> None:
    """Written beside, then renamed: a file under its final name is complete."""
    header = {"format": FORMAT, "version": VERSION, "categories": trace.categories, "about": trace.about}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            starts=trace.starts.astype(np.int32),
            accepted=trace.accepted.astype(np.uint8),
            confidence=to_bytes(trace.confidence),
            steps=trace.steps.astype(np.float32),
        )
    os.replace(partial, path)


def load(path: Path) -> Trace:
    if not path.is_file():
        raise MissingError(f"no trace at {path}; `nwor record` writes one")
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(bytes(data["header"]))
            if header.get("format") != FORMAT:
                raise CorruptFileError(f"no trace: its format is {header.get('format')!r}, not {FORMAT!r}")
            if header["version"] != VERSION:
                raise CorruptFileError(
                    f"a trace of version {header['version']}; this reads version {VERSION}: record it anew"
                )
            recording = header["about"].get("recording", {})
            kinds = (kind_of(recording["temperature"]),) if "temperature" in recording else ()
            return Trace(
                kinds=kinds * len(header["categories"]),
                starts=data["starts"].astype(np.int64),
                accepted=data["accepted"].astype(np.int64),
                confidence=from_bytes(data["confidence"]),
                categories=tuple(header["categories"]),
                steps=data["steps"].astype(np.float64),
                about=dict(header["about"]),
            )
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, zlib, numpy and json each have errors of their own for damage
        why = str(error).partition("\n")[0] or type(error).__name__
        raise CorruptFileError(f"{path} is damaged or no {FORMAT} file (version {VERSION}): {why}") from error


def to_bytes(confidence: NDArray[np.float64]) -> NDArray[np.uint8]:
    c = np.clip(confidence, 1e-9, 1 - 1e-9)
    with np.errstate(invalid="ignore"):
        odds = np.clip(np.log(c / (1 - c)), -LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)
        code = np.round((odds + LOG_ODDS_LIMIT) * (254 / (2 * LOG_ODDS_LIMIT)))
    return np.where(np.isnan(confidence), UNKNOWN, code).astype(np.uint8)


def from_bytes(code: NDArray[np.uint8]) -> NDArray[np.float64]:
    odds = code.astype(np.float64) * (2 * LOG_ODDS_LIMIT / 254) - LOG_ODDS_LIMIT
    return np.where(code == UNKNOWN, np.nan, 1.0 / (1.0 + np.exp(-odds)))


def select(trace: Trace, requests: Sequence[int]) -> Trace:
    """The chosen requests, in that order; without the steps, which belong to the whole."""
    starts = trace.starts
    rows = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in requests])
    lengths = [int(starts[r + 1] - starts[r]) for r in requests]
    return Trace(
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        accepted=trace.accepted[rows],
        confidence=trace.confidence[rows],
        categories=tuple(trace.categories[r] for r in requests),
        kinds=tuple(trace.kinds[r] for r in requests) if trace.kinds else (),
        about=trace.about,
    )


def join(traces: list[Trace]) -> Trace:
    """All requests of several traces, shortened to the smallest k_max."""
    k = min(t.k_max for t in traces)
    offsets = np.cumsum([0] + [len(t.accepted) for t in traces])
    return Trace(
        starts=np.concatenate([[0]] + [t.starts[1:] + o for t, o in zip(traces, offsets, strict=False)]),
        accepted=np.concatenate([np.minimum(t.accepted, k) for t in traces]),
        confidence=np.concatenate([t.confidence[:, :k] for t in traces]),
        categories=tuple(c for t in traces for c in t.categories),
        kinds=tuple(kind for t in traces for kind in t.kinds or ("",) * t.requests),
        steps=np.concatenate([t.steps for t in traces]),
        about={"joined": [t.about for t in traces]},
    )
