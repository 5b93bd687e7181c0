"""`nwor sweep`: grids or configurations over the devices of a machine or of a Ray cluster; resumable either way."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from nwor_vllm.bench import bench, child, jobs, plan, provenance
from nwor_vllm.bench.jobs import Job
from nwor_vllm.errors import ConfigError

HEARTBEAT_S = 60.0
TRIES = 3  # a worker that died without a word (killed, out of memory, its machine gone) is replaced, so often
GRACE_S = 60.0


class Executor(Protocol):
    """Where engines run."""

    def start(self, job: Job) -> str | None:
        """The place, or None while there is no room."""
        ...

    def ended(self) -> Iterable[tuple[Job, int]]:
        """Exit codes. Below zero the worker is lost, and what it left is worth another try."""
        ...

    def stop(self) -> None: ...


def configure(parser: argparse.ArgumentParser) -> None:
    plan.add_grid_flags(parser, optional=True)
    parser.add_argument("more", type=Path, nargs="*", metavar="GRID.yaml", help="further grids")
    parser.add_argument("--configs", type=Path, nargs="+", help="instead of grids: configurations, each run once")
    parser.add_argument("--group", nargs="+", help="the configurations of these models, such as qwen2_7b")
    parser.add_argument("--benchmark", type=Path, help="with --configs and --group: a JSONL or ShareGPT file")
    parser.add_argument("--output-base", type=Path, help="with --configs and --group: a folder for each inside it")
    parser.add_argument("--on", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    parser.add_argument("--ray-address", help="RAY_ADDRESS: a running cluster (default: one is started here)")
    parser.add_argument("--devices", help="GPUs to use, as CUDA_VISIBLE_DEVICES takes them (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="without GPUs: engines at a time on a machine (1)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")


def run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; expected at least 1")
    waiting = deque(jobs.find(args, os.environ))
    total = sum(len(job.runs) for job in waiting)
    bench.say(f"{len(waiting)} engines to start for {total} runs")
    if args.dry_run:
        for job in waiting:
            bench.say(f"would run {job.name}: {len(job.runs)} runs on {job.devices} device(s)")
        return 0
    if not waiting:
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as held:
        for out in sorted({job.out for job in waiting}):
            held.enter_context(bench.locked(out, wait=False, group="sweep"))
        report = Report([path for job in waiting for path in job.runs], sys.stderr.isatty())
        held.callback(report.close)
        executor = _executor(args, waiting, report)
        held.callback(executor.stop)
        failed = work(waiting, executor, report)
    for name in failed:
        print(f"nwor: failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def _executor(args: argparse.Namespace, waiting: Iterable[Job], report: Report) -> Executor:
    if args.on == "ray":
        from nwor_vllm.bench.on_ray import OnRay

        return OnRay(list(waiting), args.ray_address, args.workers, report.emit)
    free = places(args)
    if wide := next((job for job in waiting if job.devices > len(free)), None):
        raise ConfigError(f"{wide.name} needs {wide.devices} devices; {len(free)} are given")
    return Local(free, report.log)


def work(waiting: deque[Job], executor: Executor, report: Report) -> list[str]:
    """Every job ended or given up; those that failed are named."""
    failed: list[str] = []
    running: dict[str, str] = {}
    beat = time.monotonic()
    while waiting or running:
        while waiting and (where := executor.start(waiting[0])) is not None:
            job = waiting.popleft()
            running[job.name] = where
            report.say(f"{job.name} started on {where}: {len(job.runs)} runs")
        for job, code in executor.ended():
            where = running.pop(job.name)
            if code < 0 and job.tries + 1 < TRIES:
                report.say(f"{job.name} was lost on {where} ({code}): what is left of it starts again")
                waiting.appendleft(replace(job, tries=job.tries + 1))
                continue
            report.say(f"{job.name} {'done' if code == 0 else f'ended with {code}'}, {report.done()}")
            if code != 0:
                failed.append(job.name)
        report.refresh()
        if time.monotonic() - beat > HEARTBEAT_S:
            beat = time.monotonic()
            report.say(f"{report.done()}; running: {', '.join(f'{n} on {w}' for n, w in running.items())}")
    return failed


class Report:
    """On a terminal a bar, with the engines' words in OUT/experiment.log; elsewhere lines."""

    def __init__(self, runs: Sequence[Path], terminal: bool) -> None:
        self.before = {path: _stamp(path) for path in runs}
        self.bar: Any = None
        if terminal:
            from tqdm import tqdm

            self.bar = tqdm(total=len(runs), unit="run", file=sys.stderr)

    def say(self, text: str) -> None:
        if self.bar is None:
            bench.say(text)
        else:
            self.bar.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)

    def log(self, job: Job) -> Any:
        """A file for a child's output, or None: its parent's."""
        return None if self.bar is None else (job.out / "experiment.log").open("ab")

    def emit(self, job: Job, line: str) -> None:
        """A line of a child that has no terminal of ours."""
        file = self.log(job)
        if file is None:
            print(line, flush=True)
            return
        with file:
            file.write(line.encode() + b"\n")

    def count(self) -> int:
        return sum(_stamp(path) != old for path, old in self.before.items())

    def done(self) -> str:
        return f"{self.count()}/{len(self.before)} runs ended"

    def refresh(self) -> None:
        if self.bar is not None:
            self.bar.update(self.count() - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.refresh()
            self.bar.close()


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def places(args: argparse.Namespace) -> list[str]:
    """What engines are assigned to: GPUs, or places on a machine without them."""
    if args.devices is not None:
        names = [part.strip() for part in args.devices.split(",") if part.strip()]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"--devices is {args.devices!r}; expected different GPUs, such as 0,1")
        return names
    if provenance.gpus():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",") if visible else [str(i) for i in range(len(provenance.gpus()))]
    return [f"cpu{i}" for i in range(args.workers)]


@dataclass(frozen=True, slots=True)
class Running:
    job: Job
    taken: tuple[str, ...]
    process: subprocess.Popen[bytes]


class Local:
    """One engine a set of devices of this machine."""

    def __init__(self, free: list[str], log: Callable[[Job], Any]) -> None:
        self.free, self.log = free, log
        self.running: list[Running] = []

    def start(self, job: Job) -> str | None:
        if len(self.free) < job.devices:
            return None
        taken, self.free = tuple(self.free[: job.devices]), self.free[job.devices :]
        environ = dict(os.environ)
        if not taken[0].startswith("cpu"):
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        command = child.command(job.argv(job.config, job.out), child.PROGRAM)
        log = self.log(job)
        try:
            process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        finally:
            if log is not None:
                log.close()
        self.running.append(Running(job, taken, process))
        return ",".join(taken)

    def ended(self) -> list[tuple[Job, int]]:
        time.sleep(0.2)
        over = [item for item in self.running if item.process.poll() is not None]
        for item in over:
            self.running.remove(item)
            self.free.extend(item.taken)
        return [(item.job, item.process.returncode) for item in over]

    def stop(self) -> None:
        for item in self.running:
            item.process.terminate()
        end = time.monotonic() + GRACE_S
        for item in self.running:
            try:
                item.process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                item.process.kill()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
