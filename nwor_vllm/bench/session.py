"""What a measurement works with: engines that run batches, and the cells that are measured together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nwor_vllm.bench import arms, provenance
from nwor_vllm.bench.arms import Arm
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import BatchResult, Counters, RequestResult
from nwor_vllm.bench.ncu.profile import Profiled
from nwor_vllm.bench.outputs import Difference
from nwor_vllm.bench.plan import Planned
from nwor_vllm.bench.record import Warmup
from nwor_vllm.bench.workload import Prompt
from nwor_vllm.errors import ConfigError

MAX_SHARE = 0.5  # of a GPU's memory that an engine may take where two stand side by side


class Driver(Protocol):
    """An engine that runs batches and switches policy live."""

    def switch(self, setting: Mapping[str, Any]) -> None: ...

    def generate(self, prompts: Sequence[Prompt], cell: Cell) -> tuple[float, list[RequestResult]]:
        """The prompts, each sent when it is due; seconds until the last one was answered."""
        ...

    def counters(self) -> Counters | None:
        """Increments since the last call."""
        ...

    def top_logprobs(self, texts: Sequence[tuple[Prompt, Sequence[int]]], cell: Cell) -> list[dict[int, float]]:
        """The target's most probable tokens after each prompt and the output tokens that follow it."""
        ...

    def dtype(self) -> str: ...

    def peak_memory_bytes(self) -> tuple[int | None, str]:
        """And why not, where unknown."""
        ...

    def close(self) -> None: ...


OpenEngine = Callable[[Engine], Driver]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Session:
    """What stays the same while a group is measured."""

    open_engine: OpenEngine
    open_beside: OpenEngine  # in a process of its own: one process holds one engine
    profile: Callable[[Cell], Profiled]
    say: Say
    environ: Mapping[str, str]


@dataclass(slots=True)
class Panel:
    """Cells measured together: the same prompts, interleaved."""

    planned: list[Planned]
    results: dict[Arm, list[BatchResult]] = field(default_factory=dict)
    warmup: Warmup | None = None
    flags: list[str] = field(default_factory=list)

    @property
    def cell(self) -> Cell:
        return self.planned[0].cell

    @property
    def arms(self) -> list[Arm]:
        return arms.of_panel([p.cell for p in self.planned])

    def prompt(self, prompts: Sequence[Sequence[Prompt]], difference: Difference) -> Prompt:
        return next(p for p in prompts[difference.batch] if p.id == difference.request)


class Engines:
    """The subject's engine, and one without a drafter where an arm asks for it. Each starts when first needed."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.subject: Driver | None = None
        self.bare: Driver | None = None

    def open(self, panel: Panel) -> None:
        engine, wants_bare = panel.cell.engine, any(arm.bare for arm in panel.arms)
        if wants_bare and provenance.gpus() and engine.gpu_memory_utilization > MAX_SHARE:
            raise ConfigError(
                f"gpu_memory_utilization is {engine.gpu_memory_utilization} and vanilla_engine puts two engines on one "
                f"GPU; set it to {MAX_SHARE} or less"
            )
        if self.subject is None:
            self.subject = self._start(self.session.open_engine, engine, "engine")
        if wants_bare and self.bare is None:
            self.bare = self._start(self.session.open_beside, engine.without_drafter(), "engine without a drafter")

    def _start(self, opener: OpenEngine, engine: Engine, name: str) -> Driver:
        started = time.time()
        driver = opener(engine)
        self.session.say(f"{name} ready after {time.time() - started:.1f} s")
        return driver

    def of(self, arm: Arm) -> Driver:
        found = self.bare if arm.bare else self.subject
        assert found is not None, "opened before the panel is measured"
        return found

    def close(self) -> None:
        for driver in (self.subject, self.bare):
            try:
                if driver is not None:
                    driver.close()
            except Exception as error:
                self.session.say(f"engine did not close cleanly: {error}")
        self.subject = self.bare = None
