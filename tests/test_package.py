"""The sdist and the wheel both hold the whole package, and work where they are installed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows: the sdist first, the wheel from the sdist."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def package_files() -> set[str]:
    """Every file the package consists of, by its installed name."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "nwor_vllm", "kernels"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = [name for name in names if (ROOT / name).is_file()]
    return {f"nwor_vllm/{name}" if name.startswith("kernels/") else name for name in there}


def test_the_wheel_holds_every_file_of_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entries = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert package_files() - names == set(), "add the package, or package-data, to pyproject.toml"
    assert names - package_files() == set()
    assert "nwor = nwor_vllm.bench.cli:main" in entries
    assert "[vllm.general_plugins]\nnwor = nwor_vllm.plugin:register" in entries


def test_the_sdist_holds_it_too(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {name.replace("nwor_vllm/kernels/", "kernels/") for name in package_files()}
    assert wanted - names == set()
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_no_hard_dependency_brings_its_own_vllm_or_torch() -> None:
    needed = [line for line in importlib.metadata.requires("nwor-vllm") or [] if "extra ==" not in line]
    assert [line for line in needed if line.startswith(("vllm", "torch", "triton"))] == []


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(dist: Path, tmp_path: Path) -> None:
    """A fresh environment that sees this one's vLLM, but not the checkout."""
    (wheel,) = dist.glob("*.whl")
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    python = env / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    site = next((env / "lib").glob("python*")) / "site-packages"
    # A plain path: the .pth files in there, and so the editable install, are not followed.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import importlib.metadata as m, nwor_vllm, nwor_vllm.kernels, nwor_vllm.kernels.reference, transformers\n"
        "found = m.entry_points(group='vllm.general_plugins', name='nwor')\n"
        "[e.load()() for e in found]\n"
        "print(len(found), nwor_vllm.__file__, nwor_vllm.kernels.__file__)"
    )
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, package, kernels = done.stdout.split()
    assert int(count) >= 1
    assert package == str(site / "nwor_vllm" / "__init__.py")
    assert kernels == str(site / "nwor_vllm" / "kernels" / "__init__.py")
    # `kernels/` at the root must not stand in for the package of that name that transformers may look for.
    root = subprocess.run([python, "-c", "import transformers"], cwd=ROOT, env=plain, capture_output=True, check=False)
    assert root.returncode == 0, root.stderr
    version = subprocess.run([env / "bin" / "nwor", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == importlib.metadata.version("nwor-vllm")


@pytest.mark.slow
def test_kernels_and_transformers_import_from_the_root_too(root: Path) -> None:
    """There the checkout's folders come before what is installed."""
    code = "import transformers, nwor_vllm.kernels as k; from transformers import LlamaForCausalLM; print(k.__file__)"
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(root / "kernels" / "__init__.py")
