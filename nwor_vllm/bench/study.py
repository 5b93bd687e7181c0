"""A benchmark file and a configuration as a run: `nwor bench --benchmark FILE --config C.yaml --output-dir D`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nwor_vllm.bench import workload
from nwor_vllm.bench.grid import Cell, Engine, Grid, first_problem, read_mapping
from nwor_vllm.errors import ConfigError, unknown_key

SECTIONS: Mapping[str, frozenset[str]] = {
    "generation": frozenset({"max_tokens", "temperature", "top_p", "ignore_eos"}),
    "engine": frozenset({"tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "dtype", "enforce_eager"}),
    "speculative_decoding": frozenset({"method", "model", "num_speculative_tokens"}),
}


def load(benchmark: Path, config: Path | None, model: str | None, output: Path) -> tuple[Grid, Path]:
    """One cell over the whole file, in one batch; its record stands beside the output folder, named like it."""
    data = read_mapping(config) if config is not None else {}
    for key in data:
        if key != "model" and key not in SECTIONS:
            raise ConfigError(f"{config}: {unknown_key('setting', key, {'model', *SECTIONS})}")
    parts = {name: _section(data, name, config) for name in SECTIONS}
    target = model or data.get("model")
    if not isinstance(target, str) or not target:
        raise ConfigError("which model? name it with --model or as `model` in the --config file")
    speculation = parts["speculative_decoding"]
    draft_length = speculation.get("num_speculative_tokens", 5) if speculation else 0
    rows = workload.read_file(benchmark)
    try:
        engine = Engine(
            target=target, drafter=speculation.get("model", ""),
            method=speculation.get("method", "eagle") if speculation else "none",
            draft_length=draft_length, max_num_seqs=min(len(rows), 256), **parts["engine"],
        )  # fmt: skip
        cell = Cell(
            engine=engine, requests=len(rows), draft_length=draft_length, batches=1, warmup_batches=1,
            dataset=str(benchmark), references=("vanilla",), grid="study", id=output.name, file=f"{output.name}.json",
            **{"max_tokens": 512, "temperature": 0.0, **parts["generation"]},
        )  # fmt: skip
    except ValidationError as error:
        raise first_problem(error, str(config or "--benchmark")) from None
    return Grid(name="study", out=str(output.parent), cells=(cell,)), output.parent


def _section(data: Mapping[str, Any], name: str, config: Path | None) -> dict[str, Any]:
    section = data.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{config}: {name} is {section!r:.60}; expected names and settings")
    for key in section:
        if key not in SECTIONS[name]:
            raise ConfigError(
                f"{config}: {unknown_key('setting', f'{name}.{key}', {f'{name}.{k}' for k in SECTIONS[name]})}"
            )
    return section
