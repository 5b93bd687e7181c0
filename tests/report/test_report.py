"""The report over the three grids, done by the scripted engine with effects that are known."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from nwor_vllm.bench import record
from nwor_vllm.bench.cli import main
from nwor_vllm.errors import MissingError
from nwor_vllm.report import findings, plot

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweeps(finished: Path) -> Path:
    return finished / "sweeps"


class Checked(html.parser.HTMLParser):
    """Tags that close in order, and nothing that leaves the page."""

    VOID = ("meta", "line", "circle", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href", "onclick"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_every_run_stands_beside_its_baselines(sweeps: Path) -> None:
    found = findings.gather([sweeps])
    assert {name: len(runs) for name, runs in found.grids.items()} == {"adaptive_grid": 16, "early_exit_grid": 7,
                                                                       "oneoff_scenarios": 4}  # fmt: skip
    assert (found.failed, found.unreadable) == ([], [])
    assert [run.id for run in found.runs][:2] == [f"run1_r12_t64_temp0.0_d10_adaptive{i}" for i in (0, 1)]
    for run in found.runs:
        assert 0.4 < run.against["no speculation"].ratio < 0.75
        assert run.against["no speculation"].sign == "faster"
        assert ("fixed length" in run.against) == (run.subject.mode != "fixed")
    held = [a for run in found.grids["adaptive_grid"] for a in run.against.values()]
    assert all(a.p_holm is not None and a.p is not None and a.p_holm >= a.p for a in held)
    assert sum(run.control is not None for run in found.runs) == 5


def test_the_words_follow_the_numbers(sweeps: Path, scripted: ModuleType, tmp_path: Path) -> None:
    said = findings.sentences(findings.gather([sweeps]))
    assert any(line.startswith("adaptive_grid: against fixed length, 8 of 8 runs faster, 0 slower;") for line in said)
    assert any(re.match(r"A/A: [01] of 5 runs differ", line) for line in said)
    assert any(line.startswith("outputs at temperature 0") and line.endswith("0 violation") for line in said)
    grid = ROOT / "sweeps_config" / "adaptive_grid.yaml"
    slow = scripted.Scripted({"off": 0.7, "fixed": 1.0, "goodput": 1.0}, seed=1)
    assert scripted.run_grid(grid, tmp_path / "out", slow, only="run1_") == []
    worse = findings.sentences(findings.gather([tmp_path / "out"]))
    assert any("against no speculation, 0 of 2 runs faster, 2 slower" in line for line in worse)
    assert any("against fixed length, 0 of 1 runs faster, 0 slower, 1 not told apart" in line for line in worse)


def test_the_page_is_whole_and_keeps_to_itself(
    sweeps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "deep" / "r.html"
    assert main(["report", str(sweeps), "--output", str(page), "--title", "<b> & more"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {page}"
    assert sum("faster" in line and line.startswith(("  run", "* run", "  scen", "* scen")) for line in lines) == 27
    assert max(map(len, lines)) < 180
    text = page.read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert "http" not in text
    assert "<h1>&lt;b&gt; &amp; more</h1>" in text
    assert text.count("<svg") >= 3
    assert "prefers-color-scheme: dark" in text
    for run in findings.gather([sweeps]).runs:
        assert run.id in text


def test_failures_and_damage_are_listed_not_hidden(
    sweeps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "sweeps"
    shutil.copytree(sweeps / "oneoff_scenarios", copy / "oneoff_scenarios")
    a, b, c, _ = sorted((copy / "oneoff_scenarios").glob("*.json"))
    a.write_text("{", encoding="utf-8")
    failure = {"exception": "X", "message": "CUDA out of <memory>", "advice": "lower it", "log_tail": []}
    data = json.loads(b.read_text(encoding="utf-8")) | {"status": "failed", "summary": None, "failure": failure}
    data["reasons"] = {**data["reasons"], "summary": "the run failed"}
    del data["reasons"]["failure"]
    record.write(record.parse(json.dumps(data), "b"), b)
    assert main(["report", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "- not in the tables: 1 failed runs, 1 unreadable records" in out
    assert f"- failed: {b.stem}: CUDA out of <memory>" in out
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert "CUDA out of &lt;memory&gt;" in text
    assert "is not JSON" in text
    assert c.stem in text


def test_what_stands_beside_a_record_is_none(sweeps: Path, tmp_path: Path) -> None:
    copy = tmp_path / "oneoff_scenarios"
    shutil.copytree(sweeps / "oneoff_scenarios", copy)
    first = next(copy.glob("*.json"))
    (copy / "superseded").mkdir()
    shutil.copy(first, copy / "superseded" / "old.json")
    assert (copy / first.stem / "metrics.json").exists()
    (copy / "profile" / "x").mkdir(parents=True)
    (copy / "profile" / "x" / "window.json").write_text("{}", encoding="utf-8")
    found = findings.gather([copy])
    assert (len(found.runs), found.unreadable) == (4, [])


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingError):
        findings.gather([tmp_path / "none"])
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_ratios_beyond_the_axis_stay_in_the_picture(sweeps: Path) -> None:
    run = findings.gather([sweeps / "oneoff_scenarios"]).runs[0]
    wild = findings.Against("vanilla", 2, 1e20, 1e-20, 1e22, 0.9, 1e9, p_holm=0.9)
    drawn = plot.forest([findings.Run(run.record, run.subject, {"no speculation": wild}, None)])
    xs = [float(x) for x in re.findall(r' (?:x1|x2|cx)="([\d.]+)"', drawn)]
    assert xs
    assert all(0 <= x <= plot.WIDTH for x in xs)
