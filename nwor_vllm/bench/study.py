"""A benchmark file and a configuration as a run: `nwor bench --benchmark FILE --config C.yaml --output-dir D`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nwor_vllm.bench import workload
from nwor_vllm.bench.grid import Cell, Engine, Grid, first_problem, read_mapping
from nwor_vllm.errors import ConfigError, unknown_key

SECTIONS: Mapping[str, frozenset[str]] = {
    "generation": frozenset({"max_tokens", "temperature", "top_p", "ignore_eos"}),
    "engine": frozenset({"tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "dtype", "enforce_eager"}),
    "speculative_decoding": frozenset({"method", "model", "revision", "unpinned", "num_speculative_tokens"}),
}
MODEL_KEYS = frozenset({"model", "revision", "unpinned"})  # unpinned: why no revision could be named, for people
# What PROFILE=embedded puts in the place of a configuration's models.
EMBEDDED = {"eagle": "zoo:eagle", "eagle3": "zoo:eagle3", "draft_model": "zoo:draft", "ngram": "", "none": ""}
EMBEDDED_ENGINE = {"tensor_parallel_size": 1, "max_model_len": 1024, "enforce_eager": True, "dtype": "float32"}


def load(
    benchmark: Path, config: Path | None, model: str | None, output: Path, environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None, gammas: Sequence[str] = (),
) -> tuple[Grid, Path]:  # fmt: skip
    """One cell over the whole file, in one batch; its record stands beside the output folder, named like it.

    `flags` are settings of the run that win over the configuration's; `gammas` are draft lengths to measure each.
    """
    environ = environ or {}
    data = read_mapping(config) if config is not None else {}
    for key in data:
        if key not in MODEL_KEYS and key not in SECTIONS:
            raise ConfigError(f"{config}: {unknown_key('setting', key, {*MODEL_KEYS, *SECTIONS})}")
    parts = {name: _section(data, name, config) for name in SECTIONS}
    speculation = parts["speculative_decoding"]
    method: Any = speculation.get("method", "eagle") if speculation else "none"
    target = model or environ.get("TARGET_MODEL") or _pinned(data, f"{config}")
    drafter = (speculation and environ.get("DRAFT_MODEL")) or _pinned(speculation, f"{config}: speculative_decoding")
    if environ.get("PROFILE") == "embedded":
        if method not in EMBEDDED:
            raise ConfigError(f"{config}: PROFILE=embedded has no {method} drafter; valid: {', '.join(EMBEDDED)}")
        target, drafter = "zoo:target", EMBEDDED[method]
        parts["engine"] |= EMBEDDED_ENGINE
    elif width := environ.get("TENSOR_PARALLEL_SIZE"):
        parts["engine"]["tensor_parallel_size"] = width
    if not target:
        raise ConfigError("which model? name it with --model or as `model` in the --config file")
    draft_length = speculation.get("num_speculative_tokens", 5) if speculation else 0
    ladder = _ladder(gammas, speculation)
    draft_length = ladder[-1] if ladder else draft_length
    rows = workload.read_file(benchmark)
    try:
        engine = Engine(
            target=target, drafter=drafter, method=method,
            draft_length=draft_length, ladder=ladder, max_num_seqs=min(len(rows), 256), **parts["engine"],
        )  # fmt: skip
        references = (("vanilla", "best_fixed") if ladder else ("vanilla",)) if engine.elastic else ()
        settings = {"max_tokens": 512, "temperature": 0.0, "references": references, "batches": 1}
        cell = Cell(
            engine=engine, requests=len(rows), draft_length=draft_length, warmup_batches=1, dataset=str(benchmark),
            grid="study", id=output.name, file=f"{output.name}.json",
            **{**settings, **parts["generation"], **(flags or {})},
        )  # fmt: skip
    except ValidationError as error:
        raise first_problem(error, str(config or "--benchmark")) from None
    return Grid(name="study", out=str(output.parent), cells=(cell,)), output.parent


def _ladder(gammas: Sequence[str], speculation: Mapping[str, Any]) -> tuple[int, ...]:
    if not gammas:
        return ()
    if not speculation:
        raise ConfigError("--gamma needs a drafter: a --config with speculative_decoding")
    lengths = {int(text) for text in gammas if text.isdecimal() and 1 <= int(text) <= 64}
    if len(lengths) < len(gammas):
        raise ConfigError(f"--gamma is {' '.join(gammas)}; expected different draft lengths in 1..64")
    return (0, *sorted(lengths))


def _pinned(section: Mapping[str, Any], where: str) -> str:
    """`model` at `revision`, as one name."""
    values = {key: section.get(key) or "" for key in sorted(MODEL_KEYS)}
    for key, value in values.items():
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {key} is {value!r:.60}; expected text")
    return f"{values['model']}@{values['revision']}" if values["revision"] else values["model"]


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
