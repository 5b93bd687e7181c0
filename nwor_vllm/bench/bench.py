"""`nwor bench`: run what a grid still lacks: all of it, one engine group, or the runs named by --only."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from nwor_vllm.bench import plan, record, sidecars, study
from nwor_vllm.bench.grid import Grid
from nwor_vllm.bench.measure import run_group
from nwor_vllm.bench.ncu import profile
from nwor_vllm.bench.plan import Planned
from nwor_vllm.bench.provenance import REPRODUCIBLE, require_models
from nwor_vllm.bench.session import Session
from nwor_vllm.errors import ConfigError, NworError

HEARTBEAT_S = 60.0
# What --benchmark says otherwise.
GRID_ONLY = {
    "out": "--output-dir", "profile": "the variable PROFILE", "target": "--model", "dataset": "--benchmark itself",
    "drafter": "`speculative_decoding.model` of --config", "method": "`speculative_decoding.method` of --config",
    "tensor_parallel_size": "`engine.tensor_parallel_size` of --config", "seeds": "an --output-dir each",
    "only": "one run, always",
}  # fmt: skip


class Busy(NworError):
    """Another process works on the same grid."""

    exit_code = 75


def configure(parser: argparse.ArgumentParser) -> None:
    plan.add_grid_flags(parser, optional=True)
    parser.add_argument("--benchmark", type=Path, help="instead of a grid: a JSONL or ShareGPT file, run once")
    parser.add_argument("--config", type=Path, help="with --benchmark: model, generation, engine, speculative_decoding")
    parser.add_argument("--model", help="with --benchmark: the target, over the one in --config")
    parser.add_argument(
        "--gamma", nargs="+", metavar="K", help="with --benchmark: each of these draft lengths, interleaved"
    )
    parser.add_argument("--output-dir", type=Path, help="with --benchmark: metrics.json, responses.jsonl, config.yaml")
    parser.add_argument("--group", help="only this engine group (as `nwor plan --groups` prints them)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    parser.add_argument("--wait", action="store_true", help="wait while another process works on this grid")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@contextmanager
def heartbeat(estimate_s: float | None, every_s: float = HEARTBEAT_S) -> Iterator[None]:
    """A line a minute: a silent log and a hung run look alike."""
    started, stop = time.monotonic(), threading.Event()

    def beat() -> None:
        while not stop.wait(every_s):
            elapsed = time.monotonic() - started
            left = "" if estimate_s is None else f", about {max(estimate_s - elapsed, 0) / 60:.1f} min left"
            say(f"still running after {elapsed / 60:.1f} min{left}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def locked(out: Path, wait: bool, group: str | None = None) -> Iterator[None]:
    """One process a grid, or one an engine group. The kernel frees a lock when its holder dies, however it dies."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(_lock(out, ".lock", fcntl.LOCK_EX if group is None else fcntl.LOCK_SH, wait))
        if group is not None:
            held.enter_context(_lock(out, f".lock.{group}", fcntl.LOCK_EX, wait))
        yield


@contextmanager
def _lock(out: Path, name: str, kind: int, wait: bool) -> Iterator[None]:
    with (out / name).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Busy(f"{out} is being worked on by another process; wait for it, or use --wait") from None
            say(f"{out} is being worked on by another process: waiting")
            fcntl.flock(file, kind)
        yield


def sweep_temporaries(planned: Sequence[Planned]) -> None:
    """Of a process that was killed; whoever holds the lock knows that nobody writes them now."""
    for item in planned:
        for place in (item.path, item.path.with_suffix(".md")):
            place.with_name(place.name + ".partial").unlink(missing_ok=True)
        for left in item.path.with_suffix("").glob("*.partial"):
            left.unlink()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace) -> int:
    grid, out = _what(args)
    limit = 10**9 if args.retry_failed else record.MAX_ATTEMPTS
    planned = plan.examine_all(grid, out, args.only, limit)
    if args.dry_run:
        for item in _chosen(planned, args.group):
            say(f"would run {item.cell.file} ({item.why})")
        return 0
    with locked(out, args.wait, args.group):
        # Again, under the lock: while we waited, another process may have finished them.
        planned = plan.examine_all(grid, out, args.only, limit)
        chosen = _chosen(planned, args.group)
        sweep_temporaries(chosen)
        if not chosen:
            say(f"{grid.name}: nothing to run, {sum(p.state == 'done' for p in planned)} of {len(planned)} done")
            return _exhausted(planned, args.group)
        seconds = plan.estimate_s(planned)
        say(f"{grid.name}: {len(chosen)} runs" + ("" if seconds is None else f", about {seconds / 60:.1f} min"))
        with heartbeat(seconds):
            failed = _run(chosen, args, out)
    for item in failed:
        print(f"nwor: failed: {item.path}", file=sys.stderr)
    if args.benchmark is not None and not failed:
        print(sidecars.table(sidecars.read_summary(chosen[0].path)))
    return 1 if failed else _exhausted(planned, args.group)


def _what(args: argparse.Namespace) -> tuple[Grid, Path]:
    if (args.grid is None) == (args.benchmark is None):
        raise ConfigError("name a GRID.yaml, or --benchmark FILE with --output-dir")
    if args.grid is not None:
        if args.gamma is not None:
            raise ConfigError("--gamma belongs to --benchmark; a grid has `ladder` and the reference best_fixed")
        return plan.resolve(args, os.environ)
    if args.output_dir is None:
        raise ConfigError("--benchmark needs --output-dir")
    refuse_grid_flags(args)
    args.only = ""
    grid, out = study.load(
        args.benchmark, args.config, args.model, args.output_dir, os.environ, plan.cell_flags(args), args.gamma or ()
    )
    require_models(grid.cells)
    return grid, out


def refuse_grid_flags(args: argparse.Namespace) -> None:
    for name in GRID_ONLY:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to a grid; with --benchmark it is {GRID_ONLY[name]}")


def _chosen(planned: list[Planned], group: str | None) -> list[Planned]:
    return [p for p in planned if p.runnable and group in (None, p.cell.engine.group)]


def _exhausted(planned: list[Planned], group: str | None) -> int:
    over = [p for p in planned if p.state == "exhausted" and group in (None, p.cell.engine.group)]
    for item in over:
        print(f"nwor: given up: {item.path} ({item.why}); --retry-failed tries again", file=sys.stderr)
    return 1 if over else 0


def _run(chosen: list[Planned], args: argparse.Namespace, out: Path) -> list[Planned]:
    from nwor_vllm.bench.backends.beside import Beside
    from nwor_vllm.bench.backends.engine import open_engine

    for name, value in REPRODUCIBLE.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _interrupt)
    session = Session(
        open_engine=open_engine,
        open_beside=lambda engine: Beside(engine, open_engine),
        profile=lambda cell: profile.run(cell, out / cell.id, os.environ, say),
        say=say,
        environ=os.environ,
    )
    groups: dict[str, list[Planned]] = {}
    for item in chosen:
        groups.setdefault(item.cell.engine.group, []).append(item)
    failed: list[Planned] = []
    for number, (name, members) in enumerate(groups.items(), 1):
        engine = members[0].cell.engine
        say(f"engine group {number}/{len(groups)} ({name}): {len(members)} runs")
        drafter, width = engine.drafter or engine.method, engine.tensor_parallel_size
        say(f"{engine.target}, drafter {drafter}, tensor parallel size {width}")
        failed += run_group(members, session)
    return failed
