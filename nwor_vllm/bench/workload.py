"""Prompts: from a JSONL or ShareGPT file, the embedded domains, or random. Equal for every arm, new in every batch."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nwor_vllm.bench.grid import Cell
from nwor_vllm.errors import ConfigError, MissingError

HUMAN = frozenset({"human", "user"})


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    text: str
    category: str
    seed: int  # of this request's sampling, the same for every arm
    arrival_s: float = 0.0  # after the start of its batch, the same for every arm


@dataclass(frozen=True, slots=True)
class Workload:
    warmup: tuple[tuple[Prompt, ...], ...]
    batches: tuple[tuple[Prompt, ...], ...]
    repeats: bool  # the source has fewer prompts than the measured batches need


def build(cell: Cell) -> Workload:
    """The batches of a cell; warm-up prompts come after the measured ones, so that more warm-up changes nothing."""
    needed = cell.requests * (cell.batches + cell.warmup_batches)
    if cell.dataset:
        pool = read_file(Path(cell.dataset))
        random.Random(cell.seed).shuffle(pool)
    else:
        pool = generate(cell.workload, needed, cell.seed)
    prompts = [_numbered(pool[i % len(pool)], i, len(pool), cell.seed) for i in range(needed)]
    size = cell.requests
    batches = [_timed(prompts[i : i + size], cell, i // size) for i in range(0, needed, size)]
    return Workload(tuple(batches[cell.batches :]), tuple(batches[: cell.batches]), size * cell.batches > len(pool))


def _timed(prompts: Sequence[Prompt], cell: Cell, batch: int) -> tuple[Prompt, ...]:
    times = arrivals(len(prompts), cell.request_rate, cell.burstiness, (cell.seed, batch))
    return tuple(replace(prompt, arrival_s=time) for prompt, time in zip(prompts, times, strict=True))


def arrivals(count: int, rate: float | str, burstiness: float | str, seed: Sequence[int]) -> list[float]:
    """Seconds after the start of a batch, one for each request, as vLLM's `bench serve` draws them.

    Gaps are gamma distributed with shape `burstiness` (1 is a Poisson process, below 1 comes in bursts, inf is evenly
    spaced) and scaled so that the last request arrives after count / rate seconds.
    """
    if rate == "inf":
        return [0.0] * count
    shape, mean = float(burstiness), 1 / float(rate)
    if math.isinf(shape):
        return [mean * (i + 1) for i in range(count)]
    times = np.cumsum(np.random.default_rng(seed).gamma(shape, mean / shape, count))
    # A tiny shape can leave every gap at 0: then they do all come at once, after n / rate seconds.
    scale = count * mean / times[-1] if times[-1] > 0 else 1.0
    return [float(time * scale) for time in times]


def _numbered(source: tuple[str, str, str], index: int, pool: int, seed: int) -> Prompt:
    name, text, category = source
    round_ = index // pool
    token = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return Prompt(f"{name}#{round_}" if round_ else name, text, category, int.from_bytes(token[:4], "big") >> 1)


def sha256(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256("\0".join(p.text for p in prompts).encode()).hexdigest()[:16]


def generate(workload: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """(id, text, category) from the embedded domains; `random` has no structure that a drafter could learn."""
    if workload == "random":
        rng = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4096)]
        return [(f"random-{i:05d}", " ".join(rng.choices(words, k=32)), "random") for i in range(count)]
    from nwor_vllm import zoo

    rows = zoo.prompts("all" if workload == "mixed" else workload, count, seed)
    return [(row["id"], row["prompt"], row["domain"]) for row in rows]


def read_file(path: Path) -> list[tuple[str, str, str]]:
    """(id, text, category) of every row. One bad row is an error with its line: a skipped row is another experiment."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError(f"dataset {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset {path} cannot be read: {error}") from None
    rows: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    for where, data in _rows(text, path):
        row = _row(data, where, f"{path.stem}-{len(rows):05d}")
        if row[0] in seen:
            raise ConfigError(f"{where}: id {row[0]!r} occurs twice")
        seen.add(row[0])
        rows.append(row)
    if not rows:
        raise ConfigError(f"dataset {path} holds no prompts")
    return rows


def _rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """JSON lines, or one JSON array (as ShareGPT is published)."""
    if text.lstrip().startswith("["):
        for index, data in enumerate(_json(text, str(path))):
            yield f"{path}[{index}]", data
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if line.strip():
            yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {str(error)[:100]}") from None


def _row(data: Any, where: str, fallback: str) -> tuple[str, str, str]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is {type(data).__name__}; expected an object with `prompt` or `conversations`")
    text = data["prompt"] if "prompt" in data else _first_human(data.get("conversations"), where)
    name = data.get("id", fallback)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: prompt is {text!r:.40}; expected text")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ConfigError(f"{where}: id is {name!r:.40}; expected text or a number")
    try:
        text.encode()
        str(name).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: half a surrogate pair; re-encode the file as UTF-8") from None
    category = data.get("category", "")
    return str(name), text, category if isinstance(category, str) else ""


def _first_human(turns: Any, where: str) -> Any:
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, dict) and isinstance(turn.get("from"), str) and turn["from"] in HUMAN:
                return turn.get("value")
    raise ConfigError(f"{where}: neither `prompt` nor a human turn in `conversations`")
