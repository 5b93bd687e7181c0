"""Every model preset against vLLM's own configuration classes, on stand-ins for the models' configurations."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nwor_vllm.bench import jobs, provenance, study
from nwor_vllm.bench.cli import main
from nwor_vllm.errors import ConfigError, MissingError

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / jobs.PRESETS).glob("*.yaml"))
STUDY = ("qwen2_7b", "qwen2_72b", "qwen3_32b", "llama3_8b", "llama3_70b")


def llama(layers: int, hidden: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    common = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 4 * hidden}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    rest = {"num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": 8192, "dtype": "bfloat16"}
    return {**common, **sizes, **rest, **more}


QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
EAGLE3 = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 32000}
DFLASH = {"architectures": ["DFlashDraftModel"], "block_size": 16}
# The shapes of the published models, as far as vLLM's configuration looks at them.
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B-Instruct": llama(28, 3584, 28, 4, 152064, **QWEN2),
    "Qwen/Qwen2-72B-Instruct": llama(80, 8192, 64, 8, 152064, **QWEN2),
    "Qwen/Qwen3-4B": llama(36, 2560, 32, 8, 151936, **QWEN3),
    "Qwen/Qwen3-32B": llama(64, 5120, 64, 8, 151936, **QWEN3),
    "meta-llama/Meta-Llama-3-8B-Instruct": llama(32, 4096, 32, 8, 128256),
    "meta-llama/Meta-Llama-3-70B-Instruct": llama(80, 8192, 64, 8, 128256),
    "meta-llama/Llama-3.1-8B-Instruct": llama(32, 4096, 32, 8, 128256),
    "yuhuili/EAGLE-Qwen2-7B-Instruct": llama(1, 3584, 28, 4, 152064, qkv_bias=True),
    "yuhuili/EAGLE-Qwen2-72B-Instruct": llama(1, 8192, 64, 8, 152064, qkv_bias=True),
    "yuhuili/EAGLE-LLaMA3-Instruct-8B": llama(1, 4096, 32, 8, 128256),
    "yuhuili/EAGLE-LLaMA3-Instruct-70B": llama(1, 8192, 64, 8, 128256),
    "yuhuili/EAGLE-LLaMA3.1-Instruct-8B": llama(1, 4096, 32, 8, 128256),
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": llama(1, 4096, 32, 8, 128256, **EAGLE3),
    "AngelSlim/Qwen3-4B_eagle3": llama(1, 2560, 32, 8, 151936, **EAGLE3),
    "RedHatAI/Qwen3-32B-speculator.eagle3": {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": 32000,
        "norm_before_residual": True, "transformer_layer_config": llama(1, 5120, 64, 8, 151936),
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "Qwen/Qwen3-32B", "architectures": ["Qwen3ForCausalLM"]},
        },
    },
    "z-lab/Qwen3-4B-DFlash-b16": llama(
        5, 2560, 32, 8, 151936, **{**QWEN3, **DFLASH},
        dflash_config={"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    ),
    "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat": llama(
        5, 4096, 32, 8, 128256, **{**QWEN3, **DFLASH},
        dflash_config={"mask_token_id": 128002, "target_layer_ids": [1, 8, 15, 22, 29]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with every model of the presets, at the revisions they name, as far as their configurations."""
    folder = tmp_path_factory.mktemp("hub")
    for preset in PRESETS:
        data = yaml.safe_load(preset.read_text(encoding="utf-8"))
        for section in (data, data.get("speculative_decoding", {})):
            if name := section.get("model"):
                revision = section.get("revision", "0" * 40)
                cache = folder / f"models--{name.replace('/', '--')}"
                for place, text in (
                    ("refs/main", revision),
                    (f"snapshots/{revision}/config.json", json.dumps(CONFIGS[name])),
                ):
                    (cache / place).parent.mkdir(parents=True, exist_ok=True)
                    (cache / place).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "benchmark.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    return path


def load(preset: Path, benchmark: Path, **environ: str) -> Any:
    return study.load(benchmark, preset, None, benchmark.parent / preset.stem, environ)[0].cells[0]


def test_every_model_of_the_specifications_has_its_configurations() -> None:
    names = {path.stem for path in PRESETS}
    for model in (*STUDY, "qwen3_4b", "llama31_8b"):
        assert {f"{model}_baseline", f"{model}_ngram"} <= names
        assert names & {f"{model}_eagle", f"{model}_eagle3"}
    assert {"qwen3_4b_block", "llama31_8b_block"} <= names


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_a_commit_or_says_that_none_could_be_verified(preset: Path, benchmark: Path) -> None:
    data = yaml.safe_load(preset.read_text(encoding="utf-8"))
    for section in (data, data.get("speculative_decoding", {})):
        if "model" in section:
            assert ("revision" in section) != ("unpinned" in section)
            assert re.fullmatch("[0-9a-f]{40}", section.get("revision", "0" * 40))
    kind = preset.stem.rpartition("_")[2]
    cell = load(preset, benchmark)
    assert cell.engine.method == {"baseline": "none", "block": "dflash"}.get(kind, kind)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_vllm_accepts_it(preset: Path, benchmark: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    for cached in (provenance.model_path, provenance.model_fingerprint):
        monkeypatch.setattr(provenance, cached.__name__, cached.__wrapped__)
    engine: Any = importlib.import_module("nwor_vllm.bench.backends.engine")
    arg_utils: Any = importlib.import_module("vllm.engine.arg_utils")
    cell = load(preset, benchmark)
    given = engine.arguments(cell.engine) | {"tensor_parallel_size": 1}  # this machine's ranks are not the preset's
    built = arg_utils.EngineArgs(**given).create_engine_config()
    assert built.model_config.max_model_len == cell.engine.max_model_len
    if cell.engine.method == "none":
        assert built.speculative_config is None
    else:
        assert built.speculative_config.method == cell.engine.method
        assert built.speculative_config.num_speculative_tokens == cell.draft_length


@pytest.mark.parametrize("name", STUDY)
def test_a_group_is_a_model_s_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {path.stem for path in jobs.presets(name)} == {p.stem for p in PRESETS if p.stem.startswith(f"{name}_")}


def test_an_unknown_group_names_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(MissingError, match=r"no presets of 'qwen2'; there are: llama31_8b, .*qwen2_7b"):
        jobs.presets("qwen2")


def sweep(benchmark: Path, *args: str) -> int:
    files = ["--benchmark", str(benchmark), "--output-base", str(benchmark.parent / "results")]
    return main(["sweep", *args, *files, "--dry-run"])


def test_a_model_that_is_not_here_is_one_line_before_an_engine_starts(
    benchmark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(provenance, "model_path", provenance.model_path.__wrapped__)
    for name, value in {"HF_HUB_CACHE": str(benchmark.parent), "TARGET_MODEL": "", "PROFILE": ""}.items():
        monkeypatch.setenv(name, value)
    assert sweep(benchmark, "--group", "qwen2_7b") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for part in (
        "Qwen/Qwen2-7B-Instruct@f2826a00",
        "hf download",
        "--revision f2826a00",
        "TARGET_MODEL",
        "PROFILE=embedded",
    ):
        assert part in err


def test_presets_run_on_the_embedded_pair(
    benchmark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PROFILE", "embedded")
    monkeypatch.delenv("TARGET_MODEL", raising=False)
    assert sweep(benchmark, "--group", "qwen2_7b", "qwen3_32b") == 0
    assert "6 engines to start for 6 runs" in capsys.readouterr().out
    cell = load(ROOT / jobs.PRESETS / "qwen3_32b_eagle3.yaml", benchmark, PROFILE="embedded")
    assert (cell.engine.target, cell.engine.drafter, cell.engine.tensor_parallel_size) == (
        "zoo:target",
        "zoo:eagle3",
        1,
    )
    with pytest.raises(ConfigError, match="has no dflash drafter"):
        load(ROOT / jobs.PRESETS / "qwen3_4b_block.yaml", benchmark, PROFILE="embedded")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["x.yaml", "--group", "qwen2_7b"], "name GRID.yaml files, or --configs"),
        ([], "name GRID.yaml files, or --configs"),
        (["--configs", "a.yaml", "b/a.yaml"], "two configurations are named a"),
        (["--group", "qwen2_7b", "--seeds", "2"], "--seeds belongs to a grid"),
    ],
)
def test_wrong_flags_are_one_line(
    args: list[str], says: str, benchmark: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert sweep(benchmark, *args) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
