"""What vLLM puts behind its worker class for the measuring driver: memory is asked for where it is used."""

from __future__ import annotations

import resource
import sys

import torch


class PeakMemory:
    """Called by name through `collective_rpc`."""

    def nwor_peak_memory_bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
