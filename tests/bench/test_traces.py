from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nwor_vllm.bench import traces
from nwor_vllm.bench.sim.synthetic import DOMAINS, generate
from nwor_vllm.errors import CorruptFileError, MissingError


@pytest.fixture
def trace() -> traces.Trace:
    return generate(DOMAINS[0], 5, 30, 8, 0)


def test_round_trip_keeps_rounds_exactly_and_confidence_to_a_twentieth_of_log_odds(
    trace: traces.Trace, tmp_path: Path
) -> None:
    path = tmp_path / "code.npz"
    confidence = trace.confidence.copy()
    confidence[3, 2] = np.nan
    traces.save(traces.Trace(trace.starts, trace.accepted, confidence, trace.categories, about={"seed": 0}), path)
    back = traces.load(path)
    assert (back.starts == trace.starts).all()
    assert (back.accepted == trace.accepted).all()
    assert back.categories == trace.categories
    assert back.about == {"seed": 0}
    assert np.isnan(back.confidence[3, 2])
    was, now = (np.log(c / (1 - c)) for c in (np.clip(trace.confidence, 1e-5, 1 - 1e-5), back.confidence))
    assert np.nanmax(np.abs(was - np.clip(now, -11.5, 11.5))) < 0.05 + 1e-9
    assert not list(tmp_path.glob("*.partial"))


def rewrite(path: Path, **changes: object) -> None:
    with np.load(path) as data:
        arrays = dict(data)
    header = json.loads(bytes(arrays["header"])) | changes
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def test_foreign_version_and_format_are_named(trace: traces.Trace, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    traces.save(trace, path)
    rewrite(path, version=7)
    with pytest.raises(CorruptFileError, match=r"version 7; this reads version 1"):
        traces.load(path)
    rewrite(path, format="other")
    with pytest.raises(CorruptFileError, match=r"'other', not 'nwor-trace'"):
        traces.load(path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"PK\x03\x04 not a zip"])
def test_damage_is_one_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(damage)
    with pytest.raises(CorruptFileError) as error:
        traces.load(path)
    assert "\n" not in str(error.value)


def test_truncated_file_is_refused(trace: traces.Trace, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    traces.save(trace, path)
    whole = path.read_bytes()
    for share in (0.3, 0.7, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptFileError):
            traces.load(path)


def test_missing_file_and_inconsistent_arrays(trace: traces.Trace, tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        traces.load(tmp_path / "none.npz")
    with pytest.raises(CorruptFileError, match=r"accepted outside 0\.\.k_max"):
        traces.Trace(trace.starts, trace.accepted + 9, trace.confidence, trace.categories)


def test_join_keeps_every_request(trace: traces.Trace) -> None:
    other = generate(DOMAINS[4], 3, 20, 5, 1)
    both = traces.join([trace, other])
    assert both.requests == 8
    assert both.k_max == 5
    assert (both.accepted[both.starts[5] :] == other.accepted).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_line_or_harmless(trace: traces.Trace, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npz"
    if not path.exists():
        traces.save(trace, path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    try:
        traces.load(broken)
    except CorruptFileError as error:
        assert "\n" not in str(error)
        assert str(broken) in str(error)


def test_chosen_requests_keep_their_rounds(trace: traces.Trace) -> None:
    some = traces.select(trace, [3, 0])
    assert some.requests == 2
    size = trace.starts[4] - trace.starts[3]
    assert (some.accepted[:size] == trace.accepted[trace.starts[3] : trace.starts[4]]).all()
    assert (some.accepted[size:] == trace.accepted[: trace.starts[1]]).all()
