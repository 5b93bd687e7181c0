"""Prometheus metrics under `nwor_`: the engine core publishes its counters, the API server serves them.

The core and the API server are two processes, and what vLLM sends between them has no room for more numbers: the core
writes a small file of its own in a private folder, once a second and when it runs out of work, and the collector reads
it when it is scraped.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from vllm.v1.metrics.loggers import StatLoggerBase

from nwor_vllm.config import load
from nwor_vllm.plugin import compat
from nwor_vllm.plugin.compat import log

MEMORY = Path("/dev/shm")
EVERY_S = 1.0
COUNTERS = {
    "steps": "Engine steps with tokens in them.",
    "rounds": "Verifications of one request's draft.",
    "draft_forwards": "Forwards of the drafter, its prefill included.",
    "draft_forwards_saved": "Forwards that the step's draft length would have run.",
    "drafted_tokens": "Draft tokens proposed, before trimming.",
    "verified_tokens": "Draft tokens the target verified.",
    "accepted_tokens": "Draft tokens kept.",
    "tokens_stopped_by_confidence": "Draft tokens that early exit left out.",
    "draft_kv_bytes_written": "Logical K/V bytes written by the drafter's layers.",
    "draft_kv_bytes_avoided": "Logical K/V bytes its dead rows did not write.",
    "target_kv_bytes_written": "Logical K/V bytes written by the target's layers.",
    "target_kv_bytes_avoided": "Logical K/V bytes of draft tokens that were trimmed before verification.",
    "step_seconds": "Time in engine steps.",
}
LABELLED = {
    "length_histogram": ("steps_by_draft_length", "draft_length", "Engine steps by planned draft length."),
    "verified_per_position": ("verified_tokens_by_position", "position", "Draft tokens verified, by position."),
    "accepted_per_position": ("accepted_tokens_by_position", "position", "Draft tokens kept, by position."),
}
POLICY = "nwor_policy"
NAMES = frozenset(
    {f"nwor_{name}_total" for name in COUNTERS} | {f"nwor_{name}_total" for name, _, _ in LABELLED.values()} | {POLICY}
)


def file_of(process: int, engine: int) -> Path:
    """One file per engine, by the process that launched it: an API server, or what launched API servers and engines.
    In memory where that is to be had: no step waits for a disk."""
    folder = MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    return folder / f"nwor-{os.getuid()}" / f"{process}-{engine}.json"


def launcher() -> int:
    """What launched this process, or itself: a fork server in between does not count."""
    parent = multiprocessing.parent_process()
    return parent.pid or os.getpid() if parent is not None else os.getpid()


class Publisher:
    """In the engine core."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = 0.0
        self.usable = _private(path.parent)
        if self.usable:
            path.unlink(missing_ok=True)  # of a killed engine whose launcher had the same number
        else:
            log.warning("nwor: Prometheus metrics are disabled: %s is not a folder of this user alone", path.parent)

    def publish(self, counters: Mapping[str, Any], policy: Mapping[str, float], name: str) -> None:
        self.next = time.monotonic() + EVERY_S
        if not self.usable:
            return
        partial = self.path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"counters": counters, "policy": policy, "name": name}))
        partial.replace(self.path)

    def due(self, busy: bool) -> bool:
        """Where nothing is left to do, at once: it would wait for the next request."""
        return not busy or time.monotonic() >= self.next

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def _private(folder: Path) -> bool:
    """A folder that somebody else made under a shared /tmp is not ours to trust."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.lstat()
    except OSError:
        return False
    return owner.st_uid == os.getuid() and not folder.is_symlink() and not owner.st_mode & 0o022


class Collector:
    """In the API server: reads at scrape time."""

    def __init__(self, paths: Sequence[Path], engine: int) -> None:
        self.paths, self.engine = paths, str(engine)

    def read(self) -> dict[str, Any] | None:
        for path in self.paths:
            try:
                found: dict[str, Any] = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # another's, or no step yet
            return found
        return None

    def collect(self) -> Iterator[Any]:
        state = self.read()
        if state is None:
            return
        counters = state["counters"]
        for name, text in COUNTERS.items():
            family = CounterMetricFamily(f"nwor_{name}", text, labels=["engine"])
            family.add_metric([self.engine], counters[name])
            yield family
        for key, (name, label, text) in LABELLED.items():
            family = CounterMetricFamily(f"nwor_{name}", text, labels=["engine", label])
            values = counters[key]
            rows = values.items() if isinstance(values, dict) else enumerate(values, start=1)
            for value, count in rows:
                family.add_metric([self.engine, str(value)], count)
            yield family
        gauge = GaugeMetricFamily(POLICY, "What the policy reports.", labels=["engine", "policy", "value"])
        for value, number in state["policy"].items():
            gauge.add_metric([self.engine, state["name"], value], number)
        yield gauge


def adapt(stock: Callable[[Any], Iterable[Any]]) -> Callable[[Any], Iterable[Any]]:
    """Each of several API servers answers /metrics with what all of them counted into files; ours come with it."""

    @functools.wraps(stock)
    def collect(self: Any) -> Iterable[Any]:
        return [*stock(self), *(family for collector in _collectors for family in collector.collect())]

    return collect


_collectors: list[Collector] = []


class StatLogger(StatLoggerBase):  # type: ignore[misc]
    """vLLM makes one per engine in the API server; it serves our metrics, and says now and then what was stopped."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.collector: Collector | None = None
        self.said = -1
        if vllm_config.speculative_config and load(vllm_config.additional_config, os.environ) is not None:
            paths = [file_of(process, engine_index) for process in (launcher(), os.getpid())]
            self.collector = Collector(paths, engine_index)
            REGISTRY.register(self.collector)
            _collectors.append(self.collector)
            compat.apply("api server")

    def record(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        state = self.collector.read() if self.collector is not None else None
        stopped = state["counters"]["tokens_stopped_by_confidence"] if state else 0
        if stopped != self.said and stopped:
            log.info("nwor: Confidence early exit stats: %d tokens stopped", stopped)
            self.said = stopped
