from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nwor_vllm.bench import record
from nwor_vllm.errors import CorruptFileError

FROZEN = [
    "latency_avg_s", "latency_p50_s", "spec_num_draft_tokens", "spec_acceptance_ratio", "tokens_stopped_by_confidence",
    "throughput_tok_s", "draft_forwards", "k_histogram", "target_kv_bytes_written",
]  # fmt: skip


@pytest.fixture
def path(finished: Path) -> Path:
    return finished / "sweeps/early_exit_grid/run3_r36_t128_temp0.0_thresh0.5.json"


@pytest.fixture
def data(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def test_committed_schema_is_the_models(data: dict[str, Any]) -> None:
    committed = record.SCHEMA_FILE.read_text(encoding="utf-8")
    assert committed == record.schema_text(), "run: python -m nwor_vllm.bench.record"
    jsonschema.validate(data, json.loads(committed))


def jq(program: str, path: Path) -> str:
    done = subprocess.run(["jq", "-r", program, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_frozen_paths_answer_in_jq(path: Path) -> None:
    for name in FROZEN:
        assert jq(f".summary.per_mode[0].{name}", path) != "null", name
    assert jq('.summary.per_mode[0].ncu_metrics."dram__bytes_write.sum"', path) == "null"
    assert jq(".summary.per_mode[0].ncu.status", path) == "unavailable"
    assert jq(".summary.per_mode[0].reasons.ncu_metrics", path) == "no NVIDIA GPU on this machine"
    assert jq(".summary.per_mode[0].mode", path) == "early_exit"
    assert float(jq(".summary.per_mode[0].ncu.analytic_bytes", path)) > 0


def test_ncu_paths_answer_where_it_ran(path: Path, data: dict[str, Any], tmp_path: Path) -> None:
    mode = data["summary"]["per_mode"][0]
    mode["ncu_metrics"] = {
        "dram__bytes_write.sum": 123456.0,
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": 41.5,
    }
    del mode["reasons"]["ncu_metrics"]
    written = tmp_path / "x.json"
    record.write(record.parse(json.dumps(data), "x"), written)
    assert jq('.summary.per_mode[0].ncu_metrics."dram__bytes_write.sum"', written) == "123456"
    pct = '.summary.per_mode[0].ncu_metrics."dram__throughput.avg.pct_of_peak_sustained_elapsed"'
    assert jq(pct, written) == "41.5"


def test_reading_what_was_written_changes_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert record.to_json(record.parse(text, "x")) == text


def edit(data: dict[str, Any], where: str, value: Any) -> str:
    node: Any = data
    *parents, last = where.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    node[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("summary.per_mode.0.latency_avg_s", math.nan, "not JSON"),
        ("summary.per_mode.0.latency_avg_s", math.inf, "not JSON"),
        ("summary.per_mode.0.latency_avg_s", 0, "greater than 0"),
        ("summary.per_mode.0.spec_num_draft_tokens", None, "null without a reason"),
        ("summary.per_mode.0.reasons.latency_avg_s", "x", "which is not null"),
        ("summary.per_mode.0.spec_acceptance_ratio", 1.5, "less than or equal to 1"),
        ("summary.per_mode.0.mode", "fixed", "expected the subject"),
        ("summary", None, "without a reason"),
        ("schema_version", 2, "schema_version 2"),
        ("schema_version", True, "schema_version True"),
        ("surprise", 1, "unknown setting 'surprise'"),
        ("status", "failed", "needs a failure"),
    ],
)
def test_what_a_record_cannot_say(data: dict[str, Any], where: str, value: Any, says: str) -> None:
    with pytest.raises(CorruptFileError) as caught:
        record.parse(edit(data, where, value), "x.json")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nan_cannot_be_written(path: Path) -> None:
    good = record.read(path)
    assert good.summary is not None
    bad = good.model_copy(update={"seconds": math.nan})
    with pytest.raises(ValueError, match="Out of range float"):
        record.write(bad, path.with_name("never.json"))
    assert not path.with_name("never.json").exists()
    assert not path.with_name("never.json.partial").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_of_a_record_can_be_nan(data: dict[str, Any], path: Path, tmp_path: Path, value: float) -> None:
    """At the one writing place, wherever it sits: the models refuse it in fields, the writer in free-form parts."""

    def spots(node: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for key, inner in node.items() if isinstance(node, dict) else list(enumerate(node))[:1]:
            if isinstance(inner, dict | list):
                yield from spots(inner, (*where, key))
            elif isinstance(inner, int | float) and not isinstance(inner, bool):
                yield (*where, key)

    places = list(spots(data))
    assert len(places) > 60
    for *parents, last in places:
        node: Any = data
        for part in parents:
            node = node[part]
        kept, node[last] = node[last], value
        with pytest.raises(ValueError):
            record.write(record.Record.model_validate(data), tmp_path / "never.json")
        node[last] = kept
    free = record.read(path).model_copy(update={"provenance": {"deep": [{"x": value}]}})
    with pytest.raises(ValueError, match="Out of range float"):
        record.write(free, tmp_path / "never.json")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_half_a_record(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.json"
    record.write(record.read(path), target)
    before = target.stat().st_ino
    record.write(record.read(path), target)
    assert target.stat().st_ino != before  # replaced whole, not rewritten in place
    assert os.listdir(target.parent) == ["x.json"]


def test_jq_is_the_version_the_scripts_are_written_for() -> None:
    assert shutil.which("jq") is not None
    version = subprocess.run(["jq", "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith(("jq-1.6", "jq-1.7", "jq-1.8"))


def names_of(schema: dict[str, Any], skip: set[str]) -> set[str]:
    models = {name: model for name, model in schema["$defs"].items() if name not in skip}
    return {field for model in (schema, *models.values()) for field in model.get("properties", {})}


def test_every_field_and_every_key_is_documented() -> None:
    """The record's in docs/records.md, the settings of a run in docs/experiments.md."""
    schema = json.loads(record.SCHEMA_FILE.read_text(encoding="utf-8"))
    docs = Path(__file__).resolve().parents[2] / "docs"
    words = set(re.findall(r"\w+", (docs / "records.md").read_text(encoding="utf-8")))
    assert names_of(schema, {"Cell", "Engine"}) - words == set()
    words = set(re.findall(r"\w+", (docs / "experiments.md").read_text(encoding="utf-8")))
    settings = {field for name in ("Cell", "Engine") for field in schema["$defs"][name]["properties"]}
    assert settings - {"engine", "grid", "id", "file"} - words == set()
