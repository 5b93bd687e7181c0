"""What the CUDA graphs of all draft lengths take: vLLM measures it as it captures them, and keeps it to itself."""

from __future__ import annotations

from typing import Any

from nwor_vllm.plugin.compat import log

_StockRunner: Any = object  # the vLLM class that stands behind the mixin


class GraphMemory(_StockRunner):  # type: ignore[misc]
    nwor_graph_bytes: int | None = None  # none were captured

    def capture_model(self, *args: Any, **kwargs: Any) -> Any:
        taken = super().capture_model(*args, **kwargs)
        if not kwargs.get("profile_only"):  # those are thrown away
            self.nwor_graph_bytes = int(taken)
            table = self.vllm_config.speculative_config.num_speculative_tokens_per_batch_size or ()
            lengths = ", ".join(map(str, sorted(k for _, _, k in table))) or "one"
            log.info("nwor: CUDA graphs take %.0f MiB; draft lengths: %s", self.nwor_graph_bytes / 2**20, lengths)
        return taken
