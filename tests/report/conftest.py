"""The laboratory's fixtures: reports are made from what its scripted engine measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("bench_fixtures", Path(__file__).parents[1] / "bench" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_bench)
finished, scripted = _bench.finished, _bench.scripted
