"""`nwor sweep`: many grids over the devices of a machine. One process an engine group, one engine a set of devices."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from nwor_vllm.bench import plan, provenance, record
from nwor_vllm.bench.bench import say
from nwor_vllm.errors import ConfigError

HEARTBEAT_S = 60.0
TRIES = 2  # a process that died without a word (killed, out of memory) is started once more
GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """One engine group of one grid."""

    grid: Path
    group: str
    runs: int
    devices: int
    tries: int = 0

    @property
    def name(self) -> str:
        return f"{self.grid.stem}/{self.group}"


@dataclass(frozen=True, slots=True)
class Running:
    job: Job
    devices: tuple[str, ...]
    process: subprocess.Popen[bytes]


def configure(parser: argparse.ArgumentParser) -> None:
    plan.add_grid_flags(parser)
    parser.add_argument("more", type=Path, nargs="*", metavar="GRID.yaml", help="further grids")
    parser.add_argument("--devices", help="GPUs to use, as CUDA_VISIBLE_DEVICES takes them (default: all)")
    parser.add_argument(
        "--workers", type=int, default=1, help="engines at a time on a machine without GPUs (default 1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")


def jobs(args: argparse.Namespace, environ: Mapping[str, str]) -> list[Job]:
    found: list[Job] = []
    for path in (args.grid, *args.more):
        single = argparse.Namespace(**{**vars(args), "grid": path})
        grid, out = plan.resolve(single, environ)
        limit = 10**9 if args.retry_failed else record.MAX_ATTEMPTS
        pending: dict[str, Job] = {}
        for item in plan.examine_all(grid, out, single.only, limit):
            if item.runnable:
                engine = item.cell.engine
                job = pending.get(engine.group) or Job(path, engine.group, 0, engine.tensor_parallel_size)
                pending[engine.group] = replace(job, runs=job.runs + 1)
        found += pending.values()
    # Wide engines first: they wait longest for devices. Then the long ones.
    return sorted(found, key=lambda job: (-job.devices, -job.runs))


def pool(args: argparse.Namespace) -> list[str]:
    """What engines are assigned to: GPUs, or places on a machine without them."""
    if args.devices is not None:
        names = [part.strip() for part in args.devices.split(",") if part.strip()]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"--devices is {args.devices!r}; expected different GPUs, such as 0,1")
        return names
    if provenance.gpus():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",") if visible else [str(i) for i in range(len(provenance.gpus()))]
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; expected at least 1")
    return [f"cpu{i}" for i in range(args.workers)]


def command(job: Job, argv: Sequence[str], grids: Sequence[Path]) -> list[str]:
    """`nwor bench` for one group, with the flags this sweep was given."""
    own = {str(path) for path in grids}
    passed, skip = [], False
    for arg in argv:
        if skip or arg in own or arg.startswith(("--devices=", "--workers=")):
            skip = False
        elif arg in ("--devices", "--workers"):
            skip = True
        else:
            passed.append(arg)
    return [sys.executable, "-P", "-m", "nwor_vllm.bench.cli", "bench", str(job.grid), "--group", job.group, *passed]


def run(args: argparse.Namespace) -> int:
    waiting, free = deque(jobs(args, os.environ)), pool(args)
    total = len(waiting)
    if too_wide := next((job for job in waiting if job.devices > len(free)), None):
        raise ConfigError(f"{too_wide.name} needs {too_wide.devices} devices; {len(free)} are given")
    say(f"{total} engine groups, {sum(job.runs for job in waiting)} runs, on {', '.join(free)}")
    if args.dry_run:
        for job in waiting:
            say(f"would run {job.name}: {job.runs} runs on {job.devices} device(s)")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    running: list[Running] = []
    try:
        failed = _work(waiting, running, free, sys.argv[2:], (args.grid, *args.more), total)
    finally:
        _stop(running)
    for name in failed:
        print(f"nwor: failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def _work(
    waiting: deque[Job], running: list[Running], free: list[str], argv: Sequence[str], grids: Sequence[Path], total: int
) -> list[str]:
    failed: list[str] = []
    done, beat = 0, time.monotonic()
    while waiting or running:
        while waiting and len(free) >= waiting[0].devices:
            job = waiting.popleft()
            taken = tuple(free[: job.devices])
            del free[: job.devices]
            running.append(Running(job, taken, _start(job, taken, argv, grids)))
            say(f"{job.name} started on {','.join(taken)}: {job.runs} runs")
        time.sleep(0.2)
        for item in [r for r in running if r.process.poll() is not None]:
            running.remove(item)
            free.extend(item.devices)
            code = item.process.returncode
            if code < 0 and item.job.tries + 1 < TRIES:
                say(f"{item.job.name} was killed by signal {-code}: once more")
                waiting.appendleft(replace(item.job, tries=item.job.tries + 1))
                continue
            done += 1
            say(f"{item.job.name} {'done' if code == 0 else f'ended with {code}'}, {done}/{total}")
            if code != 0:
                failed.append(item.job.name)
        if time.monotonic() - beat > HEARTBEAT_S:
            beat = time.monotonic()
            say(f"{done}/{total} engine groups done, running: {', '.join(r.job.name for r in running)}")
    return failed


def _start(job: Job, taken: Sequence[str], argv: Sequence[str], grids: Sequence[Path]) -> subprocess.Popen[bytes]:
    environ = dict(os.environ)
    if not taken[0].startswith("cpu"):
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    return subprocess.Popen(command(job, argv, grids), env=environ)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(running: Sequence[Running]) -> None:
    for item in running:
        item.process.terminate()
    end = time.monotonic() + GRACE_S
    for item in running:
        try:
            item.process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            item.process.kill()
