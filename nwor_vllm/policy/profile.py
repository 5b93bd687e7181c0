"""Cost profiles: step times measured before, so that a fresh server does not start from guesses.

JSON: {"format": "nwor-cost", "version": 2, "rows": [[requests, verified tokens, draft steps, judged, context tokens,
seconds], ...], "about": {...}}. Judged are the draft steps after which confidence was computed. `Cost.seed` takes the
rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nwor_vllm.errors import CorruptFileError, MissingError

FORMAT, VERSION = "nwor-cost", 2
COLUMNS = ("requests", "verified tokens", "draft steps", "judged", "context tokens", "seconds")


@dataclass(frozen=True)
class Profile:
    rows: tuple[tuple[float, ...], ...]
    about: Mapping[str, Any] = field(default_factory=dict)  # machine, pair, versions, command


def write(rows: Sequence[Sequence[float]], about: Mapping[str, Any], path: Path) -> None:
    document = {"format": FORMAT, "version": VERSION, "columns": COLUMNS, "about": dict(about)}
    lines = ",\n".join("  " + json.dumps([float(x) for x in row]) for row in rows)
    path.write_text(json.dumps(document, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n")


def read(path: Path) -> Profile:
    if not path.is_file():
        raise MissingError(f"no cost profile at {path}; `nwor profile --cost` writes one")
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CorruptFileError(f"{path} is no cost profile: expected a JSON object with format {FORMAT!r}")
        if document.get("version") != VERSION:
            raise CorruptFileError(
                f"{path} is a cost profile of version {document.get('version')}; this reads version {VERSION}: "
                "measure it anew with `nwor profile --cost`"
            )
        rows = tuple(tuple(float(x) for x in row) for row in document["rows"])
        about = dict(document.get("about", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged or no {FORMAT} file (version {VERSION}): {error}") from error
    for i, row in enumerate(rows):
        if len(row) != len(COLUMNS) or not all(math.isfinite(x) and x >= 0 for x in row) or not row[-1] > 0:
            raise CorruptFileError(f"{path} row {i} is {list(row)}; expected {', '.join(COLUMNS)}, seconds above 0")
    return Profile(rows, about)
