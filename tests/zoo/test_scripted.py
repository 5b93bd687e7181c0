"""Writing and reading scripted pairs; the target through stock transformers."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError
from nwor_vllm.zoo import script_cli
from nwor_vllm.zoo.script_marks import parse_class
from nwor_vllm.zoo.script_shape import NAMED, Shape, layout_for, shape_like
from nwor_vllm.zoo.script_weights import rival_logits
from nwor_vllm.zoo.scripted import ScriptedPair, load_scripted, write_scripted

TINY = Shape(hidden=192, layers=2, heads=6, kv_heads=2, ffn=256, vocab=512)
CLASSES = (parse_class("a=0.9,0.5"), parse_class("b=0.3@20/0.8@30"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ScriptedPair:
    return write_scripted(tmp_path_factory.mktemp("scripted") / "pair", TINY, CLASSES, seed=5, blur=0.1)


def test_what_is_written_is_read_back(pair: ScriptedPair) -> None:
    assert load_scripted(pair.path) == pair
    lines = [json.loads(line) for line in (pair.path / "prompts.jsonl").read_text().splitlines()]
    assert {line["category"] for line in lines} == {"a", "b"}
    assert lines[70]["prompt_token_ids"] == pair.prompt("b", 6)


def test_the_files_hold_what_the_load_format_fills_in(pair: ScriptedPair) -> None:
    for role in ("target", "drafter"):
        written = load_file(pair.path / role / "model.safetensors")
        filled = dict(load_scripted(pair.path).tensors(role))
        assert written.keys() == filled.keys()
        assert all(torch.equal(written[name], filled[name]) for name in written)


def test_every_matrix_of_the_target_is_dense(pair: ScriptedPair) -> None:
    layers = {name: tensor for name, tensor in pair.tensors("target") if "_proj" in name}
    assert len(layers) == 7 * TINY.layers
    for name, tensor in layers.items():
        assert (tensor != 0).float().mean() > 0.9, name


def test_stock_transformers_writes_the_expected_text(pair: ScriptedPair) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.bfloat16)
    for name in ("a", "b"):
        prompt = pair.prompt(name, 2)
        assert tokenizer(pair.text(prompt), add_special_tokens=False)["input_ids"] == prompt
        output = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert output == pair.expected_output(prompt, 40)
        assert pair.text(output) == tokenizer.decode(output)


def test_codes_of_a_whole_vocabulary_stay_apart(pair: ScriptedPair) -> None:
    """Every token of a ring against every other: the peak is the successor's, well clear of the runner-up."""
    tensors = dict(pair.tensors("target"))
    logits = tensors["model.embed_tokens.weight"].float() @ tensors["lm_head.weight"].float().T
    for ring in pair.rings:
        rows = logits[ring.start : ring.start + ring.size]
        best = rows.topk(2)
        successors = [pair.expected_output([token], 1)[0] for token in range(ring.start, ring.start + ring.size)]
        assert best.indices[:, 0].tolist() == successors
        assert (best.values[:, 0] - best.values[:, 1]).min() > 4


@pytest.mark.parametrize("confidence", [0.1, 0.4, 0.9])
def test_rivals_bring_the_probability_to_what_was_asked(confidence: float) -> None:
    right, wrong = rival_logits(confidence)
    levels = torch.tensor([0.0] + [right] * 32), torch.tensor([4.0, 0.0] + [wrong] * 32)
    for level in levels:
        assert level.softmax(0).max().item() == pytest.approx(confidence, abs=1e-3)
        assert level.argmax() == 0


def test_large_shapes_leave_their_weights_to_the_load_format(tmp_path: Path) -> None:
    large = write_scripted(tmp_path / "large", NAMED["llama-3.1-8b"], CLASSES)
    assert not large.weights
    assert not list(large.path.rglob("*.safetensors"))
    assert load_scripted(large.path) == large
    with pytest.raises(ConfigError, match="too much to write"):
        write_scripted(tmp_path / "again", NAMED["llama-3.1-8b"], CLASSES, weights=True)


def test_named_shapes_and_changes() -> None:
    assert shape_like("llama-3.1-8b", {}).parameters() == pytest.approx(8.03e9, rel=0.01)
    assert shape_like("embedded", {"vocab": 9000, "hidden": None}) == replace(NAMED["embedded"], vocab=9000)
    assert shape_like("llama-3.1-8b", {"heads": 64}).head_dim == 64
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3.1-8b'"):
        shape_like("llama-3.1-8", {})
    with pytest.raises(ConfigError, match=r"give layers, heads"):
        shape_like(None, {"hidden": 256, "ffn": 512})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": 96}, "hidden 96 is too small for a robust code of vocab 512 .* use at least"),
        ({"kv_heads": 4}, "heads 6 must be a multiple of kv_heads 4"),
        ({"hidden": 200, "head_dim": 0}, "hidden 200 must be a multiple of heads 6"),
        ({"ffn": 3}, "ffn 3 is too small"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"vocab": 100}, "vocab 100 is too small"),
    ],
)
def test_shapes_that_cannot_be_scripted_leave_nothing_behind(
    tmp_path: Path, changes: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        write_scripted(tmp_path / "pair", replace(TINY, **changes), CLASSES)
    assert not list(tmp_path.iterdir())


def test_the_width_that_is_asked_for_is_enough() -> None:
    with pytest.raises(ConfigError) as refusal:
        layout_for(replace(TINY, hidden=96), 3)
    least = int(str(refusal.value).split()[-1])
    assert layout_for(replace(TINY, hidden=least, head_dim=32), 3).code > 0


def test_bad_requests(tmp_path: Path, pair: ScriptedPair) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        write_scripted(pair.path, TINY, CLASSES)
    for setting, value in (("blur", 1.5), ("doubt_confidence", 0.95), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"{setting}: {value} is outside"):
            write_scripted(tmp_path / "pair", TINY, CLASSES, **{setting: value})
    with pytest.raises(ConfigError, match="unknown class 'c'; valid: a, b"):
        pair.prompt("c", 0)
    with pytest.raises(ConfigError, match="belongs to no class"):
        pair.expected_output([1], 4)
    with pytest.raises(MissingError, match=r"script\.json is missing"):
        load_scripted(tmp_path)
    (tmp_path / "script.json").write_text("{")
    with pytest.raises(CorruptFileError, match="damaged"):
        load_scripted(tmp_path)
    (tmp_path / "script.json").write_text(
        (pair.path / "script.json").read_text().replace('"schema_version": 1', '"schema_version": 9')
    )
    with pytest.raises(CorruptFileError, match="version 9"):
        load_scripted(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    script_cli.configure(parser)
    line = (
        f"--like embedded --layers 1 --accept a=0.9,0.5 --accept 0.3 --config-only --seed 3 --out {tmp_path / 'pair'}"
    )
    assert script_cli.run(parser.parse_args(line.split())) == 0
    said = capsys.readouterr().out
    assert "class     a: 0.9,0.5;" in said
    assert "--load-format scripted" in said
    written = load_scripted(tmp_path / "pair")
    assert (written.shape.layers, written.seed, written.weights) == (1, 3, False)
    assert [spec.name for spec in written.classes] == ["a", "class1"]
