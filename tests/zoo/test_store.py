"""Folders are verified on use; the widened target computes the same function and is never seen half built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nwor_vllm import zoo
from nwor_vllm.bench.cli import main
from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError
from nwor_vllm.zoo import store
from nwor_vllm.zoo.build import load_llama
from nwor_vllm.zoo.llama import Shape


@pytest.fixture
def copy(tmp_path, monkeypatch):
    root = tmp_path / "pair"
    shutil.copytree(store.weights_root(), root)
    monkeypatch.setenv("NWOR_ZOO", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def test_what_ships_is_small_intact_and_in_small_files():
    files = [file for file in store.weights_root().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16 * 2**20
    assert max(file.stat().st_size for file in files) < 4 * 2**20
    for member in ("target", "eagle", "eagle3", "draft"):
        assert (zoo.path(member) / "config.json").is_file()


@pytest.mark.parametrize("member", ["target", "eagle", "wide"])
def test_a_flipped_byte_is_one_line_that_names_the_file(copy, member, capsys):
    victim = next((copy / ("eagle" if member == "eagle" else "target")).glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert main(["zoo", "path", member]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert str(victim) in error[0]
    assert "nwor zoo build" in error[0]


def test_a_file_that_changes_in_a_running_process_is_noticed(copy):
    zoo.path("eagle")
    (copy / "eagle" / "config.json").write_text("{}")
    with pytest.raises(CorruptFileError):
        zoo.path("eagle")


def test_missing_files_and_a_damaged_listing_are_told_apart(copy):
    (copy / "draft" / "config.json").unlink()
    with pytest.raises(MissingError, match=r"config\.json is missing"):
        zoo.path("draft")
    (copy / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(CorruptFileError, match="damaged at line"):
        zoo.path("target")
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(MissingError, match="nwor zoo build"):
        zoo.path("target")


def test_an_unknown_member_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'eagle"):
        zoo.path("eagel")


def test_the_widened_target_computes_the_same_function(copy):
    narrow = load_llama(zoo.path("target"), Shape())
    wide = load_llama(zoo.path("wide"), Shape(ffn=8192))
    assert sum(p.numel() for p in wide.parameters()) > 25_000_000
    ids = torch.randint(3, 1536, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = narrow(ids), wide(ids)
    # Only the order of summation differs.
    assert (a - b).abs().max() < 1e-3
    assert torch.equal(a.argmax(-1), b.argmax(-1))


def test_widening_at_once_from_several_processes_leaves_one_whole_folder(copy):
    code = "from nwor_vllm import zoo; print(zoo.path('wide'))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(found) == 1
    folder = found.pop()
    assert load_file(f"{folder}/model.safetensors")
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
