"""The scripted engine as a module, for the tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def scripted() -> ModuleType:
    return beside("scripted_engine")


@pytest.fixture(scope="session")
def ncu_file() -> ModuleType:
    return beside("ncu_file")


def beside(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def finished(scripted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three grids, done by the scripted engine. Read only."""
    out = tmp_path_factory.mktemp("lab")
    for name in ("adaptive_grid", "early_exit_grid", "oneoff_scenarios"):
        factors = {"fixed": 1.0, "goodput": 0.8, "off": 1.5}
        failed = scripted.run_grid(
            ROOT / "sweeps_config" / f"{name}.yaml", out / "sweeps" / name, scripted.Scripted(factors)
        )
        assert failed == []
    return out
