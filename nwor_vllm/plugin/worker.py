"""What vLLM puts behind its worker class when the plugin is on. Importing it patches the worker's process."""

from __future__ import annotations

from typing import Any

from nwor_vllm.plugin import compat
from nwor_vllm.plugin.combine import lookup

compat.apply("worker")
compat.apply_to_v2_runner()


class ElasticWorker:
    """Methods here are callable by name through `collective_rpc`. No name may exist in vLLM's workers."""

    def nwor_worker(self) -> dict[str, Any]:
        """This rank's own counts."""
        runner = self.model_runner  # type: ignore[attr-defined]
        written, avoided = getattr(runner, "nwor_rows", (0, 0))
        return {"runner": type(runner).__name__, "draft_rows_written": written, "draft_rows_avoided": avoided}


__getattr__ = lookup(__name__, ElasticWorker)
