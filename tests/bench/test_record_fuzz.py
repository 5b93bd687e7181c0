"""Damaged records through everything that reads one: a clear error or a right result, never a traceback.

200 in the gate; NWOR_FUZZ=5000 for more.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nwor_vllm.bench import compare, plan, record
from nwor_vllm.bench.cli import main
from nwor_vllm.errors import NworError

EPISODES = int(os.environ.get("NWOR_FUZZ", "200"))
HUGE = 10**400
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, HUGE, -HUGE, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**53 + 1, "", "x", "\ud800", "1",
    "\0", "../../etc/passwd", [], [[]], [None], {}, {"": None}, {"a": {"b": []}}, float("nan"), float("inf"),
    float("-inf"), "ünï", "a" * 5000,
)  # fmt: skip
VERSIONS = (0, 2, -1, "1", True, 1.0, None, [1], HUGE, 999)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value inside, so that shallow fields are as likely as the thousand hashes are not."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, value in items[:12]:
        yield (*path, key)
        yield from places(value, (*path, key))


def text_of(data: Any) -> bytes:
    return json.dumps(data).encode("utf-8", "surrogatepass")


def damaged(good: dict[str, Any], rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    raw = text_of(good)
    if kind == 0:
        return raw[: rng.randrange(len(raw))]
    if kind == 1:
        at = rng.randrange(len(raw))
        return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at + rng.randrange(9) :]
    if kind == 2:
        return rng.choice(
            (b"", b" \n", b"\xff\xfe\0\0", rng.randbytes(200), b"[" * 20_000, b"null", b"[]", b"1", b'"x"', raw + raw,
             b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), b"{" + b'"a":{' * 5000)
        )  # fmt: skip
    data = copy.deepcopy(good)
    if kind == 3:
        data["schema_version"] = rng.choice(VERSIONS)
        return text_of(data)
    spots = list(places(data))
    for _ in range(rng.randrange(1, 4)):
        *parents, last = rng.choice(spots)
        node = data
        try:
            for part in parents:
                node = node[part]
            if rng.random() < 0.25:
                del node[last]
            else:
                node[last] = rng.choice(VALUES)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    if kind == 4 and isinstance(data, dict):
        data[rng.choice(("extra", "", "schema_versions"))] = rng.choice(VALUES)
    if kind == 5:  # numbers as no encoder writes them
        return re.sub(
            rb"(?<=: )\d+(\.\d+)?",
            rng.choice((b"1e999", b"-1E+400", b"0x10", b"01", b"9" * 5000)),
            text_of(data),
            count=3,
        )
    return text_of(data)


def readers(path: Path, twin: Path, cell: Any, rng: random.Random) -> list[str]:
    """What each reader made of it; the names of those that raised anything but our own errors come out."""
    wrong = []
    readable = False
    try:
        found = record.read(path)
        readable = True
        json.loads(record.to_json(found), parse_constant=lambda name: wrong.append(f"to_json wrote {name}"))
    except NworError as error:
        if "\n" in str(error) or not str(error):
            wrong.append(f"read said {str(error)!r}")
    planned = plan.examine(cell, path.parent)
    if planned.state not in ("done", "pending", "exhausted"):
        wrong.append(planned.state)
    flags = rng.choice(([], ["--metric", "throughput"], ["--metric", "draft_tokens"], ["--json"]))
    a, b = rng.choice(((path, twin), (twin, path), (path.parent, twin.parent)))
    try:
        if main(["compare", str(a), str(b), *flags]) not in (0, 1, 2):
            wrong.append("compare ended strangely")
    except Exception as error:
        wrong.append(f"compare {flags}: {error!r}")
    if not (readable or rng.random() < 0.1):
        return wrong  # unreadable is one line of a report, whatever it was
    try:
        if main(["report", str(path.parent), "--output", str(path.parent / "r.html")]) not in (0, 1):
            wrong.append("report ended strangely")
    except Exception as error:
        wrong.append(f"report: {error!r}")
    return wrong


@pytest.mark.parametrize("part", range(4))
def test_no_damage_reaches_the_reader_as_a_traceback(finished: Path, tmp_path: Path, part: int, capsys: Any) -> None:
    folder = finished / "sweeps/adaptive_grid"
    twin = folder / "run1_r12_t64_temp0.0_d10_adaptive1.json"
    good = json.loads(twin.read_text(encoding="utf-8"))
    cell = record.read(twin).cell
    path, other = tmp_path / "a" / cell.file, tmp_path / "b" / cell.file
    path.parent.mkdir()
    other.parent.mkdir()
    other.write_bytes(twin.read_bytes())
    survived = 0
    for episode in range(part, EPISODES, 4):
        rng = random.Random(episode)
        raw = damaged(good, rng)
        path.write_bytes(raw)
        try:
            wrong = readers(path, other, cell, rng)
        except Exception as error:
            pytest.fail(f"episode {episode}: {error!r} on {raw[:200]!r}")
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, episode
        assert not re.search(r"\b(NaN|Infinity|x?nan|x?inf)\b", captured.out), episode
        assert wrong == [], (episode, wrong)
        with contextlib.suppress(NworError):
            survived += compare.subject(record.read(path), "x") is not None
    assert survived < EPISODES / 8  # most of the damage was seen, or this fuzzes nothing
