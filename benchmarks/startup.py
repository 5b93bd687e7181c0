"""What having nwor installed costs a vLLM that does not ask for it: start-up with the plugin and without, interleaved.

    python benchmarks/startup.py [--engine] [--pairs 8]

Every start is a process of its own, in turns and in pairs whose order alternates; in `without` vLLM may load every
plugin but ours (VLLM_PLUGINS names the others). A start is the imports and the engine's configuration; with `--engine`
an engine on the embedded target and one token too. Times are CPU seconds of the process, which other work on the
machine changes less than the clock; the clock's ratio stands beside them. Eight pairs take two minutes on a small
machine, five with `--engine`. The result goes into benchmarks/results, which keeps the last one of either kind.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nwor_vllm import zoo
from nwor_vllm.bench import provenance, record, stats

OUT = Path("benchmarks/results/startup.json")
START = """
import json, sys, time
began = time.perf_counter()
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
settings = dict(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=1)
if sys.argv[2] == "engine":
    LLM(**settings).generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
else:
    EngineArgs(**settings).create_engine_config()
hooked = hasattr(__import__("vllm.config.vllm").config.vllm.VllmConfig.__post_init__, "__wrapped__")
print(json.dumps([time.process_time(), time.perf_counter() - began, hooked]))
"""


def plugins(installed: bool) -> str:
    """VLLM_PLUGINS: what else is installed loads either way."""
    names = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    if "nwor" not in names:
        raise SystemExit("nwor is not installed here: pip install .")
    return ",".join(sorted(names if installed else names - {"nwor"}))


def start(what: str, installed: bool) -> tuple[float, float]:
    """CPU and wall seconds of one start."""
    environ = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "VLLM_PLUGINS": plugins(installed),
    }  # fmt: skip
    command = [sys.executable, "-c", START, str(zoo.path("target")), what]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    if done.returncode:
        raise SystemExit(f"a start failed: {done.stderr.strip().splitlines()[-1]}")
    cpu, wall, hooked = json.loads(done.stdout.strip().splitlines()[-1])
    if hooked != installed:
        raise SystemExit(f"the plugin was {'not ' * installed}loaded where it should {'' if installed else 'not '}be")
    return cpu, wall


def measure(what: str, pairs: int) -> dict[str, Any]:
    start(what, True)  # fills the page cache and writes byte code
    taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for pair in range(pairs):
        for installed in (True, False) if pair % 2 else (False, True):
            taken[installed].append(start(what, installed))
    found: dict[str, Any] = {}
    for index, clock in enumerate(("cpu", "wall")):
        with_us, without = ([times[index] for times in taken[key]] for key in (True, False))
        found[clock] = {
            "seconds_installed": with_us, "seconds_without": without,
            "installed_over_without": asdict(stats.paired_ratio(with_us, without)),
        }  # fmt: skip
        print(json.dumps({"what": what, "clock": clock} | found[clock]["installed_over_without"]), flush=True)
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error(f"--pairs is {args.pairs}; expected 2 or more")
    what = "engine" if args.engine else "config"
    done = {
        "command": shlex.join(["python", "benchmarks/startup.py", *argv]), "versions": provenance.versions(),
        "hardware": provenance.hardware(), "load": os.getloadavg(), **measure(what, args.pairs),
    }  # fmt: skip
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record.replace_text(args.out, json.dumps(found | {what: done}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
