"""What vLLM puts behind its worker class when the plugin is on. Importing it patches the worker's process."""

from __future__ import annotations

import functools
from typing import Any

from nwor_vllm.plugin import compat
from nwor_vllm.plugin.combine import theirs_in

compat.keep_cpu_kernels()
compat.fix_cpu_expand()  # vLLM has registered its own by now, so patching the module alone would come too late
compat.apply("worker")
compat.apply_to_v2_runner()


class ElasticWorker:
    """What `collective_rpc` calls by name. vLLM refuses a name that its worker has already, but for those with two
    underscores in front: an engine with another extension may follow in the same process."""

    def __nwor__(self) -> dict[str, Any]:
        """This rank's own counts."""
        runner = self.model_runner  # type: ignore[attr-defined]
        written, avoided = getattr(runner, "nwor_rows", (0, 0))
        return {
            "runner": type(runner).__name__,
            "draft_rows_written": written,
            "draft_rows_avoided": avoided,
            "graph_bytes": getattr(runner, "nwor_graph_bytes", None),
        }


@functools.cache
def __getattr__(name: str) -> Any:
    """A worker extension of the user's own, with ours in it."""
    return type(name, (theirs_in(__name__, name),), {"__module__": __name__, "__nwor__": ElasticWorker.__nwor__})
