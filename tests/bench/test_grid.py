# ruff: noqa: E501
from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nwor_vllm.bench import grid
from nwor_vllm.errors import ConfigError, MissingError, NworError

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"target": "t", "drafter": "d"}
ADAPTIVE = [
    (1, 12, 64, 0.0, 10), (2, 12, 64, 0.7, 10), (3, 36, 128, 0.0, 10), (4, 36, 128, 0.7, 10),
    (5, 60, 64, 0.0, 10), (6, 36, 256, 0.0, 10), (7, 36, 128, 0.0, 5), (8, 36, 128, 0.0, 15),
]  # fmt: skip
EARLY = [(1, 128, 0.0, 0.0), (2, 128, 0.0, 0.3), (3, 128, 0.0, 0.5), (4, 128, 0.0, 0.7), (5, 128, 0.7, 0.0),
         (6, 128, 0.7, 0.5), (7, 256, 0.0, 0.5)]  # fmt: skip


def load(name: str, profile: str = "full", **overrides: object) -> grid.Grid:
    return grid.load(ROOT / "sweeps_config" / f"{name}.yaml", profile, {**MODELS, **overrides})


def test_the_27_runs_have_exactly_these_names() -> None:
    expected = {f"run{n}_r{r}_t{t}_temp{x}_d{k}_adaptive{a}.json" for n, r, t, x, k in ADAPTIVE for a in (0, 1)}
    assert {c.file for c in load("adaptive_grid").cells} == expected
    expected = {f"run{n}_r36_t{t}_temp{x}_thresh{h}.json" for n, t, x, h in EARLY}
    assert {c.file for c in load("early_exit_grid").cells} == expected
    names = ("a_code_completion", "b_chatbot", "c_high_throughput", "d_creative_writing")
    assert [c.file for c in load("oneoff_scenarios").cells] == [f"scenario_{n}.json" for n in names]


def test_settings_are_the_specification_s() -> None:
    cells = {c.id: c for name in ("adaptive_grid", "early_exit_grid", "oneoff_scenarios") for c in load(name).cells}
    assert len(cells) == 27
    assert {i for i, c in cells.items() if c.ncu} == {c.id for c in load("early_exit_grid").cells} | {
        "scenario_c_high_throughput"
    }
    for cell in cells.values():
        assert (cell.top_p, cell.warmup_batches, cell.seed, cell.engine.max_model_len) == (0.9, 2, 42, 4096)
        assert cell.batches == (5 if cell.ncu else 10)
    assert {i for i, c in cells.items() if c.headline} == {
        "run3_r36_t128_temp0.0_d10_adaptive0", "run3_r36_t128_temp0.0_d10_adaptive1",
        "run1_r36_t128_temp0.0_thresh0.0", "run3_r36_t128_temp0.0_thresh0.5", "scenario_b_chatbot",
    }  # fmt: skip
    assert cells["scenario_c_high_throughput"].arm == "both"
    assert cells["scenario_b_chatbot"].temperature == 0.3


def test_27_runs_need_at_most_six_engines() -> None:
    groups = [{c.engine.group for c in load(name, "embedded").cells} for name in
              ("adaptive_grid", "early_exit_grid", "oneoff_scenarios")]  # fmt: skip
    assert sum(map(len, groups)) <= 6


def test_adaptive_twins_share_a_panel_and_different_workloads_do_not() -> None:
    cells = load("adaptive_grid").cells
    panels: dict[str, list[str]] = {}
    for cell in cells:
        panels.setdefault(cell.panel, []).append(cell.file)
    assert len(panels) == 8
    assert all(len(files) == 2 and files[0].replace("adaptive0", "adaptive1") == files[1] for files in panels.values())


def test_overrides_win_over_profile_over_file() -> None:
    assert load("adaptive_grid", "full").cells[0].batches == 10
    assert load("adaptive_grid", "quick").cells[0].batches == 5
    assert load("adaptive_grid", "quick", batches=7).cells[0].batches == 7


def test_seeds_are_real_and_have_names_of_their_own() -> None:
    path = ROOT / "sweeps_config" / "oneoff_scenarios.yaml"
    cells = grid.load(path, "full", MODELS, seeds=3).cells
    assert len({c.file for c in cells}) == 12
    assert [c.seed for c in cells if "b_chatbot" in c.id] == [42, 43, 44]
    assert [c.file for c in cells][:4] == [c.file for c in grid.load(path, "full", MODELS).cells]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\nfile: a.json\nrunz: []", "did you mean 'runs'"),
        ("name: x\nfile: a.json\ncommon: {reqests: 3}", "did you mean 'requests'"),
        ("name: x\nfile: a.json\nprofiles: {ful: {}}", "did you mean 'full'"),
        ("name: x\nfile: a{nope}.json\ncommon: {requests: 1, max_tokens: 1, temperature: 0, draft_length: 1, batches: 1}",
         "'nope'"),
        ("name: x\nfile: ../a.json\ncommon: {requests: 1, max_tokens: 1, temperature: 0, draft_length: 1, batches: 1}",
         "expected letters"),
        ("name: x\nfile: a.json\naxes: {seed: [1, 2]}\n"
         "common: {requests: 1, max_tokens: 1, temperature: 0, draft_length: 1, batches: 1}", "two cells are named a.json"),
        ("name: x\nfile: a.json\ncommon: {requests: 0, max_tokens: 1, temperature: 0, draft_length: 1, batches: 1}",
         "requests is 0"),
        ("name: x\nfile: a.json\ncommon: {requests: 1, max_tokens: 1, temperature: .nan, draft_length: 1, batches: 1}",
         "temperature is nan"),
        ("a: [1", "is not YAML"),
        ("- 1", "holds list"),
        ("", "holds NoneType"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_one_line_that_names_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        grid.load(path, "full", MODELS)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_grid_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"g\.yaml does not exist"):
        grid.load(tmp_path / "g.yaml", "full", MODELS)


KEYS = st.sampled_from([*grid.CELL_FIELDS, *grid.ENGINE_FIELDS, "run", "name", "x"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=5),
                   st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))  # fmt: skip
VALID = {"requests": 2, "max_tokens": 3, "temperature": 0.0, "draft_length": 4, "batches": 1}
TREES = st.one_of(
    st.fixed_dictionaries(
        {
            "name": st.just("g"),
            "file": st.sampled_from(["a.json", "r{run}.json", "{requests}_{seed}.json", "{", "{0}.json"]),
        },
        optional={
            "common": st.one_of(
                st.just(VALID), st.dictionaries(KEYS, VALUES, max_size=4).map(lambda d: {**VALID, **d})
            ),
            "axes": st.dictionaries(KEYS, st.one_of(VALUES, st.lists(VALUES, max_size=3)), max_size=2),
            "runs": st.one_of(
                VALUES, st.lists(st.one_of(VALUES, st.dictionaries(KEYS, VALUES, max_size=3)), max_size=3)
            ),
            "profiles": st.one_of(VALUES, st.dictionaries(st.sampled_from(grid.PROFILES), VALUES, max_size=2)),
        },
    ),
    VALUES,
)


REAL = [path.read_bytes() for path in sorted((ROOT / "sweeps_config").rglob("*.yaml"))]
SPLICED = st.builds(
    lambda raw, at, cut, junk: raw[: at % len(raw)] + junk + raw[at % len(raw) + cut :],
    st.sampled_from(REAL),
    st.integers(0, 10**6),
    st.integers(0, 30),
    st.one_of(
        st.binary(max_size=6),
        st.sampled_from([b"\n", b": ", b"- ", b"&a ", b"*a", b"[", b"{", b"!!", b".inf", b"1e999"]),
    ),
)


@settings(
    max_examples=int(os.environ.get("NWOR_FUZZ", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    raw=st.one_of(
        TREES.map(lambda tree: yaml.safe_dump(tree).encode("utf-8", "surrogatepass")), SPLICED, st.binary(max_size=40)
    )
)
def test_fuzzed_grids_are_an_error_or_a_grid(tmp_path: Path, raw: bytes) -> None:
    """NWOR_FUZZ=5000 for more of them."""
    path = tmp_path / "g.yaml"
    path.write_bytes(raw)
    try:
        loaded = grid.load(path, "quick", MODELS)
    except NworError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    assert loaded.cells
    assert len({c.file for c in loaded.cells}) == len(loaded.cells)
    assert all(c.engine.group and c.panel for c in loaded.cells)
