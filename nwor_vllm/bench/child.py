"""`python -m nwor_vllm.bench.child PARENT ARGS...`: the command `nwor ARGS`, ended by the kernel when PARENT dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from nwor_vllm.bench.cli import main

PR_SET_PDEATHSIG = 1
PROGRAM: tuple[str, ...] = ("-m", "nwor_vllm.bench.child")


def command(args: Sequence[str], program: Sequence[str]) -> list[str]:
    """For this process's child. An executor that is killed must not leave an engine behind on its device."""
    return [sys.executable, "-P", *program, str(os.getpid()), *args]


def die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was told
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    sys.argv = ["nwor", *sys.argv[2:]]  # what a record shows as its command can be run again
    sys.exit(main())
