"""The page: one HTML file without a script or a link to anything outside itself."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from datetime import datetime

import jinja2

from nwor_vllm.report import plot
from nwor_vllm.report.findings import BASELINES, Against, Findings, Run, sentences


@functools.cache
def template() -> jinja2.Template:
    source = importlib.resources.files("nwor_vllm.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "count": count, "cell": cell}
    return environment.from_string(source)


def render(found: Findings, title: str, now: datetime) -> str:
    return template().render(
        title=title,
        now=now.strftime("%Y-%m-%d %H:%M"),
        found=found,
        sentences=sentences(found),
        baselines=list(BASELINES),
        shapes=plot.SHAPES,
        forest=plot.forest,
        lengths=plot.lengths,
        context=context(found.runs),
    )


def context(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Where the numbers come from; more than one value means that not all runs are alike."""

    def values(name: str, *path: str) -> tuple[str, str]:
        seen: dict[str, None] = {}
        for run in runs:
            value: object = run.record.provenance
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            seen.setdefault("unknown" if value is None else _text(value))
        return name, " | ".join(seen)

    if not runs:
        return []
    pairs = dict.fromkeys(
        f"{r.record.cell.engine.target} with {r.record.cell.engine.drafter or 'no drafter'}" for r in runs
    )
    times = sorted(run.record.started_at for run in runs)
    return [
        ("models", " | ".join(pairs)),
        values("hardware", "identity", "hardware"),
        values("versions", "identity", "versions"),
        values("git", "git"),
        ("measured", f"{times[0]} to {times[-1]}"),
    ]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items() if inner not in (None, [], ""))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def cell(item: Against | None) -> str:
    """A ratio as the tables print it."""
    if item is None:
        return ""
    if item.low is None or item.high is None:
        return f"{item.ratio:.3f} (one batch)"
    return f"{item.ratio:.3f} [{item.low:.3f}, {item.high:.3f}]"


def percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def count(value: float | int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.2f}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
