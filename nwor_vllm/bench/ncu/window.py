"""`python -m nwor_vllm.bench.ncu.window CELL.json WINDOW.json`: the process that ncu watches.

Tensor parallel size 1, because kernel replay deadlocks collectives. The profiler is on for steady steps only.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from nwor_vllm.bench import arms, workload
from nwor_vllm.bench.backends.engine import VllmDriver
from nwor_vllm.bench.grid import Cell
from nwor_vllm.bench.metrics import BatchResult
from nwor_vllm.bench.ncu.profile import clock_bytes

PROFILED_REQUESTS = 4
PROFILED_TOKENS = 16


def main(described: Path, window: Path) -> None:
    given = Cell.model_validate_json(described.read_text(encoding="utf-8"))
    cell = given.model_copy(
        update={
            "engine": given.engine.model_copy(update={"tensor_parallel_size": 1}),
            "requests": min(given.requests, PROFILED_REQUESTS), "max_tokens": min(given.max_tokens, PROFILED_TOKENS),
            "batches": 1, "warmup_batches": 1,
        }
    )  # fmt: skip
    work = workload.build(cell)
    driver = VllmDriver(cell.engine, {"profiler_config": {"profiler": "cuda"}})
    driver.switch(arms.subject(cell).setting())
    driver.generate(work.warmup[0], cell)
    driver.counters()
    driver.llm.start_profile()
    seconds, requests = driver.generate(work.batches[0], cell)
    driver.llm.stop_profile()
    result = BatchResult(0, 0, seconds, "", tuple(requests), driver.counters())
    logical, analytic = clock_bytes(cell, [result])
    counters = None if result.counters is None else dataclasses.asdict(result.counters)
    text = json.dumps({"logical_bytes": logical, "analytic_bytes": analytic, "counters": counters})
    window.write_text(text, encoding="utf-8")
    driver.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
