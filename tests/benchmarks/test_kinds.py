"""What kinds of requests are worth: the benchmark tells what it says it tells, and sums up its own cells."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench.sim import workloads
from nwor_vllm.errors import ConfigError


@pytest.fixture(scope="module")
def kinds() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "kinds.py"
    spec = importlib.util.spec_from_file_location("kinds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["kinds"] = module  # its workers look for its functions there
    return module


def test_so_much_is_told(kinds: ModuleType) -> None:
    sampled, greedy = workloads.recorded()["code@0.7"], workloads.recorded()["code@0"]
    assert kinds.labelled(greedy, "code", "nothing").kinds == ()
    assert set(kinds.labelled(greedy, "code", "temperature").kinds) == {"greedy"}
    assert set(kinds.labelled(greedy, "code", "domain").kinds) == {"code greedy"}
    assert set(kinds.labelled(sampled, "code", "domain").kinds) == {"code sampled"}


def test_it_writes_what_kinds_are_worth(kinds: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "kinds.json"
    assert kinds.main(["--batches", "1", "--seeds", "2", "--passes", "2", "--tokens", "1500", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(c["batch"], c["seed"]) for c in found["cells"]] == [(1, 0), (1, 1)]
    cold = [c["temperature"]["cold"] for c in found["cells"]]
    assert found["over_o1"]["1"]["temperature"]["cold"] == pytest.approx((cold[0] * cold[1]) ** 0.5)
    worth = [c[told]["warm"] for c in found["cells"] for told in kinds.TOLD]
    assert min(worth) > 0.8
    assert len(set(worth)) == len(worth)  # kinds were told, and changed something


def test_counts_of_nothing_are_refused(kinds: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected whole numbers from 1 up"):
        kinds.main(["--seeds", "0", "--out", str(tmp_path / "x.json")])
