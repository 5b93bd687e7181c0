"""Inline SVG, coloured by the page's variables so that it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nwor_vllm.report.findings import BASELINES, Run

LEFT, WIDTH, ROW, TOP = 260, 900, 22, 34
TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
SHAPES = dict(zip(BASELINES, ("circle", "square", "diamond"), strict=True))


def forest(runs: Sequence[Run]) -> str:
    """Each run's time over each baseline's with its 95 % interval, on a logarithmic axis."""
    ends = [x for run in runs for a in run.against.values() for x in (a.ratio, a.low, a.high) if x]
    if not ends:
        return ""
    low, high = min([0.8, *ends]), max([1.25, *ends])
    low, high = max(low * 0.95, 0.02), min(high * 1.05, 50.0)

    def at(ratio: float) -> float:
        share = (math.log(min(max(ratio, low), high)) - math.log(low)) / (math.log(high) - math.log(low))
        return LEFT + share * (WIDTH - LEFT - 20)

    per_run = [list(run.against.items()) for run in runs]
    height = TOP + sum(max(len(found), 1) * 11 + 12 for found in per_run) + 10
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="time ratios with intervals">']
    drawn: list[float] = []
    for tick in sorted(TICKS, key=lambda tick: (tick != 1.0, abs(math.log(tick)))):  # 1 first, then away from it
        x = at(tick)
        if not low <= tick <= high or any(abs(x - other) < 30 for other in drawn):
            continue
        drawn.append(x)
        kind, span = "one" if tick == 1.0 else "tick", f'y1="{TOP - 12}" y2="{height - 8}"'
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" {span}/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{TOP - 18}">{tick:g}</text>')
    y = TOP
    for run, found in zip(runs, per_run, strict=True):
        star = "★ " if run.record.headline else ""
        middle = y + max(len(found), 1) * 11 / 2 + 1
        parts.append(f'<text class="name" x="{LEFT - 8}" y="{middle:.1f}">{star}{escape(_short(run.id))}</text>')
        for name, item in found:
            y += 11
            title = f"{run.id} against {name}: x{item.ratio:.3f}, {item.verdict}"
            parts.append(f'<g class="{item.sign}"><title>{escape(title)}</title>')
            if item.low and item.high:
                parts.append(f'<line x1="{at(item.low):.1f}" x2="{at(item.high):.1f}" y1="{y - 6}" y2="{y - 6}"/>')
            parts.append(_mark(SHAPES[name], at(item.ratio), y - 6) + "</g>")
        y += 12 if found else 23
    return "\n".join([*parts, "</svg>"])


def _mark(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y}" r="4"/>'
    turn = f' transform="rotate(45 {x:.1f} {y})"' if shape == "diamond" else ""
    return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7"{turn}/>'


def _short(name: str) -> str:
    return name if len(name) <= 38 else name[:37] + "…"


def lengths(runs: Sequence[Run]) -> str:
    """How often each draft length was planned: a bar a run, one shade a length."""
    planned = [
        (run, {int(k): n for k, n in (run.subject.k_histogram or {}).items() if k.isdecimal() and len(k) < 4 and n > 0})
        for run in runs
    ]
    known = [(run, counts) for run, counts in planned if counts]
    if not known:
        return ""
    longest = max(k for _, counts in known for k in counts)
    height = TOP + ROW * len(known) + 6
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="planned draft lengths">']
    for k in range(longest + 1) if longest < 40 else ():
        x = LEFT + k * min(46.0, (WIDTH - LEFT - 20) / (longest + 1))
        parts.append(
            f'<rect class="shade" style="--level:{_level(k, longest)}" x="{x:.1f}" y="4" width="12" height="12"/>'
        )
        parts.append(f'<text class="key" x="{x + 15:.1f}" y="14">{k}</text>')
    for number, (run, counts) in enumerate(known):
        y, x, total = TOP + number * ROW, float(LEFT), sum(counts.values())
        parts.append(f'<text class="name" x="{LEFT - 8}" y="{y + 12}">{escape(_short(run.id))}</text>')
        for k, n in sorted(counts.items()):
            wide = (WIDTH - LEFT - 20) * n / total
            size = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="15"'
            title = f"<title>K={k}: {n} of {total} steps</title>"
            parts.append(f'<rect class="shade" style="--level:{_level(k, longest)}" {size}>{title}</rect>')
            x += wide
    return "\n".join([*parts, "</svg>"])


def _level(k: int, longest: int) -> str:
    return f"{12 + 88 * k / max(longest, 1):.0f}%"
