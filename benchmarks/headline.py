"""What the records of `elastic_vs_fixed.py` say together: means by load and temperature, and every cell in one table.

python benchmarks/headline.py            # writes docs/measured.md; README quotes its first table
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "measured.md"
RIVALS = ("goodput", "acceptance_biased", "batch_table", "throughput")
NAMES = {"target": "plain", "regime_switch": "code, then creative", "both": "mixed"}
GROUPS = ("one", "several", "worthless")

PAGE_TEXT = """\
<!-- Made by benchmarks/headline.py from the records in benchmarks/results. -->
# Measured on real vLLM

Ratios of tokens per second in paired, interleaved blocks of one process: `benchmarks/elastic_vs_fixed.py` on a CPU core
with the embedded pair (bf16, EAGLE-1). The best fixed draft length is chosen in hindsight on the same blocks, which
favours it. The machine is shared.

## By load

Geometric means over the cells below; brackets hold the worst and the best cell, parentheses a 95 % interval.

{means}

## Every cell

Geometric mean of the blocks, and its 95 % interval. A target's name leads to its record's table, which has the command;
the commit is the one that was measured (records before 23f690a did not name it: it was entered later, from notes, where
the hash of the code agrees). With "noise" the drafter's weights are random; at "0 and 0.8" every other request is
greedy. Two runs were stopped after their first cell, so their commands name more than was measured: the wide target at
sixteen, and the plain one with noise at sixteen. "Each domain alone" on the plain target was measured in two processes,
four cells and ten.

{everything}
"""

Cell = Mapping[str, Any]


def cells(folder: Path) -> list[dict[str, Any]]:
    """Of all records, with the name of each one's own table."""
    found = []
    for path in sorted(folder.glob("elastic_vs_fixed_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        source = {
            "target": record["target"],
            "drafter": record["drafter"],
            "page": path.with_suffix(".md").name,
            "git": record["git"][:7],
        }
        found += [source | done["cell"] | {"summary": done["summary"]} for done in record["cells"].values()]
    return sorted(found, key=_order)


def _order(cell: Cell) -> tuple[Any, ...]:
    domain = cell["workload"] not in ("mixed", "both", "regime_switch")
    return group(cell), cell["target"] == "target", cell["concurrency"], domain, cell["workload"], temperatures(cell)


def group(cell: Cell) -> int:
    if cell["drafter"] == "worthless":
        return GROUPS.index("worthless")
    return GROUPS.index("one" if cell["concurrency"] == 1 else "several")


def temperatures(cell: Cell) -> str:
    return f"{'0 and ' if cell['workload'] == 'both' else ''}{cell['temperature']:g}"


def _interval(cell: Cell, arm: str, over: str) -> str:
    found = cell["summary"]["arms"][arm][f"over_{over}"]
    return f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def _mean(found: Sequence[Cell], arm: str, over: str) -> str:
    if len(found) == 1:
        return _interval(found[0], arm, over)
    kept = sorted(float(cell["summary"]["arms"][arm][f"over_{over}"]["ratio"]) for cell in found)
    return f"{statistics.geometric_mean(kept):.2f} [{kept[0]:.2f} to {kept[-1]:.2f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def means(found: Sequence[Cell]) -> list[str]:
    """By requests in flight and temperature."""
    kinds: dict[tuple[int, str], list[Cell]] = {}
    for cell in found:
        kinds.setdefault((group(cell), temperatures(cell)), []).append(cell)
    rows = []
    for (which, heat), mine in sorted(kinds.items()):
        loads = sorted({cell["concurrency"] for cell in mine})
        flying = f"{loads[0]} to {loads[-1]}" if len(loads) > 1 else f"{loads[0]}"
        rows.append([
            f"{flying}, worthless drafter" if GROUPS[which] == "worthless" else flying, heat, str(len(mine)),
            _mean(mine, "goodput", "no_speculation"), *(_mean(mine, arm, "best_fixed") for arm in RIVALS),
        ])  # fmt: skip
    return table(
        ["in flight", "T", "cells", "default policy / no speculation", "default policy / best fixed",
         "biased acceptance / best fixed", "vLLM's table / best fixed", "`throughput` / best fixed"], rows,
    )  # fmt: skip


def everything(found: Sequence[Cell]) -> list[str]:
    rows = []
    for cell in found:
        best, target = cell["summary"]["best_fixed"], NAMES.get(cell["target"], cell["target"])
        rows.append([
            f"[{target}](../benchmarks/results/{cell['page']})",
            NAMES.get(cell["workload"], cell["workload"]) + (", noise" if cell["drafter"] == "worthless" else ""),
            str(cell["concurrency"]), temperatures(cell), best.removeprefix("fixed_"),
            _interval(cell, best, "no_speculation"), _interval(cell, "goodput", "no_speculation"),
            *(_interval(cell, arm, "best_fixed") for arm in RIVALS), cell["git"],
        ])  # fmt: skip
    return table(
        ["target", "traffic", "in flight", "T", "best fixed K", "best fixed / none", "default policy / none",
         "default policy / best fixed", "biased acceptance / best fixed", "vLLM's table / best fixed",
         "`throughput` / best fixed", "commit"], rows,
    )  # fmt: skip


def page(found: Sequence[Cell]) -> str:
    return PAGE_TEXT.format(means="\n".join(means(found)), everything="\n".join(everything(found)))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    PAGE.write_text(page(cells(RESULTS)), encoding="utf-8")
    print("\n".join(means(cells(RESULTS))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
