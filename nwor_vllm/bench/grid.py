"""Grids: one YAML file expands to cells, each cell to one record.

A grid has `common` settings, a list of `runs`, `axes` multiplied over them, and `profiles` that override settings per
class of machine. Everything is checked here, once: unknown keys are errors, a file name may exist only once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nwor_vllm.bench.load import Rate, Slo
from nwor_vllm.errors import ConfigError, MissingError, unknown_key

PROFILES = ("embedded", "quick", "full")
MAX_CELLS = 10_000
GRID_KEYS = frozenset({"name", "file", "out", "common", "axes", "runs", "profiles"})

Method = Literal["none", "ngram", "eagle", "eagle3", "draft_model", "dflash"]
Workload = Literal[
    "mixed", "code", "chat", "summary", "retrieval", "translation", "arithmetic", "creative", "json", "random"
]

REFERENCES = ("best_fixed", "fixed", "repeat", "vanilla", "vanilla_engine")


class Frozen(BaseModel):
    """Closed, immutable, and never NaN: the base of everything that reaches a file."""

    # "constants": in free-form parts pydantic would write NaN as null, where the writer has to refuse it.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants")


class Engine(Frozen):
    """What needs an engine of its own. Two cells with equal engines share one."""

    target: str = Field(min_length=1)  # a path, a hub id, or zoo:target
    drafter: str = ""  # the same; empty with method none or ngram
    method: Method = "eagle"
    draft_length: int = Field(ge=0, le=64)  # the longest draft the engine is built for
    ladder: tuple[int, ...] = ()  # draft lengths a step may have; empty: 0, 1, 2, 3, 5, 8 up to draft_length
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    max_model_len: int = Field(default=4096, ge=16)
    max_num_seqs: int = Field(default=64, ge=1, le=65536)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool = False
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)

    @model_validator(mode="after")
    def _ladder_reaches_from_zero_to_the_longest(self) -> Engine:
        steps = list(self.ladder)
        if steps and (steps != sorted(set(steps)) or steps[0] != 0 or steps[-1] != self.draft_length):
            raise ValueError(
                f"ladder is {steps}; expected ascending lengths from 0 to draft_length {self.draft_length}"
            )
        return self

    @property
    def elastic(self) -> bool:
        """Whether draft lengths can change in it. A block drafter drafts every position in one pass."""
        return self.method not in ("none", "dflash") and self.draft_length > 0

    def without_drafter(self) -> Engine:
        return self.model_copy(update={"method": "none", "drafter": "", "draft_length": 0, "ladder": ()})

    @property
    def group(self) -> str:
        return digest(self.model_dump())[:12]


class Cell(Frozen):
    """One run's settings, resolved. The labels at the end do not change what is measured."""

    engine: Engine
    requests: int = Field(ge=1, le=100_000)  # in one batch
    max_tokens: int = Field(ge=1, le=1_000_000)
    temperature: float = Field(ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    draft_length: int = Field(ge=0, le=64)
    adaptive: bool = False
    threshold: float = Field(default=0.0, ge=0, le=1)
    policy: str = "goodput"  # what an adaptive run is driven by
    batches: int = Field(ge=1, le=10_000)
    warmup_batches: int = Field(default=2, ge=0, le=1000)
    seed: int = 42
    workload: Workload = "mixed"
    dataset: str = ""  # a JSONL or ShareGPT file instead of the workload
    ignore_eos: bool = False
    request_rate: Rate = "inf"  # requests a second that arrive; inf: a batch comes at once
    burstiness: Rate = 1.0  # gamma shape of the gaps between arrivals: 1 Poisson, below 1 bursts, inf even
    max_concurrency: int | None = Field(default=None, ge=1)  # requests in flight at most
    slo: Slo = Field(default_factory=dict)  # milliseconds of ttft, tpot, e2el that a good request meets
    references: tuple[str, ...] = ("vanilla", "fixed")  # arms measured beside the subject
    ncu: bool = False
    grid: str = ""
    id: str = ""
    file: str = ""
    headline: bool = False

    @field_validator("references")
    @classmethod
    def _known_arms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in REFERENCES:
                raise ValueError(f"unknown reference arm {name!r}; valid: {', '.join(REFERENCES)}")
        return value

    @model_validator(mode="after")
    def _holds_together(self) -> Cell:
        engine = self.engine
        if engine.draft_length and not engine.elastic:
            moving = {"vanilla", "best_fixed"} & set(self.references)
            if engine.method == "none":
                raise ValueError("method none drafts nothing; set draft_length to 0")
            if moving or self.adaptive or self.threshold:
                what = f"references {', '.join(sorted(moving))}" if moving else "adaptive and threshold"
                raise ValueError(f"method {engine.method} drafts every position in one pass, so it has no {what}")
        if self.burstiness != 1.0 and self.request_rate == "inf":
            raise ValueError("burstiness is set and request_rate is inf, which leaves no gaps; set request_rate too")
        return self

    @property
    def arm(self) -> str:
        if self.draft_length == 0:
            return "vanilla"
        if self.adaptive:
            return "both" if self.threshold else "adaptive"
        return "early_exit" if self.threshold else "fixed"

    def content(self) -> dict[str, Any]:
        """The settings that change what is measured."""
        return self.model_dump(exclude={"grid", "id", "file", "headline"})

    @property
    def panel(self) -> str:
        """Cells of a panel see the same prompts, interleaved in one engine; they differ in the policy alone."""
        return digest(self.model_dump(exclude={*LABELS, "adaptive", "threshold", "policy"}))[:12]


LABELS = frozenset({"grid", "id", "file", "headline", "ncu", "references", "slo"})
ENGINE_FIELDS = frozenset(Engine.model_fields) - {"draft_length"}
CELL_FIELDS = frozenset(Cell.model_fields) - {"engine", "grid", "id", "file"}


class Grid(Frozen):
    name: str
    out: str
    cells: tuple[Cell, ...]


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def first_problem(error: ValidationError, where: str) -> ConfigError:
    """pydantic's report as our one line."""
    problem = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return ConfigError(f"{where}: unknown setting {path!r}")
    said = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # what is wrong lies between settings
        return ConfigError(f"{where}: {said}")
    shown = repr(problem.get("input"))
    return ConfigError(f"{where}: {path} is {shown[:60]}; {said}")


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file whose top is a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path} holds {type(data).__name__}; expected a mapping of names to settings")
    return data


def load(path: Path, profile: str, overrides: Mapping[str, Any] | None = None, seeds: int = 1) -> Grid:
    """Expand a grid file. `overrides` (flags, environment) win over the profile, the profile over the file."""
    if profile not in PROFILES:
        raise unknown_key("profile", profile, PROFILES)
    data = read_mapping(path)
    for key in data:
        if key not in GRID_KEYS:
            raise ConfigError(f"{path}: {unknown_key('grid key', key, GRID_KEYS)}")
    name, pattern = (_text(data, key, path) for key in ("name", "file"))
    profiles = _mapping(data.get("profiles", {}), f"{path}: profiles")
    for key in profiles:
        if key not in PROFILES:
            raise ConfigError(f"{path}: profiles: {unknown_key('profile', key, PROFILES)}")
    common = _mapping(data.get("common", {}), f"{path}: common")
    chosen = {**_mapping(profiles.get(profile) or {}, f"{path}: profiles.{profile}"), **(overrides or {})}
    points = list(_points(data, path, common))
    if seeds < 1 or len(points) * seeds > MAX_CELLS:
        raise ConfigError(f"{path}: {len(points)} runs times {seeds} seeds; expected 1..{MAX_CELLS} cells")
    settings = [{**point, **chosen} for point in points]
    seats = max((s["requests"] for s in settings if type(s.get("requests")) is int and s["requests"] > 0), default=1)
    cells = []
    for seed in range(seeds):
        for index, setting in enumerate(settings):
            where = f"{path}: runs[{index}]"
            cells.append(_cell(name, pattern, setting, seats, seed, where))
    _refuse_repeats(cells, path)
    return Grid(name=name, out=str(data.get("out") or f"sweeps/{name}"), cells=tuple(cells))


def _points(data: Mapping[str, Any], path: Path, common: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    runs = data.get("runs", [{}])
    if not isinstance(runs, list) or not runs:
        raise ConfigError(f"{path}: runs is {runs!r:.60}; expected a list of runs")
    axes = _mapping(data.get("axes", {}), f"{path}: axes")
    total = len(runs)
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: axes.{axis} is {values!r:.60}; expected a list of values")
        total *= len(values)
    if total > MAX_CELLS:
        raise ConfigError(f"{path}: {total} cells; expected at most {MAX_CELLS}")
    for index, run in enumerate(runs):
        run = _mapping(run, f"{path}: runs[{index}]")
        for values in itertools.product(*axes.values()):
            yield {**common, **dict(zip(axes, values, strict=True)), **run}


def _cell(name: str, pattern: str, setting: Mapping[str, Any], seats: int, seed: int, where: str) -> Cell:
    labels = {key: setting[key] for key in ("run", "name") if key in setting}
    for key in setting:
        if key not in CELL_FIELDS | ENGINE_FIELDS | labels.keys():
            raise ConfigError(f"{where}: {unknown_key('setting', key, CELL_FIELDS | ENGINE_FIELDS | {'run', 'name'})}")
    engine = {key: value for key, value in setting.items() if key in ENGINE_FIELDS}
    body: dict[str, Any] = {key: value for key, value in setting.items() if key in CELL_FIELDS}
    engine.setdefault("max_num_seqs", seats)
    engine["draft_length"] = body.get("draft_length")
    try:
        cell = Cell(engine=Engine.model_validate(engine), grid=name, **body)
    except ValidationError as error:
        raise first_problem(error, where) from None
    file = _file_name(pattern, cell, labels, where)
    if seed:
        file = file.removesuffix(".json") + f"_seed{cell.seed + seed}.json"
    return cell.model_copy(update={"file": file, "id": file.removesuffix(".json"), "seed": cell.seed + seed})


def _file_name(pattern: str, cell: Cell, labels: Mapping[str, Any], where: str) -> str:
    fields = {**cell.model_dump(exclude={"engine"}), **labels, "adaptive": int(cell.adaptive)}
    try:
        names = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
        for field in names:
            if field not in fields:
                raise ConfigError(f"{where}: file pattern {pattern!r} names {field!r}, which this run does not set")
        file = pattern.format(**{field: fields[field] for field in names})
    except (ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{where}: file pattern {pattern!r} is malformed: {error}") from None
    allowed = set(string.ascii_letters + string.digits + "._-")
    if not file.endswith(".json") or file.startswith(".") or not set(file) <= allowed or len(file) > 200:
        raise ConfigError(
            f"{where}: file name {file!r:.80}; expected letters, digits, '.', '_', '-' and .json at the end"
        )
    return file


def _refuse_repeats(cells: Iterable[Cell], path: Path) -> None:
    seen: set[str] = set()
    for cell in cells:
        if cell.file in seen:
            raise ConfigError(f"{path}: two cells are named {cell.file}; add what tells them apart to the file pattern")
        seen.add(cell.file)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} is {value!r:.60}; expected names and settings")
    return value


def _text(data: Mapping[str, Any], key: str, path: Path) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{path}: {key} is {value!r:.60}; expected text")
    return value
