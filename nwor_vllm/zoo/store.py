"""Where the pair lies, whether it is intact, and the widened target built from it on demand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError, unknown_key

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Member:
    """One folder of the pair. `ffn` is set where it is the target widened to that many neurons."""

    name: str
    role: str
    method: str | None = None
    ffn: int | None = None


MEMBERS = {
    member.name: member
    for member in (
        Member("target", "2.7 M parameters, trained on the synthetic chats"),
        Member("wide", "the target with inert neurons: same output, the cost of 29 M parameters", ffn=8192),
        Member("wider", "the target with inert neurons: same output, the cost of 57 M parameters", ffn=16384),
        Member("eagle", "EAGLE-1 head, unrolled training", method="eagle"),
        Member("eagle3", "EAGLE-3 head over target layers 2, 4, 6", method="eagle3"),
        Member("draft", "independent two-layer draft model", method="draft_model"),
    )
}


def weights_root() -> Path:
    """The pair in use: `NWOR_ZOO` where set (a folder `nwor zoo build` wrote), else the one in the package."""
    return Path(os.environ.get("NWOR_ZOO") or Path(__file__).parent / "weights")


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nwor-vllm" / "zoo"


def path(name: str) -> Path:
    """The folder of a member, verified; a widened target is built the first time it is asked for."""
    if name not in MEMBERS:
        raise unknown_key("member of the embedded pair", name, MEMBERS)
    member = MEMBERS[name]
    root = weights_root()
    sums = checksums(root)
    if member.ffn is None:
        _verify(root, name, sums)
        return root / name
    _verify(root, "target", sums)
    return _widened(root / "target", member, _identity(sums, "target"))


def checksums(root: Path) -> dict[str, str]:
    listing = root / SUMS
    if not listing.is_file():
        raise MissingError(f"the embedded pair is missing from {root}; run `nwor zoo build`")
    sums = {}
    for line in listing.read_text().splitlines():
        digest, _, file = line.partition("  ")
        if len(digest) != 64 or not file:
            raise CorruptFileError(f"{listing} is damaged at line {line!r}; run `nwor zoo build`")
        sums[file] = digest
    return sums


def _identity(sums: dict[str, str], name: str) -> str:
    parts = [f"{digest} {file}" for file, digest in sorted(sums.items()) if file.startswith(f"{name}/")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _verify(root: Path, name: str, sums: dict[str, str]) -> None:
    files = {file: digest for file, digest in sums.items() if file.startswith(f"{name}/")}
    if not files:
        raise MissingError(f"{root / name} is not listed in {root / SUMS}; run `nwor zoo build`")
    for file, digest in files.items():
        if not (root / file).is_file():
            raise MissingError(f"{root / file} is missing; run `nwor zoo build`")
        stat = (root / file).stat()
        if _digest(root / file, stat.st_size, stat.st_mtime_ns) != digest:
            raise CorruptFileError(f"{root / file} does not match its checksum; run `nwor zoo build`")


@cache
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    """Size and time are in the key so that a file changed while the process lives is read again."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _widened(target: Path, member: Member, identity: str) -> Path:
    """Built beside its place and renamed, so that a killed or concurrent build never shows half a folder."""
    folder = cache_root() / f"{member.name}-{identity}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{member.name}-", dir=folder.parent))
    try:
        widen(target, partial, member.ffn or 0)
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process was first; its folder is the same to the byte.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def widen(source: Path, out: Path, ffn: int) -> None:
    """Pads every FFN with zero neurons: silu(0) * 0 through a zero column adds nothing to the function."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    extra = ffn - config["intermediate_size"]
    if extra < 0:
        raise ConfigError(f"a widened FFN must have at least {config['intermediate_size']} neurons, got {ffn}")
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, extra))
            elif name.endswith("down_proj.weight"):
                tensor = torch.nn.functional.pad(tensor, (0, extra))
            tensors[name] = tensor.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        if file.name != "model.safetensors.index.json":
            shutil.copy(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": ffn}, indent=2) + "\n")
