"""What every test shares: the engines' settings on a small machine, and the refusal to pass with nothing run."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

# Set before anything imports vLLM. One thread each, so that two test processes do not fight over two cores.
for _name, _value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

# What tests sample, they sample by this. Set before workers start, so all of them have the same.
os.environ.setdefault("FUZZ_SEED", str(random.randrange(1000)))

# A background job of a shell starts with Ctrl-C ignored, and would hand that down to the programs tested for it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.exists() and "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        return [f"engines will be slow and erratic: export LD_PRELOAD={library}, or use ./scripts/test.sh"]
    return []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"FUZZ_SEED={os.environ['FUZZ_SEED']} repeats what this run sampled")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Everything skipped is not a pass."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    ran = any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error", "xfailed", "xpassed"))
    if exitstatus == 0 and not ran:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]
