"""Who may import whom, what an import may load, and how large a module may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, WARN_LINES = 500, 300

# Per part of the package: what it may import beside the standard library. A name covers what is below it.
ALLOWED = {
    "nwor_vllm.errors": set(),
    "nwor_vllm.config": {"nwor_vllm.errors", "nwor_vllm.policy"},
    "nwor_vllm.policy": {"numpy", "nwor_vllm.errors", "nwor_vllm.policy"},
    "nwor_vllm.verify": {"torch", "nwor_vllm.errors", "nwor_vllm.verify"},
    "nwor_vllm.kernels": {"torch", "triton", "nwor_vllm.errors", "nwor_vllm.kernels"},
    "nwor_vllm.plugin": {
        *("numpy", "torch", "triton", "vllm", "fastapi", "prometheus_client"),
        *("nwor_vllm.config", "nwor_vllm.errors", "nwor_vllm.kernels", "nwor_vllm.plugin", "nwor_vllm.policy"),
    },
    "nwor_vllm.zoo": {"numpy", "torch", "transformers", "safetensors", "tokenizers", "tqdm", "nwor_vllm.zoo"}
    | {"nwor_vllm.errors"},
    "nwor_vllm.speculate": {"numpy", "torch", "transformers", "safetensors", "nwor_vllm.speculate"}
    | {"nwor_vllm.errors", "nwor_vllm.policy", "nwor_vllm.verify"},
    "nwor_vllm.split": {"numpy", "torch", "grpc", "google", "cryptography", "nwor_vllm.split"}
    | {"nwor_vllm.errors", "nwor_vllm.policy", "nwor_vllm.speculate", "nwor_vllm.verify"},
    "nwor_vllm.bench": {
        *("numpy", "scipy", "pandas", "pydantic", "yaml", "tqdm", "jinja2", "torch", "transformers", "tokenizers"),
        *("safetensors", "aiohttp", "httpx", "ray", "ncu_report", "pynvml", "prometheus_client", "psutil", "filelock"),
        *("nwor_vllm.bench", "nwor_vllm.config", "nwor_vllm.errors", "nwor_vllm.kernels", "nwor_vllm.policy"),
        *("nwor_vllm.speculate", "nwor_vllm.split", "nwor_vllm.verify", "nwor_vllm.zoo"),
    },
    "nwor_vllm.report": {"numpy", "scipy", "pandas", "matplotlib", "jinja2", "pydantic", "nwor_vllm.report"}
    | {"nwor_vllm.errors", "nwor_vllm.bench.record", "nwor_vllm.bench.stats"},
}

# What may do what the rest of its part may not, and why.
EXCEPTIONS = {
    "nwor_vllm.bench.backends": {"vllm", "nwor_vllm.plugin"},  # serves with vLLM and switches the plugin's policy live
    "nwor_vllm.bench.trial": {"triton", "nwor_vllm.plugin.compat"},  # tries what may crash, in a process of its own
    "nwor_vllm.zoo.script_loader": {"vllm"},  # fills a scripted pair's tensors inside vLLM's loader
}

# vLLM's engine internals are looked up, and probed, by name in compat. These beside it may import them.
PRIVATE = ("vllm.v1.", "vllm._")
PRIVATE_FILES = {
    "nwor_vllm.plugin.compat": "the table of what is hooked",
    "nwor_vllm.plugin.scheduler": "subclasses the schedulers, so it is only ever imported where vLLM has them",
    "nwor_vllm.plugin.control": "reaches the engine core, as the feature `run-time control` of that table probes",
    "nwor_vllm.plugin.metrics": "implements the interface that the entry point group of stat loggers asks for",
    "nwor_vllm.bench.backends.vllm": "plants a wrong rule in the sampler, which the proof of losslessness must catch",
}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int

    def imports(self) -> Iterator[tuple[int, str]]:
        """Everything imported anywhere in the file, also by importlib with a literal name."""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                stem = ".".join(p for p in (base, node.module) if p)
                yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def modules() -> list[Module]:
    found = []
    for folder, package in ((ROOT / "nwor_vllm", "nwor_vllm"), (ROOT / "kernels", "nwor_vllm.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            text = path.read_text()
            found.append(Module(name, path, ast.parse(text), text.count("\n")))
    return found


def covers(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def forbidden(module: Module) -> list[str]:
    """What the rules of its part do not let it import."""
    part = next((p for p in ALLOWED if covers(module.name, {p})), None)
    if part is None:
        allowed: set[str] = set()  # the top of the package itself
    else:
        allowed = ALLOWED[part].union(*(more for name, more in EXCEPTIONS.items() if covers(module.name, {name})))
    bad = []
    for line, name in module.imports():
        inside = name.startswith("nwor_vllm.__") or name.split(".")[0] in sys.stdlib_module_names
        if not inside and not covers(name, allowed):
            bad.append(f"{module.path.relative_to(ROOT)}:{line} imports {name}")
    return bad


def test_every_part_imports_only_what_it_may() -> None:
    found = modules()
    assert len(found) > 10
    assert [line for module in found for line in forbidden(module)] == []


@pytest.mark.parametrize(
    ("name", "source", "caught"),
    [
        ("nwor_vllm.policy.x", "import torch", True),
        ("nwor_vllm.policy.x", "def f():\n    from vllm import LLM", True),
        ("nwor_vllm.policy.x", "import numpy as np\nfrom nwor_vllm.errors import ConfigError", False),
        ("nwor_vllm.bench.x", "from nwor_vllm import plugin", True),
        ("nwor_vllm.bench.x", "import importlib\nimportlib.import_module('vllm')", True),
        ("nwor_vllm.bench.x", "from nwor_vllm.report import page", True),
        ("nwor_vllm.bench.backends.vllm", "from vllm import LLM", False),
        ("nwor_vllm.report.x", "from nwor_vllm.bench.backends import vllm", True),
        ("nwor_vllm.kernels.x", "from . import y", False),
        ("nwor_vllm.zoo.x", "from vllm import LLM", True),
        ("nwor_vllm", "import torch", True),
    ],
)
def test_the_rules_catch_what_they_forbid(name: str, source: str, caught: bool) -> None:
    module = Module(name, ROOT / "nwor_vllm" / "x.py", ast.parse(source), 1)
    assert bool(forbidden(module)) is caught


def test_private_vllm_names_stay_in_one_file() -> None:
    bad = [
        f"{module.path.relative_to(ROOT)}:{line} names {name}"
        for module in modules()
        if module.name not in PRIVATE_FILES
        for line, name in module.imports()
        if name.startswith(PRIVATE)
    ]
    assert bad == []


def test_no_module_is_too_long() -> None:
    sizes = {module.path.relative_to(ROOT): module.lines for module in modules()}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_LINES} == {}
    for path, lines in sizes.items():
        if lines > WARN_LINES:
            warnings.warn(f"{path} has {lines} lines; {WARN_LINES} want a reason", stacklevel=1)


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh process has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(*(m for m in ('torch', 'vllm', 'transformers', 'triton') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_check_for_loaded_packages_sees_one() -> None:
    assert loaded_by("import types; sys.modules['torch'] = types.ModuleType('torch')") == {"torch"}


@pytest.mark.parametrize(
    "code",
    [
        "import nwor_vllm",
        "import nwor_vllm.config, nwor_vllm.policy, nwor_vllm.errors",
        "from nwor_vllm.plugin import register; register(); register()",
        "import os; os.environ['NWOR_DISABLE'] = '1'\nfrom nwor_vllm.plugin import register; register()",
        "from nwor_vllm.bench.cli import main; main(['--help'])",
        "from nwor_vllm.bench.cli import main; main(['doctor', '--quick'])",
    ],
)
def test_loads_neither_torch_nor_vllm(code: str) -> None:
    assert loaded_by(code) == set()


def test_help_is_quick() -> None:
    """A whole process, interpreter start included; the best of five, because the machine may be busy."""
    nwor = Path(sys.executable).parent / "nwor"
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([nwor, "--help"], capture_output=True, text=True, timeout=30, check=True)
        best = min(best, time.perf_counter() - start)
    assert "usage: nwor" in done.stdout
    assert best < 0.3
