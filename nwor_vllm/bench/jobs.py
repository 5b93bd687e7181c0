"""What a sweep runs: an engine group of a grid, or one configuration of a study, each as a `nwor bench` command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nwor_vllm.bench import bench, plan, provenance, record, study
from nwor_vllm.bench.plan import Planned
from nwor_vllm.errors import ConfigError, MissingError

PRESETS = Path("sweeps_config/models")


@dataclass(frozen=True, slots=True)
class Job:
    """One process and one engine, on devices of its own."""

    name: str
    config: Path  # a grid, or a study's configuration
    out: Path
    group: str
    devices: int
    planned: tuple[Planned, ...]  # every run of the engine, the finished ones too
    flags: tuple[str, ...] = ()
    benchmark: Path | None = None
    tries: int = 0

    @property
    def runs(self) -> list[Path]:
        return [item.path for item in self.planned if item.runnable]

    def argv(self, config: Path, out: Path) -> list[str]:
        if self.benchmark is None:
            return ["bench", str(config), "--out", str(out), "--group", self.group, *self.flags]
        files = ["--benchmark", str(self.benchmark), "--config", str(config)]
        # Engines of the same kind are named alike, so two configurations may have to take turns.
        return ["bench", *files, "--output-dir", str(out / config.stem), "--group", self.group, "--wait", *self.flags]


def find(args: argparse.Namespace, environ: Mapping[str, str]) -> list[Job]:
    """Jobs with something to run. Wide engines first: they wait longest for devices. Then the long ones."""
    grids = [path for path in (args.grid, *args.more) if path is not None]
    configs = [*(args.configs or ()), *(path for name in args.group or () for path in presets(name))]
    if bool(grids) == bool(configs):
        raise ConfigError("name GRID.yaml files, or --configs / --group with --benchmark")
    found = _of_configs(args, configs, environ) if configs else _of_grids(args, grids, environ)
    return sorted((job for job in found if job.runs), key=lambda job: (-job.devices, -len(job.runs)))


def _of_grids(args: argparse.Namespace, grids: list[Path], environ: Mapping[str, str]) -> list[Job]:
    found: list[Job] = []
    for path in grids:
        single = argparse.Namespace(**{**vars(args), "grid": path})
        grid, out = plan.resolve(single, environ)
        groups: dict[str, list[Planned]] = {}
        for item in plan.examine_all(grid, out, single.only, limit(args)):
            groups.setdefault(item.cell.engine.group, []).append(item)
        for group, items in groups.items():
            devices = items[0].cell.engine.tensor_parallel_size
            name = f"{path.stem}/{group}"
            found.append(Job(name, path, out, group, devices, tuple(items), tuple(plan.given_flags(args))))
    return found


def _of_configs(args: argparse.Namespace, configs: list[Path], environ: Mapping[str, str]) -> list[Job]:
    if args.benchmark is None or args.output_base is None:
        raise ConfigError("--configs and --group need --benchmark FILE and --output-base FOLDER")
    if repeated := {path.stem for path in configs if [p.stem for p in configs].count(path.stem) > 1}:
        raise ConfigError(f"two configurations are named {min(repeated)}; their results would share a folder")
    bench.refuse_grid_flags(args)
    found: list[Job] = []
    flags = tuple(plan.given_flags(args))
    for path in configs:
        output = args.output_base / path.stem
        grid, out = study.load(args.benchmark, path, None, output, environ, plan.cell_flags(args))
        provenance.require_models(grid.cells)
        (item,) = plan.examine_all(grid, out, max_attempts=limit(args))
        engine = item.cell.engine
        found.append(
            Job(path.stem, path, out, engine.group, engine.tensor_parallel_size, (item,), flags, args.benchmark)
        )
    return found


def presets(name: str) -> list[Path]:
    """The configurations of a model: NAME_baseline.yaml, NAME_ngram.yaml, ..."""
    found = sorted(PRESETS.glob("*.yaml"))
    chosen = [path for path in found if name == path.stem.rpartition("_")[0]]
    if not chosen:
        known = ", ".join(sorted({path.stem.rpartition("_")[0] for path in found})) or f"none in {PRESETS}"
        raise MissingError(f"no presets of {name!r}; there are: {known}")
    return chosen


def limit(args: argparse.Namespace) -> int:
    return 10**9 if args.retry_failed else record.MAX_ATTEMPTS
