# ruff: noqa: E501
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nwor_vllm.bench import workload
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.errors import ConfigError, MissingError, NworError


def cell(**changes: object) -> Cell:
    engine = Engine(target="t", drafter="d", draft_length=4)
    base = {"requests": 6, "max_tokens": 8, "temperature": 0.0, "draft_length": 4, "batches": 3, "warmup_batches": 2}
    return Cell.model_validate({"engine": engine, **base, **changes})


def test_batches_are_distinct_seeded_and_independent_of_the_warm_up() -> None:
    one, two = workload.build(cell()), workload.build(cell(warmup_batches=5))
    assert one.batches == two.batches == workload.build(cell()).batches
    prompts = [p for batch in (*one.batches, *one.warmup) for p in batch]
    assert len({p.text for p in prompts}) == len({p.id for p in prompts}) == len({p.seed for p in prompts}) == 30
    assert workload.build(cell(seed=43)).batches != one.batches
    assert [len(b) for b in one.batches] == [6, 6, 6]


@pytest.mark.parametrize(
    "name", ["code", "chat", "summary", "retrieval", "translation", "arithmetic", "creative", "json"]
)
def test_every_domain_is_a_workload(name: str) -> None:
    work = workload.build(cell(workload=name))
    assert {p.category for batch in work.batches for p in batch} == {name}


def test_mixed_holds_every_domain_and_random_none() -> None:
    categories = {p.category for batch in workload.build(cell(requests=8)).batches for p in batch}
    assert len(categories) == 8
    assert {p.category for b in workload.build(cell(workload="random")).batches for p in b} == {"random"}


def test_a_small_file_is_repeated_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"prompt {i}"}) for i in range(20)), encoding="utf-8")
    work = workload.build(cell(dataset=str(path), batches=4))
    assert work.repeats
    names = [p.id for b in (*work.batches, *work.warmup) for p in b]
    assert len(set(names)) == len(names) == 36
    assert not workload.build(cell(dataset=str(path))).repeats


def test_jsonl_and_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"prompt": "a", "id": "x"}\n\n{"prompt": "b\\u2028c"}\n', encoding="utf-8")
    assert workload.read_file(path) == [("x", "a", ""), ("d-00001", "b\u2028c", "")]
    turns = [{"from": "gpt", "value": "no"}, {"from": "human", "value": "yes"}]
    path.write_text(json.dumps([{"id": "s", "conversations": turns}]), encoding="utf-8")
    assert workload.read_file(path) == [("s", "yes", "")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a"}\n{"prompt": ', ":2 is not JSON"),
        ('{"prompt": ""}', "expected text"),
        ('{"prompt": 3}', "expected text"),
        ('{"text": "a"}', "neither `prompt`"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', ":2: id '1' occurs twice"),
        ("[1]", "expected an object"),
        ("\n \n", "holds no prompts"),
        ('{"prompt": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_row_is_an_error_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        workload.read_file(path)
    assert says in str(caught.value)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        workload.read_file(tmp_path / "no.jsonl")


VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
ROW = st.one_of(
    VALUE,
    st.fixed_dictionaries({}, optional={
        "prompt": VALUE, "id": VALUE, "category": VALUE,
        "conversations": st.one_of(VALUE, st.lists(st.dictionaries(st.sampled_from(["from", "value"]), VALUE, max_size=2), max_size=2)),
    }),
)  # fmt: skip


@settings(
    max_examples=int(os.environ.get("NWOR_FUZZ", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(ROW, max_size=4), cut=st.integers(0, 80), raw=st.one_of(st.none(), st.binary(max_size=60)))
def test_fuzzed_files_are_an_error_or_prompts(tmp_path: Path, rows: list[object], cut: int, raw: bytes | None) -> None:
    """NWOR_FUZZ=5000 for more of them."""
    path = tmp_path / "d.jsonl"
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(raw if raw is not None else (text[:-cut] if cut else text).encode())
    try:
        found = workload.read_file(path)
    except NworError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    assert all(text.strip() for _, text, _ in found)
