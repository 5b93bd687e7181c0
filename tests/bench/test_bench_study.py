from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from nwor_vllm.bench import arms, plan, record, study
from nwor_vllm.bench.cli import main
from nwor_vllm.bench.measure import run_group
from nwor_vllm.errors import ConfigError

CONFIG = {
    "generation": {"max_tokens": 32, "temperature": 0.7, "top_p": 1.0},
    "engine": {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9},
}


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "benchmark.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "id": f"e{i}"}) for i in range(5)), encoding="utf-8")
    return path


def config(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}), encoding="utf-8")
    return path


def test_a_study_configuration_is_read_as_it_is(benchmark: Path, tmp_path: Path) -> None:
    grid, out = study.load(benchmark, config(tmp_path, model="org/model"), None, tmp_path / "results" / "one")
    (cell,) = grid.cells
    assert out == tmp_path / "results"
    assert (cell.file, cell.arm, cell.requests, cell.max_tokens, cell.temperature) == (
        "one.json",
        "vanilla",
        5,
        32,
        0.7,
    )
    assert (cell.engine.target, cell.engine.method, cell.engine.tensor_parallel_size) == ("org/model", "none", 1)
    speculative = config(tmp_path, speculative_decoding={"method": "ngram", "num_speculative_tokens": 4})
    (cell,) = study.load(benchmark, speculative, "other", tmp_path / "two")[0].cells
    assert (cell.engine.target, cell.engine.method, cell.draft_length, cell.arm) == ("other", "ngram", 4, "fixed")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"genration": {}}, "did you mean 'generation'"),
        ({"engine": {"tensor_parallel": 2}}, "did you mean 'engine.tensor_parallel_size'"),
        ({"engine": 3}, "expected names and settings"),
        ({"generation": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"model": 3}, "model is 3; expected text"),
    ],
)
def test_unknown_and_impossible_settings_are_errors(
    benchmark: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study.load(benchmark, config(tmp_path, **{"model": "m", **changes}), None, tmp_path / "one")
    assert says in str(caught.value)


def test_its_three_files_are_in_the_output_folder(scripted: ModuleType, benchmark: Path, tmp_path: Path) -> None:
    target = scripted.models(tmp_path / "models")["target"]
    grid, out = study.load(benchmark, config(tmp_path), target, tmp_path / "results" / "one")
    assert run_group(plan.examine_all(grid, out), scripted.session(scripted.Scripted({}))) == []
    folder = tmp_path / "results" / "one"
    csv = {"requests.csv", "per_round.csv", "summary.csv"}
    assert {p.name for p in folder.iterdir()} == {"metrics.json", "responses.jsonl", "config.yaml"} | csv
    assert len(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["per_request"]) == 5
    assert [json.loads(x)["id"] for x in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()] != []
    assert record.read(tmp_path / "results" / "one.json").status == "done"


def test_flags_win_over_the_configuration_and_gammas_are_measured_each(benchmark: Path, tmp_path: Path) -> None:
    drafting = config(tmp_path, model="m", speculative_decoding={"method": "ngram", "num_speculative_tokens": 4})
    flags = {"request_rate": 2.0, "slo": {"ttft": 100.0}, "batches": 3}
    (cell,) = study.load(benchmark, drafting, None, tmp_path / "one", None, flags, ["8", "1", "3"])[0].cells
    assert (cell.request_rate, cell.slo, cell.batches) == (2.0, {"ttft": 100.0}, 3)
    assert (cell.engine.ladder, cell.draft_length, cell.arm) == ((0, 1, 3, 8), 8, "fixed")
    assert [arm.draft_length for arm in arms.of_panel([cell])] == [8, 0, 1, 3]


@pytest.mark.parametrize("gammas", [["0", "1"], ["3", "3"], ["x"], ["65"], ["-1"], ["2.5"]])
def test_gammas_are_draft_lengths(benchmark: Path, tmp_path: Path, gammas: list[str]) -> None:
    drafting = config(tmp_path, model="m", speculative_decoding={"method": "ngram"})
    with pytest.raises(ConfigError, match="expected different draft lengths"):
        study.load(benchmark, drafting, None, tmp_path / "one", None, None, gammas)


def test_what_an_engine_cannot_do_is_not_asked_of_it(benchmark: Path, tmp_path: Path) -> None:
    drafting = config(tmp_path, model="m", speculative_decoding={"method": "dflash", "model": "d"})
    (cell,) = study.load(benchmark, drafting, None, tmp_path / "one")[0].cells
    assert (cell.arm, cell.references) == ("fixed", ())
    with pytest.raises(ConfigError, match="dflash drafts every position in one pass, so it has no references vanilla"):
        study.load(benchmark, drafting, None, tmp_path / "one", None, {"references": ("vanilla",)})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "name a GRID.yaml, or --benchmark"),
        (["g.yaml", "--benchmark", "b.jsonl"], "name a GRID.yaml, or --benchmark"),
        (["--benchmark", "b.jsonl"], "needs --output-dir"),
        (["--benchmark", "b.jsonl", "--output-dir", "d"], "which model?"),
        (["--benchmark", "b.jsonl", "--output-dir", "d", "--model", "m"], "b.jsonl does not exist"),
        (
            ["--benchmark", "b.jsonl", "--output-dir", "d", "--target", "m"],
            "--target belongs to a grid; with --benchmark",
        ),
        (["--benchmark", "b.jsonl", "--output-dir", "d", "--model", "m", "--gamma", "3"], "--gamma needs a drafter"),
        (["g.yaml", "--gamma", "3"], "--gamma belongs to --benchmark"),
    ],
)
def test_wrong_flags_are_one_line(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *args]) in (1, 2)
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
