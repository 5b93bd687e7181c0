"""A driver in a process of its own: one process holds one vLLM engine, and an arm may need a second one beside it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from nwor_vllm.bench.failures import explain
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import Counters, RequestResult
from nwor_vllm.bench.session import OpenEngine
from nwor_vllm.bench.workload import Prompt
from nwor_vllm.errors import NworError

GRACE_S = 60.0


class Beside:
    """The driver's methods, answered by the other process, which ends with this one, however this one ends."""

    def __init__(self, engine: Engine, opener: OpenEngine) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would share the first engine's threads and memory
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_answer, args=(theirs, engine, opener))
        self.process.start()
        theirs.close()
        self._exchange()

    def _call(self, name: str, *args: Any) -> Any:
        return self._exchange((name, args))

    def _exchange(self, asked: Any = None) -> Any:
        try:
            if asked is not None:
                self.pipe.send(asked)
            failure, result = self.pipe.recv()
        except (EOFError, OSError):
            raise NworError("the engine beside the subject's ended; see what it printed") from None
        if failure:
            raise NworError(f"the engine beside the subject's: {failure}")
        return result

    def switch(self, setting: Mapping[str, Any]) -> None:
        self._call("switch", dict(setting))

    def generate(self, prompts: Sequence[Prompt], cell: Cell) -> tuple[float, list[RequestResult]]:
        found: tuple[float, list[RequestResult]] = self._call("generate", prompts, cell)
        return found

    def counters(self) -> Counters | None:
        found: Counters | None = self._call("counters")
        return found

    def top_logprobs(self, texts: Sequence[tuple[Prompt, Sequence[int]]], cell: Cell) -> list[dict[int, float]]:
        found: list[dict[int, float]] = self._call("top_logprobs", texts, cell)
        return found

    def dtype(self) -> str:
        return str(self._call("dtype"))

    def peak_memory_bytes(self) -> tuple[int | None, str]:
        found: tuple[int | None, str] = self._call("peak_memory_bytes")
        return found

    def close(self) -> None:
        self.pipe.close()
        self.process.join(GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _answer(pipe: Connection, engine: Engine, opener: OpenEngine) -> None:
    """Open the engine, then do what is asked until something fails or nobody is left to ask."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    driver: Any = None
    failure, name, args = "", "", ()
    try:
        while not failure:
            found = None
            try:
                if driver is None:
                    driver = opener(engine)
                else:
                    found = getattr(driver, name)(*args)
            except Exception as error:
                said = explain(error)
                failure = f"{said.exception}: {said.message}"
            pipe.send((failure, found))
            if not failure:
                name, args = pipe.recv()
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # whoever asked is gone
    finally:
        if driver is not None:
            driver.close()


def _end_with_parent() -> None:
    """Also in the middle of a long start or batch."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
