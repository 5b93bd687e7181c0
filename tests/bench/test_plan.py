"""How long it will take, from past records of the same models."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench import grid, plan

GRID = """
name: small
file: "run{run}.json"
common: {requests: 3, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 2, warmup_batches: 0}
runs: [{run: 1}, {run: 2}, {run: 3, batches: 6}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(GRID, encoding="utf-8")
    return tmp_path / "small.yaml"


def planned(scripted: ModuleType, path: Path, out: str, **other: str) -> list[plan.Planned]:
    names = scripted.models(path.parent / "sweeps" / "models") | other
    return plan.examine_all(grid.load(path, "embedded", names), path.parent / "sweeps" / out)


def test_nothing_is_estimated_without_a_past(scripted: ModuleType, path: Path) -> None:
    assert plan.estimate_s(planned(scripted, path, "one")) is None


def test_what_is_pending_is_estimated_by_what_is_done(scripted: ModuleType, path: Path) -> None:
    out = path.parent / "sweeps" / "one"
    assert scripted.run_grid(path, out, scripted.Scripted({}, pause_s=0.01), only="run1") == []
    now = planned(scripted, path, "one")
    assert [p.state for p in now] == ["done", "pending", "pending"]
    assert now[0].seconds
    assert plan.estimate_s(now) == pytest.approx(now[0].seconds * 4)  # run 2 is as long, run 3 three times


def test_a_grid_without_a_past_takes_its_neighbour_s_but_not_another_model_s(scripted: ModuleType, path: Path) -> None:
    out = path.parent / "sweeps" / "one"
    assert scripted.run_grid(path, out, scripted.Scripted({}, pause_s=0.01), only="run1") == []
    seconds = planned(scripted, path, "one")[0].seconds
    assert seconds
    assert plan.estimate_s(planned(scripted, path, "two")) == pytest.approx(seconds * 5)
    folder = scripted.models(path.parent / "others")["target"]
    assert plan.estimate_s(planned(scripted, path, "two", target=folder)) is None
