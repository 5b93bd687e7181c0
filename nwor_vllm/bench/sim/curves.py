"""Cost curves: the true step time of a simulated machine. Built-in models, or a profile measured on a real one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nwor_vllm.errors import CorruptFileError, MissingError, unknown_key

FORMAT, VERSION = "nwor-cost", 1


@dataclass(frozen=True)
class Curve:
    """seconds = max(weights + request * n, token * padded verified tokens) + draft steps * (draft + draft_request * n)
    + draft_start where anything is drafted."""

    name: str
    weights: float  # reading the target's weights
    request: float  # one more request's KV cache and bookkeeping
    token: float  # one more verified token, once compute-bound
    draft: float  # one draft step
    draft_request: float  # one more request in it
    draft_start: float = 0.0  # what drafting costs before its first step
    pad: int = 1  # verified tokens are padded to multiples of this (graph capture sizes)
    additive: bool = False  # tokens cost from the first one on (CPUs), not only beyond the memory bound

    def seconds(self, n: Any, verified: Any, steps: Any) -> Any:
        tokens = np.ceil(np.asarray(verified) / self.pad) * self.pad if self.pad > 1 else np.asarray(verified)
        memory = self.weights + self.request * n
        target = memory + self.token * tokens if self.additive else np.maximum(memory, self.token * tokens)
        return target + steps * (self.draft + self.draft_request * n) + self.draft_start * (np.asarray(steps) > 0)


CURVES = {
    # A model, not a measurement: Llama-3.1-8B in bf16 on an H200 (4.3 TB/s, 711 TFLOP/s achieved), EAGLE and EAGLE-3.
    "h200-8b-eagle": Curve("h200-8b-eagle", 3.5e-3, 3.1e-5, 2.2e-5, 3.6e-4, 2e-6, pad=8),
    "h200-8b-eagle3": Curve("h200-8b-eagle3", 3.5e-3, 3.1e-5, 2.2e-5, 1.75e-4, 2e-6, pad=8),
}


def save(curve: Curve, rows: NDArray[np.float64], about: Mapping[str, Any], path: Path) -> None:
    """A profile: the fitted curve and the measured rows (requests, verified, draft steps, context, seconds)."""
    document = {"format": FORMAT, "version": VERSION, "curve": asdict(curve), "rows": rows.tolist(), "about": about}
    path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path) -> tuple[Curve, NDArray[np.float64]]:
    if not path.is_file():
        raise MissingError(f"no cost profile at {path}; `nwor profile --cost` writes one")
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise CorruptFileError(f"{path} is no cost profile: its format is {document['format']!r}, not {FORMAT!r}")
        if document["version"] != VERSION:
            raise CorruptFileError(
                f"{path} is a cost profile of version {document['version']}; this reads version {VERSION}"
            )
        return Curve(**document["curve"]), np.array(document["rows"], float).reshape(-1, 5)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is damaged or no {FORMAT} file (version {VERSION}): {error}") from error


def find(name: str) -> Curve:
    if name in CURVES:
        return CURVES[name]
    if name.endswith(".json"):
        return load(Path(name))[0]
    raise unknown_key("cost curve", name, CURVES)
