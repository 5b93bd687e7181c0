from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench import compare, finish, record
from nwor_vllm.bench.cli import main
from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError

ROOT = Path(__file__).resolve().parents[2]
GRID = """
name: quick_grid
file: "{name}_adaptive{adaptive}.json"
common: {requests: 4, max_tokens: 8, temperature: 0.0, draft_length: 4, batches: 10, warmup_batches: 0}
axes: {adaptive: [false, true]}
runs: [{name: x}]
"""


def measured(scripted: ModuleType, tmp_path: Path, factors: dict[str, float], seed: int) -> compare.Comparison:
    path = tmp_path / "g.yaml"
    path.write_text(GRID, encoding="utf-8")
    out = tmp_path / f"out{seed}"
    assert scripted.run_grid(path, out, scripted.Scripted(factors, noise=0.02, seed=seed)) == []
    (row,) = compare.compare_records(compare.adaptive_pairs(out), "latency")
    return row


def test_equal_arms_raise_at_most_three_alarms_in_twenty(scripted: ModuleType, tmp_path: Path) -> None:
    rows = [measured(scripted, tmp_path, {}, seed) for seed in range(20)]
    assert sum(row.verdict in ("faster", "slower") for row in rows) <= 3


def test_a_planted_slowdown_of_five_percent_is_found(scripted: ModuleType, tmp_path: Path) -> None:
    row = measured(scripted, tmp_path, {"goodput": 1.05}, 1)
    assert row.n == 10
    assert row.verdict == "slower"
    assert row.ratio == pytest.approx(1.05, abs=0.03)
    assert measured(scripted, tmp_path, {"goodput": 0.95}, 2).verdict == "faster"


def test_a_folder_s_adaptive_pairs(finished: Path) -> None:
    rows = compare.compare_records(compare.adaptive_pairs(finished / "sweeps/adaptive_grid"), "latency")
    again = [row for row in rows if row.aa]
    rows = [row for row in rows if not row.aa]
    assert (len(rows), len(again)) == (8, 2)  # the headline pair has A/A arms
    assert all(row.a == row.b and 0.9 < row.ratio < 1.1 and row.p_holm == row.p for row in again)
    assert all(0.6 < row.ratio < 1.0 and row.outputs == "identical" for row in rows)
    assert all(row.p_holm is not None and row.p is not None and row.p_holm >= row.p for row in rows)


def test_a_control_that_shows_a_difference_says_what_that_means(finished: Path, tmp_path: Path) -> None:
    path = finished / "sweeps/oneoff_scenarios/scenario_b_chatbot.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    subject, again = (
        next(m for m in good["summary"]["per_mode"] if m["mode"] == name) for name in ("adaptive", "repeat")
    )
    for factor, alarms in ((1.5, True), (1.0, False)):
        for number, (batch, twin) in enumerate(zip(again["batches"], subject["batches"], strict=True)):
            batch["seconds"] = twin["seconds"] * factor * (1.01 if number % 2 else 1 / 1.01)
        written = tmp_path / path.name
        record.write(record.parse(json.dumps(good), "x"), written)
        row = compare.control(written, record.read(written), "latency")
        assert row is not None
        assert (row.aa, row.verdict == "faster") == (True, alarms)
        assert compare.sentence(row).endswith("trust no difference of this size beside it") is alarms


def test_outputs_of_a_panel_s_arms_are_judged_once(finished: Path) -> None:
    folder = finished / "sweeps/adaptive_grid"
    a, b = (record.read(folder / f"run1_r12_t64_temp0.0_d10_adaptive{i}.json") for i in (0, 1))
    ratio = next(ratio for ratio in b.comparisons if ratio.against == "fixed")
    others = [ratio.model_copy(update={"outputs": "near tie: 1 of 72 differ"})] + [
        other for other in b.comparisons if other.against != "fixed"
    ]
    b = b.model_copy(update={"comparisons": others, "started_at": a.started_at})
    assert compare.judged(a, b) == "near tie: 1 of 72 differ"
    assert compare.judged(a, b.model_copy(update={"panel": "another"})) is None


def test_folders_pair_by_settings(finished: Path) -> None:
    folder = finished / "sweeps/oneoff_scenarios"
    rows = compare.compare_records(compare.find_pairs(folder, folder), "latency")
    assert [row.ratio for row in rows if not row.aa] == [1.0] * 4
    with pytest.raises(ConfigError, match="share no finished run"):
        compare.find_pairs(folder, finished / "sweeps/early_exit_grid")


def test_other_prompts_are_no_pair(finished: Path) -> None:
    sweeps = finished / "sweeps/oneoff_scenarios"
    with pytest.raises(ConfigError, match="share no batch of the same prompts"):
        compare.compare_records(
            [(sweeps / "scenario_a_code_completion.json", sweeps / "scenario_b_chatbot.json")], "latency"
        )


def test_missing_and_damaged_files_are_one_line(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingError):
        compare.find_pairs(tmp_path / "a.json", tmp_path / "b.json")
    (tmp_path / "a.json").write_text("", encoding="utf-8")
    with pytest.raises(CorruptFileError, match="is empty"):
        compare.compare_records([(tmp_path / "a.json", tmp_path / "a.json")], "latency")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_outputs_that_differ_are_named(finished: Path) -> None:
    mode = compare.subject(record.read(finished / "sweeps/oneoff_scenarios/scenario_b_chatbot.json"), "x")
    name = sorted(mode.outputs_sha256)[3]
    other = mode.model_copy(update={"outputs_sha256": {**mode.outputs_sha256, name: "0"}})
    assert compare.outputs_verdict(mode, mode, 0.0) == "identical"
    assert compare.outputs_verdict(mode, other, 0.0) == f"1 of {len(mode.outputs_sha256)} differ, first {name}"


def test_a_failed_run_leaves_only_its_own_pair_out(
    scripted: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(GRID.replace("[{name: x}]", "[{name: x}, {name: y, max_tokens: 9}]"), encoding="utf-8")
    driver = scripted.Scripted({})
    driver.fail_on = "y_"
    assert len(scripted.run_grid(path, tmp_path / "out", driver)) == 2
    assert main(["compare", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == said.err.count("\n") == 1
    assert "left out" in said.err


def test_lost_tokens_are_flagged_at_temperature_0(finished: Path) -> None:
    found = record.read(finished / "sweeps/oneoff_scenarios/scenario_a_code_completion.json")
    assert finish.differing(found.comparisons) == []
    bad = found.comparisons[0].model_copy(update={"verdict": "violation", "outputs": "violation: 1 of 72 differ"})
    assert "1 of 72 differ" in finish.differing([bad])[0]
    assert finish.differing([bad.model_copy(update={"verdict": "sampled"})]) == []


def test_command_speaks_to_people_and_tools(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(finished / "sweeps/adaptive_grid")
    assert main(["compare", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("A/A ") for line in lines] == [False] * 8 + [True] * 2
    assert main(["compare", folder, "--json", "--metric", "throughput"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["ratio"] > 1 for row in rows if not row["aa"])


def spec_blocks() -> list[str]:
    """The two loops as the specification prints them."""
    # ruff: noqa: E501
    latency = r"""
# Compare adaptive off vs on
for f in sweeps/adaptive_grid/run*_adaptive0.json; do
    base=$(basename "$f" _adaptive0.json)
    lat0=$(jq -r '.summary.per_mode[0].latency_avg_s' "$f")
    lat1=$(jq -r '.summary.per_mode[0].latency_avg_s' "${f/_adaptive0/_adaptive1}")
    improvement=$(echo "scale=2; ($lat0 - $lat1) / $lat0 * 100" | bc)
    echo "$base: $improvement% improvement"
done
"""
    bandwidth = r"""
# Compare threshold 0.0 vs 0.5
baseline=$(jq -r '.summary.per_mode[0].ncu_metrics."dram__bytes_write.sum"' sweeps/early_exit_grid/run1_r36_t128_temp0.0_thresh0.0.json)
threshold=$(jq -r '.summary.per_mode[0].ncu_metrics."dram__bytes_write.sum"' sweeps/early_exit_grid/run3_r36_t128_temp0.0_thresh0.5.json)
echo "Baseline: $baseline bytes"
echo "Threshold 0.5: $threshold bytes"
"""
    return [latency, bandwidth]


def test_the_specification_s_loops_run_verbatim(finished: Path) -> None:
    latency, bandwidth = (
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=finished, capture_output=True, text=True, check=True
        )
        for block in spec_blocks()
    )
    assert latency.stderr == bandwidth.stderr == ""
    lines = latency.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        name, percent = line.removesuffix("% improvement").split(": ")
        assert name.startswith("run")
        assert 0 < float(percent) < 50
    assert bandwidth.stdout == "Baseline: null bytes\nThreshold 0.5: null bytes\n"
