"""`python -m nwor_vllm.bench.ncu.window CELL.json WINDOW.json [--profiled]`: a few counted steps for ncu to watch.

Tensor parallel size 1, because kernel replay deadlocks collectives. The profiler is on for steady steps only, and no
step is scheduled ahead: one beyond the last token would write rows that no counter sees.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from nwor_vllm.bench import arms, workload
from nwor_vllm.bench.backends.engine import VllmDriver
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.metrics import BatchResult
from nwor_vllm.bench.ncu.profile import clock_bytes

PROFILED_REQUESTS = 4
PROFILED_TOKENS = 16


def main(described: Path, window: Path, profiled: bool) -> None:
    given = Cell.model_validate_json(described.read_text(encoding="utf-8"))
    cell = given.model_copy(
        update={
            "engine": given.engine.model_copy(update={"tensor_parallel_size": 1}),
            "requests": min(given.requests, PROFILED_REQUESTS), "max_tokens": min(given.max_tokens, PROFILED_TOKENS),
            "batches": 1, "warmup_batches": 1, "request_rate": "inf", "max_concurrency": None,
        }
    )  # fmt: skip
    work = workload.build(cell)
    extra: dict[str, Any] = {"async_scheduling": False}
    driver = VllmDriver(cell.engine, extra | ({"profiler_config": {"profiler": "cuda"}} if profiled else {}))
    driver.switch(arms.subject(cell).setting())
    driver.generate(work.warmup[0], cell)
    driver.counters()
    if profiled:
        driver.llm.start_profile()
    seconds, requests = driver.generate(work.batches[0], cell)
    if profiled:
        driver.llm.stop_profile()
    result = BatchResult(0, 0, seconds, "", tuple(requests), driver.counters())
    logical, analytic = clock_bytes(cell, [result])
    counters = None if result.counters is None else dataclasses.asdict(result.counters)
    text = f"{cell.requests} requests of {cell.max_tokens} tokens at tensor parallel size 1"
    found = {"logical_bytes": logical, "analytic_bytes": analytic, "text": text, "counters": counters}
    window.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    driver.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--profiled" in sys.argv[3:])
