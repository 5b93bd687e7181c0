"""The page of measured figures and README say what the records say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def headline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("headline", ROOT / "benchmarks" / "headline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(ratio: float, concurrency: int = 4, drafter: str = "eagle", workload: str = "mixed") -> dict[str, object]:
    found = {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    over = {"over_best_fixed": found, "over_no_speculation": found}
    arms = dict.fromkeys(("goodput", "acceptance_biased", "batch_table", "throughput", "fixed_3"), over)
    load = {"workload": workload, "temperature": 0.8, "concurrency": concurrency}
    source = {"target": "target", "drafter": drafter, "page": "x.md"}
    return {**source, **load, "summary": {"best_fixed": "fixed_3", "arms": arms}}


def test_means_are_of_cells_of_a_kind(headline: ModuleType) -> None:
    found = [cell(0.5), cell(2.0, 16), cell(1.3, 1), cell(0.9, drafter="worthless"), cell(1.1, workload="both")]
    rows = [[part.strip() for part in line.strip("|").split("|")][:4] for line in headline.means(found)[2:]]
    assert rows == [
        ["1", "0.8", "1", "1.30 (1.20-1.40)"],
        ["4", "0 and 0.8", "1", "1.10 (1.00-1.20)"],
        ["4 to 16", "0.8", "2", "1.00 [0.50 to 2.00]"],
        ["4, worthless drafter", "0.8", "1", "0.90 (0.80-1.00)"],
    ]


def test_the_page_and_the_readme_are_current(headline: ModuleType) -> None:
    found = headline.cells(headline.RESULTS)
    expected = headline.page(found)
    now = headline.PAGE.read_text(encoding="utf-8")
    assert now == expected, "docs/measured.md is stale: run python benchmarks/headline.py"
    quoted = "\n\n" + "\n".join(headline.means(found)) + "\n\n"
    assert quoted in (ROOT / "README.md").read_text(encoding="utf-8"), "README quotes another table: run the same"
