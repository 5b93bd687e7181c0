from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nwor_vllm import __version__
from nwor_vllm.bench.cli import COMMANDS, main

NWOR = Path(sys.executable).parent / "nwor"


@pytest.mark.parametrize("asked", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(asked) == 0
    text = capsys.readouterr().out
    for name, (_, what) in COMMANDS.items():
        assert f"  {name} " in text
        assert what in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docter"]) == 2
    assert capsys.readouterr() == ("", "nwor: unknown command 'docter'; did you mean 'doctor'?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_module_that_configures_and_runs(name: str) -> None:
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.configure)
    assert callable(module.run)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_refuses_unknown_flags(name: str) -> None:
    with pytest.raises(SystemExit) as helped:
        main([name, "--help"])
    assert helped.value.code == 0
    with pytest.raises(SystemExit) as refused:
        main([name, "--no-such-flag"])
    assert refused.value.code == 2


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`nwor doctor --quick | head -0`: no traceback, also from the interpreter's own flush at exit."""
    command = f"set -o pipefail; '{NWOR}' doctor --quick | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
