"""Scripted pairs: a target and an EAGLE drafter of any Llama shape whose behaviour is known in advance.

What the target writes, and at which positions the drafter is right, follows from the prompt alone (script_marks.py);
what a step costs is that of the real shape, because every layer, head and matrix is there and computed
(script_weights.py). Small pairs are written as safetensors; large ones as a directory of configs whose tensors the
`scripted` load format fills on the device (script_loader.py).

The programmed acceptance is that of greedy drafts (vLLM's default) at any temperature at which the target's peak of 20
logits leaves no choice. Attention hardly touches the output: a scripted pair measures speed and acceptance, it does
not detect a damaged KV cache.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError
from nwor_vllm.zoo.script_marks import GOLDEN, Regime, Ring, ScriptClass, depths_of, lay_rings
from nwor_vllm.zoo.script_shape import BOS, DECOY, EOS, Layout, Shape, layout_for
from nwor_vllm.zoo.script_weights import NamedTensors, ScriptWeights

SCHEMA_VERSION = 1
MANIFEST = "script.json"
TARGET, DRAFTER = "target", "drafter"
WRITE_LIMIT_BYTES = 1 << 30
PROMPTS_PER_CLASS = 64


@dataclass(frozen=True)
class ScriptedPair:
    path: Path
    shape: Shape
    classes: tuple[ScriptClass, ...]
    seed: int = 0
    doubt_confidence: float = 0.4
    blur: float = 0.0
    weights: bool = True

    def __post_init__(self) -> None:
        if not 0.1 <= self.doubt_confidence <= 0.9:
            raise ConfigError(f"doubt_confidence: {self.doubt_confidence} is outside 0.1..0.9")
        if not 0 <= self.blur <= 1:
            raise ConfigError(f"blur: {self.blur} is outside 0..1")
        if not 0 <= self.seed < 1 << 31:
            raise ConfigError(f"seed: {self.seed} is outside 0..2^31-1")
        _ = self.layout, self.rings  # refuse what cannot be scripted before anything is written

    @property
    def target(self) -> Path:
        return self.path / TARGET

    @property
    def drafter(self) -> Path:
        return self.path / DRAFTER

    @property
    def depths(self) -> int:
        return depths_of(self.classes)

    @cached_property
    def layout(self) -> Layout:
        return layout_for(self.shape, self.depths)

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        return lay_rings(self.classes, self.shape.vocab, self.blur, self.seed)

    def _ring(self, name: str) -> Ring:
        for ring in self.rings:
            if ring.spec.name == name:
                return ring
        raise ConfigError(f"unknown class {name!r}; valid: {', '.join(ring.spec.name for ring in self.rings)}")

    def _last(self, prompt: Sequence[int]) -> tuple[Ring, int]:
        """The ring that a prompt's last token belongs to, and that token's index in it."""
        for ring in self.rings:
            if prompt and prompt[-1] in ring:
                return ring, prompt[-1] - ring.start
        raise ConfigError("prompt: its last token belongs to no class of this pair")

    def prompt(self, class_: str, i: int, length: int = 16, of: int | None = None) -> list[int]:
        """The i-th prompt of a class: the text up to where a regime or a round begins.

        `of` spreads that many prompts evenly: where together they write the whole ring once, every mark is read once
        and the measured acceptance is the programmed one; shorter runs add the scatter of a sample.
        """
        if length < 1:
            raise ConfigError(f"prompt: length must be at least 1, not {length}")
        ring = self._ring(class_)
        first = ring.prompt_start(i % of / of if of else i * GOLDEN % 1.0)
        return [ring.start + (first - length + offset) % ring.size for offset in range(length)]

    def text(self, tokens: Iterable[int]) -> str:
        """What the pair's tokenizer reads back as these tokens."""
        return " ".join(map(_word, tokens))

    def expected_output(self, prompt: Sequence[int], n: int) -> list[int]:
        ring, last = self._last(prompt)
        return [ring.start + (last + offset) % ring.size for offset in range(1, n + 1)]

    def expected_acceptance(self, source: str | Sequence[int], k: int, after: int = 0) -> tuple[float, ...]:
        """The programmed P(position accepted | reached) for positions 1..k, `after` tokens from a prompt's end."""
        if isinstance(source, str):
            regime = self._ring(source).spec.regime_after(after)
        else:
            ring, last = self._last(source)
            regime = ring.spec.regime_after((last + 1 + after) % ring.size)
        return tuple(regime.at(depth) for depth in range(1, k + 1))

    def expected_rounds(self, prompt: Sequence[int], n: int, k: int) -> list[int]:
        """Accepted drafts of every round that a fixed draft length k needs to write n tokens, exactly.

        The first token comes from the prefill. The last round counts what was accepted, also beyond the n-th token.
        """
        ring, last = self._last(prompt)
        rounds, written = [], 1
        while written < n:
            accepted = 0
            while accepted < k and not ring.errs(last + written + accepted, accepted + 1, self.depths):
                accepted += 1
            rounds.append(accepted)
            written += accepted + 1
        return rounds

    def tensors(self, role: str, device: torch.device | str = "cpu") -> NamedTensors:
        source = ScriptWeights(
            self.shape, self.layout, self.rings, self.seed, self.doubt_confidence, torch.device(device)
        )
        return source.target() if role == TARGET else source.drafter()


def _word(token: int) -> str:
    return {BOS: "<s>", EOS: "</s>", DECOY: "<decoy>"}.get(token, f"t{token}")


def write_scripted(
    out: Path | str,
    shape: Shape,
    classes: Sequence[ScriptClass],
    *,
    seed: int = 0,
    doubt_confidence: float = 0.4,
    blur: float = 0.0,
    weights: bool | None = None,
) -> ScriptedPair:
    """Write the pair to a new directory. `weights` None: safetensors up to 1 GiB, above that configs only."""
    path = Path(out)
    size = 2 * shape.parameters()
    if weights is None:
        weights = size <= WRITE_LIMIT_BYTES
    if weights and size > WRITE_LIMIT_BYTES:
        raise ConfigError(f"shape: {size / 2**30:.0f} GiB of weights is too much to write; leave it to the load format")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"out: {path} exists already; name a new directory")
    pair = ScriptedPair(path, shape, tuple(classes), seed, doubt_confidence, blur, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if weights and free < 1.5 * size:
        raise MissingError(f"out: {path.parent} has {free / 2**20:.0f} MiB free, {1.5 * size / 2**20:.0f} are needed")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as partial:
        built = Path(partial) / "pair"
        built.mkdir()
        _write_files(pair, built)
        if path.exists():
            path.rmdir()
        built.rename(path)
    return pair


def _write_files(pair: ScriptedPair, out: Path) -> None:
    for role, layers in ((TARGET, pair.shape.layers), (DRAFTER, 1)):
        (out / role).mkdir()
        _write_json(out / role / "config.json", _llama_config(pair.shape, layers))
        _write_tokenizer(out / role, pair.shape.vocab)
        if pair.weights:
            save_file(dict(pair.tensors(role)), out / role / "model.safetensors", metadata={"format": "pt"})
    with (out / "prompts.jsonl").open("w") as lines:
        for spec in pair.classes:
            for i in range(PROMPTS_PER_CLASS):
                tokens = pair.prompt(spec.name, i)
                record = {"id": f"{spec.name}-{i}", "category": spec.name, "prompt": pair.text(tokens)}
                lines.write(json.dumps(record | {"prompt_token_ids": tokens}) + "\n")
    settings = {name: getattr(pair, name) for name in ("seed", "doubt_confidence", "blur", "weights")}
    manifest = {"shape": asdict(pair.shape), "classes": [asdict(spec) for spec in pair.classes], **settings}
    _write_json(out / MANIFEST, {"schema_version": SCHEMA_VERSION} | manifest)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _llama_config(shape: Shape, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }


def _write_tokenizer(out: Path, vocab: int) -> None:
    """One word per token, so that text prompts and HTTP servers work too."""
    tokenizer = Tokenizer(WordLevel({_word(token): token for token in range(vocab)}, unk_token=_word(BOS)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(out / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    special = {"bos_token": _word(BOS), "eos_token": _word(EOS), "unk_token": _word(BOS), "pad_token": _word(EOS)}
    _write_json(
        out / "tokenizer_config.json",
        special | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "chat_template": template},
    )


def load_scripted(path: Path | str) -> ScriptedPair:
    manifest = Path(path) / MANIFEST
    if not manifest.is_file():
        raise MissingError(f"{manifest} is missing; write the pair with `nwor zoo script --out {path}`")
    try:
        content = json.loads(manifest.read_text())
        version = content.pop("schema_version")
        shape = Shape(**content.pop("shape"))
        classes = tuple(
            ScriptClass(
                spec["name"], tuple(Regime(tuple(regime["accept"]), regime["tokens"]) for regime in spec["regimes"])
            )
            for spec in content.pop("classes")
        )
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{manifest} is damaged ({error}); write the pair again") from None
    if version != SCHEMA_VERSION:
        raise CorruptFileError(f"{manifest} has version {version}, this package reads {SCHEMA_VERSION}; write it again")
    try:
        return ScriptedPair(Path(path), shape, classes, **content)
    except TypeError as error:
        raise CorruptFileError(f"{manifest} is damaged ({error}); write the pair again") from None
