"""Runs a command under ncu: asked first, bounded in time, with a heartbeat, and with nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nwor_vllm.bench.ncu.parse import METRICS, Kernel, read_csv, read_report
from nwor_vllm.errors import CorruptFileError, MissingError

KV_KERNELS = "regex:reshape_and_cache|concat_and_cache|kv_write"
HEARTBEAT_S = 15.0
GRACE_S = 5.0
EXPORT_S = 120.0
DENIED = ("ERR_NVGPUCTRPERM", "RmProfilingAdminOnly")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Probe:
    status: str  # ok, unavailable, denied, timeout, empty, failed
    reason: str = ""
    kernels: tuple[Kernel, ...] = ()
    log_tail: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Ended:
    timed_out: bool
    code: int | None
    tail: tuple[str, ...]


def preflight(gpus: Sequence[str], environ: Mapping[str, str], admin: bool | None = None) -> Probe:
    """Can ncu count here? Each answer that is no says what would make it a yes."""
    if not gpus:
        return Probe("unavailable", "no NVIDIA GPU on this machine")
    if shutil.which("ncu", path=environ.get("PATH")) is None:
        return Probe("unavailable", "ncu is not on PATH; it comes with the CUDA toolkit or Nsight Compute")
    params = Path("/proc/driver/nvidia/params")
    limited = admin if admin is not None else (
        params.is_file() and "RmProfilingAdminOnly: 1" in params.read_text(encoding="utf-8") and os.geteuid() != 0
    )  # fmt: skip
    if limited:
        return Probe(
            "denied", "GPU counters are for administrators here (RmProfilingAdminOnly=1); run as root or allow them"
        )
    return Probe("ok")


def command(report: Path, child: Sequence[str], launches: int, kernel_filter: str = KV_KERNELS) -> list[str]:
    """ncu around a child that brackets its steady steps with cudaProfilerStart and Stop."""
    select = ["-k", kernel_filter] if kernel_filter else []
    return [
        "ncu", "--config-file", "off", "--null-stdin", "--profile-from-start", "off",
        "--target-processes", "all", "--replay-mode", "kernel", "--graph-profiling", "node",
        "--cache-control", "none", "--clock-control", "none", "--kernel-name-base", "function",
        *select, "--launch-count", str(launches), "--metrics", ",".join(METRICS), "-f", "-o", str(report), *child,
    ]  # fmt: skip


def run(
    argv: Sequence[str],
    report: Path,
    log: Path,
    timeout_s: float,
    environ: Mapping[str, str],
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
    heartbeat_s: float = HEARTBEAT_S,
) -> Probe:
    """Run ncu to its end or to the limit, and read what it wrote."""
    report.unlink(missing_ok=True)  # an old report must not pass for this run's
    try:
        ended = bounded(argv, log, timeout_s, environ, say, heartbeat_s)
    except OSError as error:
        return Probe("unavailable", f"ncu could not be started: {error.strerror}")
    tail = ended.tail
    if ended.timed_out:
        return Probe("timeout", f"ncu did not finish in {timeout_s:.0f} s and was stopped", log_tail=tail)
    if any(word in line for line in tail for word in DENIED):
        return Probe(
            "denied", "the driver refused GPU counters (ERR_NVGPUCTRPERM); run as root or allow them", (), tail
        )
    if ended.code != 0:
        return Probe("failed", f"ncu ended with {ended.code}: {_last_word(tail)}", (), tail)
    try:
        kernels = read_report(report)
    except CorruptFileError as error:
        return Probe("empty", str(error), (), tail)
    except MissingError as error:
        say(f"ncu: {error}; asking ncu for CSV instead")
        return _exported(argv[0], report, environ, say)
    return Probe("ok", "", tuple(kernels), tail)


def _exported(ncu: str, report: Path, environ: Mapping[str, str], say: Say) -> Probe:
    """Without the reader: ncu turns its own report into CSV. It is known to hang there, so it is bounded too."""
    argv, log = [ncu, "--import", str(report), "--csv", "--page", "raw"], report.with_suffix(".csv")
    ended = bounded(argv, log, EXPORT_S, environ, say)
    if ended.timed_out:
        return Probe("timeout", f"ncu --csv did not finish in {EXPORT_S:.0f} s; pip install ncu-report reads reports")
    try:
        kernels = read_csv(log.read_text(encoding="utf-8", errors="replace"))
    except CorruptFileError as error:
        return Probe("failed", f"ncu --csv ended with {ended.code}: {error}")
    if not kernels:
        return Probe("empty", f"{report.name} holds no kernels: nothing matched")
    return Probe("ok", "", tuple(kernels))


def _last_word(tail: Sequence[str]) -> str:
    """What ncu complains of, rather than its advice to read the help."""
    spoken = [line for line in tail if line.strip()]
    blamed = [line for line in spoken if "==ERROR==" in line or "unrecognised" in line]
    return blamed[0] if blamed else (spoken or ["no output"])[-1]


def bounded(
    argv: Sequence[str], log: Path, timeout_s: float, environ: Mapping[str, str], say: Say,
    heartbeat_s: float = HEARTBEAT_S, what: str = "ncu",
) -> Ended:  # fmt: skip
    """Run to the end or to the limit. Whatever happens, the process group is gone afterwards."""
    env = {**environ, "LC_ALL": "C", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as sink:
        child = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env, start_new_session=True
        )
        try:
            timed_out = not _wait(child, started, timeout_s, heartbeat_s, say, what)
        finally:
            _kill_group(child)
    tail = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    return Ended(timed_out, child.returncode, tail)


def _wait(
    child: subprocess.Popen[bytes], started: float, limit: float, beat: float, say: Say, what: str
) -> bool:  # fmt: skip
    while True:
        left = started + limit - time.monotonic()
        if left <= 0:
            return False
        try:
            child.wait(min(beat, left))
            return True
        except subprocess.TimeoutExpired:
            say(f"{what}: running for {time.monotonic() - started:.0f} s, limit {limit:.0f} s")


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """The group, not the child alone: ncu's targets outlive ncu."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + (GRACE_S if number == signal.SIGTERM else 1.0)
        while time.monotonic() < end:
            child.poll()
            try:
                os.killpg(child.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)
    child.poll()
