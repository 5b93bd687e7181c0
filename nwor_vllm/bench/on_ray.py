"""Engine groups as Ray tasks. Records come home as soon as they are written, so a lost worker costs one panel at most.

Nothing is shared but the installed package: a task gets the grid and the records that exist, measures in a scratch
folder, and streams back what is new. This side checks every record and gives it its name; workers never do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.bench import bench, child, provenance, record
from nwor_vllm.bench.jobs import Job
from nwor_vllm.errors import ConfigError, MissingError, NworError

LOST = -1
SCRATCH = "nwor-sweep-"
# What this side's environment decides on a worker; of the rest, secrets never travel.
TRAVELS = ("OMP_NUM_THREADS", "LD_PRELOAD", "PROFILE", "TARGET_MODEL", "DRAFT_MODEL", "TENSOR_PARALLEL_SIZE", "ONLY",
           "NUM_SEEDS", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")  # fmt: skip
DEVICES = "CUDA_VISIBLE_DEVICES"  # Ray's to decide where it assigns GPUs, ours where it does not


@dataclass(frozen=True, slots=True)
class Parcel:
    """All a worker needs to know."""

    program: tuple[str, ...]
    argv: tuple[str, ...]
    files: Mapping[str, bytes]  # by path below the scratch folder
    out: str  # where in it the records will be
    environ: Mapping[str, str]
    machine: Mapping[str, Any]  # what a record's key must agree with
    decided: tuple[str, ...]  # variables that `environ` decides, by leaving them out too


def measure(parcel: Parcel) -> Iterator[tuple[str, Any]]:
    """The task: first where it runs, then lines and files as they come, at the end the exit code."""
    yield "where", f"{os.uname().nodename} (process {os.getpid()})"
    here = provenance.machine()
    if unlike := [name for name in here if here[name] != parcel.machine[name]]:
        other = f"{os.uname().nodename} has other {' and '.join(unlike)} than the machine that sweeps"
        yield "line", f"nwor: {other}, so its records would not count; start the sweep on a machine like the workers"
        yield "code", 2
        return
    _sweep_scratch()
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as scratch:
        for name, content in parcel.files.items():
            path = Path(scratch, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        out, sent = Path(scratch, parcel.out), dict(parcel.files)
        environ = {k: v for k, v in os.environ.items() if k not in parcel.decided} | dict(parcel.environ)
        process = subprocess.Popen(
            child.command(parcel.argv, parcel.program), cwd=scratch, env=environ, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                yield from _new(Path(scratch), out, sent)  # so that what a line calls done is home before the line
                yield "line", line.rstrip("\n")
            code = process.wait()
            yield from _new(Path(scratch), out, sent)
            yield "code", code
        finally:
            process.terminate()
            process.wait()


def _sweep_scratch() -> None:
    """Of tasks whose process was killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*"):
        if not Path("/proc", left.name.removeprefix(SCRATCH).partition("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)


def _new(scratch: Path, out: Path, sent: dict[str, bytes]) -> Iterator[tuple[str, Any]]:
    """Finished records since the last look, each with what stands beside it."""
    for path in sorted(out.glob("*.json")):
        name, content = str(path.relative_to(scratch)), path.read_bytes()
        if sent.get(name) != content:
            sent[name] = content
            beside = [path.with_suffix(".md"), *path.with_suffix("").glob("*")]
            files = {str(p.relative_to(out)): p.read_bytes() for p in beside if p.is_file() and p.suffix != ".partial"}
            yield "record", (path.name, content, files)


@dataclass(slots=True)
class Task:
    job: Job
    stream: Any
    held: ExitStack
    where: str = "ray"
    code: int | None = None
    spoiled: bool = False  # it sent what cannot be kept


class OnRay:
    def __init__(self, waiting: list[Job], address: str | None, workers: int, emit: Callable[[Job, str], None]) -> None:
        try:
            import ray
        except ImportError:
            raise MissingError("--on ray needs Ray; install it: pip install 'nwor-vllm[ray]'") from None
        self.ray, self.emit = ray, emit
        self.tasks: list[Task] = []
        address = address or os.environ.get("RAY_ADDRESS")
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address or "local", log_to_driver=False, logging_level="ERROR", include_dashboard=bool(address) and None
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {_first_line(error)}") from None
        finally:
            signal.signal(signal.SIGTERM, terminated)  # Ray takes it for itself
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.gpu = bool(provenance.gpus())
        unit = "GPU" if self.gpu else "CPU"
        most = int(max((node.get(unit, 0) for node in nodes), default=0))
        # Without GPUs an engine takes its share of a machine's cores, as --workers says.
        self.per_device = 1 if self.gpu else max(1, most // workers)
        if wide := next((job for job in waiting if job.devices * self.per_device > most), None):
            self.stop()
            raise ConfigError(
                f"{wide.name} needs {wide.devices} {unit}s on one machine; the cluster's largest has {most}"
            )

    def start(self, job: Job) -> str | None:
        amount = job.devices * self.per_device
        needs = {"num_gpus": amount, "num_cpus": 1} if self.gpu else {"num_cpus": amount}
        held = ExitStack()
        try:
            held.enter_context(bench.locked(job.out, wait=False, group=job.group))
            bench.sweep_temporaries([item for item in job.planned if item.runnable])
            # A process a task: it ends with its engine. Retrying is the sweep's, which knows what came home.
            remote = self.ray.remote(max_calls=1, max_retries=0, num_returns="streaming", **needs)(measure)
            self.tasks.append(Task(job, remote.remote(parcel(job, self.gpu)), held))
        except BaseException:
            held.close()
            raise
        return "ray"

    def ended(self) -> list[tuple[Job, int]]:
        end = time.monotonic() + 0.5
        while (left := end - time.monotonic()) > 0 and (going := [t for t in self.tasks if t.code is None]):
            ready, _ = self.ray.wait([task.stream for task in going], timeout=left, fetch_local=False)
            for task in going:
                if task.stream in ready:
                    self._receive(task)
        over = [task for task in self.tasks if task.code is not None]
        for task in over:
            self.tasks.remove(task)
            task.held.close()
        return [(task.job, task.code) for task in over if task.code is not None]

    def _receive(self, task: Task) -> None:
        try:
            kind, value = self.ray.get(next(task.stream))
        except StopIteration:
            task.code = LOST
            return
        except self.ray.exceptions.RayError as error:
            raised = isinstance(error, self.ray.exceptions.RayTaskError)
            self.emit(
                task.job, f"nwor: {task.job.name} on {task.where}: {_first_line(error.cause if raised else error)}"
            )
            task.code = 1 if raised else LOST
            return
        if kind == "code":
            task.code = value or int(task.spoiled)
        elif kind == "record":
            try:
                bring_home(task.job, *value)
            except NworError as error:
                self.emit(task.job, f"nwor: {task.job.name} on {task.where}: {error}")
                task.spoiled = True
        elif kind == "where":
            task.where = value
            self.emit(task.job, f"{time.strftime('%H:%M:%S')} {task.job.name} runs on {value}")
        else:
            self.emit(task.job, value)

    def stop(self) -> None:
        """Without us Ray ends our workers, and the kernel their engines. (Cancelled streams abort Ray 2.60.)"""
        self.ray.shutdown()
        for task in self.tasks:
            task.held.close()


def parcel(job: Job, gpus: bool) -> Parcel:
    config, out = _below(job.config, "grid.yaml"), _below(job.out, "out")
    files = {str(config): job.config.read_bytes()}
    for item in job.planned:
        if item.path.is_file():
            files[str(out / item.path.name)] = item.path.read_bytes()
    decided = TRAVELS if gpus else (*TRAVELS, DEVICES)
    settings = [name for name in provenance.environment(os.environ) if name.startswith(provenance.RECORDED_PREFIXES)]
    environ = {name: os.environ[name] for name in (*decided, *settings) if name in os.environ}
    return Parcel(child.PROGRAM, tuple(job.argv(config, out)), files, str(out), environ, provenance.machine(), decided)


def _below(path: Path, otherwise: str) -> Path:
    """The same relative path in the scratch folder, so that a record's command can be run here too."""
    return Path(otherwise) if path.is_absolute() or ".." in path.parts else path


def bring_home(job: Job, name: str, content: bytes, beside: Mapping[str, bytes]) -> None:
    """Checked, what stands beside it first, then the record under its name."""
    from nwor_vllm.bench.finish import save  # with scipy behind it: no task needs that

    item = next((item for item in job.planned if item.path.name == name), None)
    if item is None:
        raise NworError(f"a worker sent {name}, which this job does not have")
    found = record.parse(content.decode(), f"{name} from a worker")
    if found.key != item.key:
        why = provenance.difference(found.provenance.get("identity", {}), item.cell, found.cell)
        raise NworError(f"{name} came with another key ({why}): give the workers the same models and data")
    for relative, text in beside.items():
        if not (job.out / relative).resolve().is_relative_to(job.out.resolve()):
            raise NworError(f"a worker sent {relative}, which is outside {job.out}")
        record.replace_text(job.out / relative, text.decode())
    save(found, item.path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
