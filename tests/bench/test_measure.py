"""What a record says of load, of the best fixed length, of warm-up, of outputs that differ: on the scripted engine."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nwor_vllm.bench import grid, measure, plan, provenance, record, sidecars
from nwor_vllm.bench.metrics import RequestResult
from nwor_vllm.bench.outputs import NEAR_TIE


def run(scripted: ModuleType, folder: Path, driver: Any, beside: Any = None, **settings: Any) -> record.Record:
    """One run of one cell, as a grid file would have it."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"requests": 4, "max_tokens": 8, "temperature": 0.0, "draft_length": 5, "batches": 4, "warmup_batches": 2,
              "adaptive": True, "workload": "random"}  # fmt: skip
    text = json.dumps({"name": "one", "file": "one.json", "runs": [{**common, **settings}]})
    (folder / "one.yaml").write_text(text, encoding="utf-8")
    loaded = grid.load(folder / "one.yaml", "embedded", scripted.models(folder / "models"))
    session = scripted.session(driver, beside=beside)
    assert measure.run_group(plan.examine_all(loaded, folder), session) == []
    found = record.read(folder / "one.json")
    assert found.summary is not None
    return found


def modes(found: record.Record) -> list[record.Mode]:
    assert found.summary is not None
    return found.summary.per_mode


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_an_open_loop_is_judged_by_its_requests(scripted: ModuleType, tmp_path: Path) -> None:
    driver = scripted.Scripted({"goodput": 0.5, "off": 1.0, "fixed": 0.8}, noise=0.01)
    found = run(scripted, tmp_path, driver, request_rate=0.5, burstiness=0.5, slo={"ttft": 50, "e2el": 700})
    # The last of 4 requests arrives after 8 s, whichever arm runs: batch times show nothing.
    assert {mode.latency_p50_s for mode in modes(found)} == {8.0}
    against = {c.against: c for c in found.comparisons}
    assert {c.metric for c in found.comparisons} == {"request_latency_s"}
    assert against["vanilla"].ratio == pytest.approx(0.5, rel=0.05)
    met = {mode.mode: (mode.slo_met_share, mode.goodput_req_s) for mode in modes(found)}
    assert met == {"adaptive": (1.0, 0.5), "vanilla": (0.0, 0.0), "fixed": (0.0, 0.0)}
    assert [mode.queue_s.mean for mode in modes(found)] == pytest.approx([0.001] * 3)
    table = rows(tmp_path / "one/requests.csv")
    by_arm = {mode: [row["arrival_ms"] for row in table if row["mode"] == mode] for mode in met}
    assert len(set(map(tuple, by_arm.values()))) == 1  # every arm saw the same arrivals
    assert float(by_arm["adaptive"][3]) == 8000.0
    assert "0.5 requests a second arrive (burstiness 0.5)" in (tmp_path / "one.md").read_text(encoding="utf-8")


def test_without_objectives_goodput_is_null_with_a_reason(scripted: ModuleType, tmp_path: Path) -> None:
    found = modes(run(scripted, tmp_path, scripted.Scripted({})))[0]
    assert found.goodput_req_s is None
    assert "--slo" in found.reasons["slo_met_share"]


def test_an_open_loop_without_request_times_fails_in_words(scripted: ModuleType, tmp_path: Path) -> None:
    class Timeless(scripted.Scripted):  # type: ignore[misc,name-defined]
        def generate(self, prompts: Any, cell: Any) -> tuple[float, list[RequestResult]]:
            seconds, results = super().generate(prompts, cell)
            return seconds, [RequestResult(r.id, r.token_ids, "length", None, None, None) for r in results]

    with pytest.raises(AssertionError):
        run(scripted, tmp_path, Timeless({}), request_rate=1)
    failure = record.read(tmp_path / "one.json").failure
    assert failure is not None
    assert "the engine gave no request times" in failure.message


def test_the_best_fixed_length_is_named_with_its_interval(scripted: ModuleType, tmp_path: Path) -> None:
    factors = {"goodput": 0.9, "fixed_k1": 1.4, "fixed_k2": 1.001, "fixed_k3": 1.0, "fixed_k5": 1.3, "off": 2.0}
    driver = scripted.Scripted(factors, noise=0.01)
    found = run(scripted, tmp_path, driver, references=["vanilla", "best_fixed"], batches=6)
    assert [(m.mode, m.draft_length) for m in modes(found)] == [
        ("adaptive", 5), ("vanilla", 0), ("fixed", 1), ("fixed", 2), ("fixed", 3), ("fixed", 5),
    ]  # fmt: skip
    assert [c.against for c in found.comparisons] == ["vanilla", "fixed_k1", "fixed_k2", "fixed_k3", "fixed"]
    assert found.summary is not None
    best = found.summary.best_fixed
    assert best is not None
    assert best.draft_length in (2, 3)
    assert best.tied_with == [5 - best.draft_length]
    assert best.candidates["5"] == pytest.approx(1.3, rel=0.05)
    assert best.ratio == pytest.approx(0.9, rel=0.05)
    assert best.low is not None
    assert best.high is not None
    assert best.low < best.ratio < best.high < 1
    assert "Best fixed draft length in hindsight" in (tmp_path / "one.md").read_text(encoding="utf-8")


def test_a_subject_that_is_itself_the_best_fixed_length_is_listed_once(scripted: ModuleType, tmp_path: Path) -> None:
    driver = scripted.Scripted({"fixed_k5": 0.5})
    found = run(scripted, tmp_path, driver, adaptive=False, references=["best_fixed"])
    assert [(m.mode, m.draft_length) for m in modes(found)] == [("fixed", 5), ("fixed", 1), ("fixed", 2), ("fixed", 3)]
    assert found.summary is not None
    assert found.summary.best_fixed is not None
    assert (found.summary.best_fixed.draft_length, found.summary.best_fixed.ratio) == (5, 1.0)


def test_a_ladder_of_one_s_own_is_what_is_searched(scripted: ModuleType, tmp_path: Path) -> None:
    found = run(scripted, tmp_path, scripted.Scripted({}), ladder=[0, 4, 5], references=["best_fixed"])
    assert [m.draft_length for m in modes(found)[1:]] == [4, 5]
    unsearched = run(scripted, tmp_path / "b", scripted.Scripted({}))
    assert unsearched.summary is not None
    assert unsearched.summary.reasons == {"best_fixed": "not searched: add best_fixed to references"}


def test_no_speculation_says_how_and_an_engine_without_a_drafter_stands_beside(
    scripted: ModuleType, tmp_path: Path
) -> None:
    subject, bare, opened = scripted.Scripted({"off": 1.5}), scripted.Scripted({"off": 1.2}), []

    def beside(engine: grid.Engine) -> Any:
        opened.append(engine)
        return bare

    found = run(scripted, tmp_path, subject, beside, references=["vanilla", "vanilla_engine"])
    assert [(m.mode, m.no_speculation) for m in modes(found)] == [
        ("adaptive", None), ("vanilla", "k0_in_engine"), ("vanilla_engine", "engine_without_drafter"),
    ]  # fmt: skip
    assert [(e.method, e.drafter, e.draft_length) for e in opened] == [("none", "", 0)]
    assert bare.calls == subject.calls / 2  # one arm of three
    assert modes(found)[2].latency_avg_s == pytest.approx(1.2, rel=0.1)
    positions = [[b.position for b in mode.batches] for mode in modes(found)]
    assert positions == [[0, 2, 0, 2], [1, 1, 1, 1], [2, 0, 2, 0]]


def test_a_run_without_a_drafter_says_so(scripted: ModuleType, tmp_path: Path) -> None:
    found = run(scripted, tmp_path, scripted.Scripted({}), draft_length=0, adaptive=False, method="none")
    assert [(m.mode, m.no_speculation) for m in modes(found)] == [("vanilla", "engine_without_drafter")]


def test_two_engines_do_not_fit_into_nine_tenths_of_a_gpu(
    scripted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "gpus", lambda: ["NVIDIA H100, 570, 80 GB"])
    monkeypatch.setattr(provenance, "hardware", provenance.hardware.__wrapped__)  # not kept for the tests that follow
    with pytest.raises(AssertionError):
        run(scripted, tmp_path, scripted.Scripted({}), references=["vanilla_engine"], tensor_parallel_size=1)
    failure = record.read(tmp_path / "one.json").failure
    assert failure is not None
    assert "set it to 0.5 or less" in failure.message


@pytest.mark.parametrize(
    ("noise", "asked", "blocks", "settled"),
    [(0.0, 3, 3, True), (0.8, 3, 6, False), (0.8, 1, 1, None), (0.8, 0, 0, None)],
)
def test_warm_up_is_bounded_and_says_how_far_it_settled(
    scripted: ModuleType, tmp_path: Path, noise: float, asked: int, blocks: int, settled: bool | None
) -> None:
    driver = scripted.Scripted({}, noise=noise, seed=3)
    found = run(scripted, tmp_path, driver, warmup_batches=asked)
    assert found.warmup is not None
    assert (found.warmup.blocks, found.warmup.settled) == (blocks, settled)
    assert driver.calls == (blocks + 4) * 3  # three arms
    if settled is None:
        assert found.warmup.changes == {}
        assert "settled" in found.warmup.reasons
        return
    moved = max(abs(change) for change in found.warmup.changes.values())
    assert set(found.warmup.changes) == {"adaptive", "vanilla", "fixed"}
    assert (moved <= found.warmup.tolerance) is settled
    assert any("not settled within 2%" in flag and "moved by" in flag for flag in found.flags) is not settled


@pytest.mark.parametrize(
    ("other", "scores", "verdict", "margin"),
    [
        ((7, 8, 1), {9: -0.1, 8: -0.1 - 0.5 * NEAR_TIE["float32"]}, "near_tie", 0.5 * NEAR_TIE["float32"]),
        ((7, 8, 1), {9: -0.1, 8: -0.1 - 2 * NEAR_TIE["float32"]}, "violation", 2 * NEAR_TIE["float32"]),
        ((7, 8, 1), {9: -0.7, 8: -0.7, 5: -0.2}, "violation", 0.5),  # a tie of two, and both are wrong
        ((7, 8, 1), {9: -0.1, 5: -3.0}, "violation", None),  # a token that the target would not say
        ((7,), {9: -0.1, 8: -0.1}, "violation", None),  # lost tokens are no tie
    ],
)
def test_an_output_that_differs_is_a_near_tie_or_a_violation(
    scripted: ModuleType, tmp_path: Path, other: tuple[int, ...], scores: dict[int, float], verdict: str,
    margin: float | None,
) -> None:  # fmt: skip
    driver = scripted.Scripted({})
    driver.outputs = {"goodput": (7, 9, 1), "off": (7, 9, 1), "fixed": other}
    driver.scores = scores
    found = run(scripted, tmp_path, driver)
    same, differs = found.comparisons
    assert (same.verdict, same.outputs, same.divergences) == ("identical", "identical", [])
    assert differs.verdict == verdict
    first = differs.divergences[0]
    assert (first.index, first.subject_token, first.verdict) == (1, 9, verdict)
    assert first.margin == (None if margin is None else pytest.approx(margin))
    assert "16 of 16 differ" in differs.outputs
    assert [more for _, more in driver.asked] == [[7]] * 16  # scored after what both arms share
    assert any("at temperature 0" in flag for flag in found.flags)


def test_sampled_outputs_may_differ(scripted: ModuleType, tmp_path: Path) -> None:
    driver = scripted.Scripted({}, noise=0.0)
    driver.outputs = {"goodput": (7, 9, 1), "off": (7, 9, 1), "fixed": (7, 8)}
    found = run(scripted, tmp_path, driver, temperature=0.7)
    assert [c.verdict for c in found.comparisons] == ["identical", "sampled"]
    assert (driver.asked, found.flags) == ([], [])


def test_exports_have_the_columns_that_are_documented(scripted: ModuleType, tmp_path: Path) -> None:
    found = run(scripted, tmp_path, scripted.Scripted({}), references=["vanilla", "best_fixed"])
    folder = tmp_path / "one"
    spec = ["request_id", "gamma", "prompt_length", "generated_tokens", "ttft_ms", "tpot_ms", "average_acceptance_rate",
            "total_network_idle_ms", "total_latency_ms", "num_rounds"]  # fmt: skip
    requests = rows(folder / "requests.csv")
    assert list(requests[0])[: len(spec)] == spec
    assert len(requests) == 6 * 4 * 4  # arms, batches, requests
    adaptive = [row for row in requests if row["mode"] == "adaptive"]
    assert {row["average_acceptance_rate"] for row in adaptive} == {"0.25"}  # rounds of 5/10 and 0/10
    assert {row["total_network_idle_ms"] for row in adaptive} == {""}
    rounds = rows(folder / "per_round.csv")
    mine = [row for row in rounds if row["mode"] == "adaptive"]
    assert len(mine) == 2 * len(adaptive)
    assert [row["accepted"] for row in mine[:2]] == ["5", "0"]
    assert {row["mode"] for row in rounds} == {"adaptive", "fixed"}
    by_gamma = {(row["mode"], row["gamma"]): row for row in rows(folder / "summary.csv")}
    assert list(by_gamma) == [("adaptive", "5"), ("vanilla", "0"), *(("fixed", str(k)) for k in (1, 2, 3, 5))]
    assert by_gamma["fixed", "3"]["requests"] == "16"
    assert float(by_gamma["fixed", "3"]["avg_ttft_ms"]) == 10.0
    assert by_gamma["vanilla", "0"]["avg_acceptance_rate"] == ""
    body = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert len(body["per_request"]) == 16
    assert body["per_request"][0]["tokens_per_s"] == pytest.approx(8 / 0.024)
    assert body["latency_avg_s"] == modes(found)[0].latency_avg_s


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["ttft_s", "tpot_s", "latency_s", "queue_s", "seconds"])
def test_no_number_that_json_lacks_reaches_a_file(scripted: ModuleType, tmp_path: Path, bad: float, place: str) -> None:
    class Broken(scripted.Scripted):  # type: ignore[misc,name-defined]
        def generate(self, prompts: Any, cell: Any) -> tuple[float, list[RequestResult]]:
            seconds, results = super().generate(prompts, cell)
            if place == "seconds":
                return bad, results
            return seconds, [dataclasses.replace(r, **{place: bad}) for r in results]

    with pytest.raises(AssertionError):
        run(scripted, tmp_path, Broken({}))
    assert record.read(tmp_path / "one.json").status == "failed"
    assert not (tmp_path / "one").exists()


def test_the_console_s_table_is_the_split_systems() -> None:
    means = dict.fromkeys(sidecars.SUMMARY, 12.345) | {"avg_acceptance_rate": 0.873, "avg_network_idle_ms": None}
    lines = sidecars.table([{"mode": "fixed", "gamma": 5, "threshold": 0.0, "requests": 50, **means}]).splitlines()
    assert lines[1] == "BENCHMARK SUMMARY"
    assert lines[3].split()[:4] == ["Gamma", "Reqs", "Avg", "TTFT"]
    assert lines[5].split() == ["5", "50", "12.35ms", "12.35ms", "87.30%", "unknown", "12.35ms", "fixed"]
