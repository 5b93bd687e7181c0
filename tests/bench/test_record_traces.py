from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nwor_vllm.bench import cli, cost_profile, record_traces, traces
from nwor_vllm.bench.backends.drafts import Draft
from nwor_vllm.bench.sim.curves import RECORDED, fit
from nwor_vllm.errors import ConfigError, CorruptFileError
from nwor_vllm.policy import profile


def draft(at: int, *tokens: int) -> Draft:
    return Draft(at, tokens, tuple(0.5 for _ in tokens))


def test_a_draft_is_kept_as_far_as_the_text_goes_with_it() -> None:
    text = (7, 8, 9, 7)
    kept, shown = record_traces.positions(text, [draft(1, 8, 9, 1), draft(2, 7, 7, 7), draft(3, 7, 8)], 3)
    assert kept.tolist() == [2, 0, 1]
    assert np.isnan(shown).tolist() == [[False] * 3, [False] * 3, [False, False, True]]


@pytest.mark.parametrize("seen", [[1], [1, 3], [1, 2, 2]])
def test_a_position_without_its_draft_is_no_trace(seen: list[int]) -> None:
    with pytest.raises(CorruptFileError, match="not one at each"):
        record_traces.positions((7, 8, 9), [draft(at, 8) for at in seen], 1)


def test_rounds_are_replayed_from_where_the_last_one_ended() -> None:
    trace = traces.Trace(np.array([0, 5]), np.array([2, 0, 9, 1, 0]) % 4, np.full((5, 3), 0.5), ("x",))
    assert record_traces.replayed_rounds(trace, 0) == [2, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--domains", "cod"], "did you mean 'code'"),
        (["--batches", "0"], "count from 1"),
        (["--max-tokens", "1"], "from 2"),
        (["--temperatures", "-1"], "from 0"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(flags: list[str], message: str, capsys, tmp_path: Path) -> None:
    assert cli.main(["record", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_profile_rows_are_medians_of_the_lengths_in_use() -> None:
    samples: cost_profile.Samples = {
        (2, 8, 5, 5, 48): [(100, 0.5), (120, 0.1), (110, 0.2)],
        (2, 7, 5, 0, 48): [(100, 0.1)],  # one request's draft was short
        (2, 10, 5, 0, 48): [(100, 0.1)],  # no draft length of the ladder
    }
    assert cost_profile.rows(samples) == [(2, 8, 5, 5, 110, 0.2)]


def test_what_was_recorded_in_another_dtype_is_another_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of before the flag do not name it: they are float32."""
    wanted: list[str] = []

    def watched(*_: object, dtype: str) -> None:
        wanted.append(dtype)
        raise ConfigError("an engine")

    monkeypatch.setattr("nwor_vllm.bench.backends.drafts.watched", watched)
    shutil.copy(RECORDED / "code-t0-b16.npz", tmp_path)
    flags = ["record", "--out", str(tmp_path), "--domains", "code", "--temperatures", "0", "--batches", "16"]
    made = traces.load(tmp_path / "code-t0-b16.npz").about["recording"]
    flags += ["--max-tokens", str(made["max_tokens"]), "--seed", str(made["seed"]), "--requests", str(made["requests"])]
    assert cli.main(flags) == 0
    assert "everything is recorded" in capsys.readouterr().out
    assert cli.main([*flags, "--dtype", "bfloat16"]) != 0
    assert wanted == ["bfloat16"]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_recording_replays_as_vllm_served_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["record", "--out", str(tmp_path), "--domains", "code", "--temperatures", "0", "0.9", "--batches", "3"]
    flags += ["--requests", "5", "--max-tokens", "24", "--k", "6"]
    assert cli.main(flags) == 0
    greedy, sampled = (traces.load(tmp_path / f"code-t{t}-b3.npz") for t in ("0", "0.9"))
    assert greedy.about["text_same"] is True
    assert greedy.about["rounds_differ"] == 0
    assert greedy.k_max == sampled.k_max == 6
    assert not np.isnan(greedy.confidence).any()
    assert greedy.accepted.mean() > sampled.accepted.mean() * 0.8
    assert (greedy.steps[:, 4] > 0).all()
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "everything is recorded" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.slow
def test_a_measured_profile_can_be_fitted(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    assert cli.main(["profile", "--cost", "--output", str(path), "--concurrency", "1", "4", "--rounds", "1"]) == 0
    found = profile.read(path)
    assert {row[0] for row in found.rows} == {1.0, 4.0}
    assert {row[3] for row in found.rows} > {0.0}
    curve = fit(found.rows, "x")
    assert float(curve.seconds(4, 4 * 16, 15, 15)) > float(curve.seconds(4, 4, 0)) > 0
