"""The checks of `nwor verify` as they are made: one JSON line each, so that a stopped run goes on, and a child process
hands its own back."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from nwor_vllm.bench import provenance
from nwor_vllm.bench.grid import Frozen
from nwor_vllm.errors import ConfigError, CorruptFileError

HERE = Path(__file__).parent
SOURCES = (*sorted(HERE.glob("verify*.py")), HERE / "distribution.py", HERE / "tiny_pair.py")  # beside the plugin's


class Check(Frozen):
    """One rule on one engine."""

    runner: Literal["v1", "v2"]
    asynchronous: bool
    drafter: str
    scene: str
    rule: str
    planted: bool = False  # a mistake made on purpose
    compared: int = Field(default=0, ge=0)
    differences: int = Field(default=0, ge=0)
    z: dict[str, float] | None = None  # by position and jointly
    caught: bool | None = None  # of a planted rule: was it noticed
    met: bool = True  # drafts were verified, and what the scene is about happened
    counts: dict[str, int] = Field(default_factory=dict)
    verified_per_position: list[int] = Field(default_factory=list)
    refused: str = ""  # the engine's reason for not taking the combination

    @property
    def name(self) -> str:
        mode = "async" if self.asynchronous else "sync"
        return f"{self.runner} {mode:<5} {self.drafter:<11} {self.scene:<15} {self.rule}"

    @property
    def line(self) -> str:
        if self.refused:
            return f"{self.name:<56} refused: {self.refused}"
        worst = max((abs(z) for z in (self.z or {}).values()), default=0.0)
        if self.planted:
            state = "caught" if self.caught else "NOT CAUGHT"
        elif self.z is None:
            state = f"{self.differences} DIFFER" if self.differences else "identical"
        else:
            state = f"of {self.compared}"
        state += f", largest |z| {worst:.2f}" if self.z else ""
        work = ", ".join(f"{name} {n}" for name, n in self.counts.items())
        return f"{self.name:<56} {state}; {work}{'' if self.met else '; NOT MET'}"


class Journal:
    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """`about`: what, beside the code and its versions, makes checks comparable."""
        self.path, self.checks = path, dict[str, Check]()
        code = provenance.code() + hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
        self.header = json.dumps({"format": "nwor-verify", "code": code, "versions": provenance.versions(), **about})
        self.started, self.due = time.monotonic(), 0
        if path.exists() and path.stat().st_size:
            self.read()
        else:
            path.write_text(self.header + "\n")

    def read(self) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        if lines[0] != self.header + "\n":
            raise ConfigError(
                f"--journal {self.path} holds checks of other code, versions or flags; name another file, or remove it"
            )
        if not lines[-1].endswith("\n"):  # cut off as it was written
            self.path.write_text("".join(lines[:-1]))
            del lines[-1]
        try:
            checks = [Check.model_validate_json(line) for line in lines[1:]]
        except ValidationError as error:
            raise CorruptFileError(
                f"--journal {self.path} is damaged: {error.error_count()} faults; remove it"
            ) from error
        self.checks = {check.name: check for check in checks}

    def expect(self, names: list[str]) -> None:
        """The checks still to come, for the progress lines."""
        self.due += len(names)
        if done := sum(name in self.checks for name in names):
            print(f"{done} of {len(names)} checks were made before", file=sys.stderr, flush=True)

    def add(self, check: Check) -> None:
        self.checks[check.name] = check
        with self.path.open("a") as file:
            file.write(check.model_dump_json() + "\n")
        seconds = time.monotonic() - self.started
        print(f"[{len(self.checks):>3}/{self.due} {seconds:5.0f} s] {check.line}", file=sys.stderr, flush=True)
