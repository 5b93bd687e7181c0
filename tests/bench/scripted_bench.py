"""`nwor ARGS` with the scripted engine in the place of vLLM: PARENT ARGS..., as nwor_vllm.bench.child takes them.

The scripted engine writes when it starts, and every batch takes PAUSE_S, so that a test can kill it in the middle.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from nwor_vllm.bench import child, cli
from nwor_vllm.bench.grid import Engine

spec = importlib.util.spec_from_file_location("scripted_engine", Path(__file__).with_name("scripted_engine.py"))
assert spec
assert spec.loader
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

engine = ModuleType("nwor_vllm.bench.backends.engine")


def open_engine(asked: Engine) -> object:
    print(f"scripted engine on {os.environ.get('CUDA_VISIBLE_DEVICES', 'no GPU')} in {os.getpid()}", flush=True)
    return scripted.Scripted({"goodput": 0.8}, pause_s=float(os.environ.get("NWOR_TEST_PAUSE_S", "0")))


engine.open_engine = open_engine  # type: ignore[attr-defined]
sys.modules["nwor_vllm.bench.backends.engine"] = engine

if __name__ == "__main__":
    child.die_with(int(sys.argv[1]))
    sys.argv = ["nwor", *sys.argv[2:]]
    sys.exit(cli.main())
