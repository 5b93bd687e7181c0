# ruff: noqa: E501
from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import BatchResult, Counters, RequestResult
from nwor_vllm.bench.ncu import expect, parse, probe, profile
from nwor_vllm.errors import ConfigError, CorruptFileError, NworError

WRITE, PCT, TIME = (
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
)
LONG = """==PROF== Connected to process 77 (/usr/bin/python3.11)
==PROF== Profiling "reshape_and_cache_flash_kernel" - 0: 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Section Name","Metric Name","Metric Unit","Metric Value"
"0","77","python3.11","127.0.0.1","void reshape_and_cache<float, (bool)1>(int, float)","1","7","Command line profiler metrics","dram__bytes_write.sum","Kbyte","1,234.50"
"0","77","python3.11","127.0.0.1","void reshape_and_cache<float, (bool)1>(int, float)","1","7","Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","12.5"
"0","77","python3.11","127.0.0.1","void reshape_and_cache<float, (bool)1>(int, float)","1","7","Command line profiler metrics","gpu__time_duration.sum","usecond","3.5"
"1","77","python3.11","127.0.0.1","nwor_confidence","1","7","Command line profiler metrics","dram__bytes_write.sum","byte","n/a"
"1","77","python3.11","127.0.0.1","nwor_confidence","1","7","Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","37.5"
==PROF== Disconnected from process 77
"""
WIDE = """==PROF== Connected to process 77
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","dram__bytes_write.sum","gpu__time_duration.sum","launch__occupancy_limit"
"","","","","","","Mbyte","ns","warp"
"0","77","python3.11","127.0.0.1","concat_and_cache_mla_kernel(a, b)","1","2.5","1,500","3"
"1","77","python3.11","127.0.0.1","nwor_stop","1","0.5","","3"
"""


def test_the_long_page() -> None:
    first, second = parse.read_csv(LONG)
    assert first.name == "void reshape_and_cache<float, (bool)1>(int, float)"
    assert dict(first.metrics) == pytest.approx({WRITE: 1_234_500.0, PCT: 12.5, TIME: 3.5e-6})
    assert dict(second.metrics) == {PCT: 37.5}  # n/a is absent, never 0


def test_the_wide_page() -> None:
    first, second = parse.read_csv(WIDE.replace("\n", "\r\n"))
    assert first.name == "concat_and_cache_mla_kernel(a, b)"
    assert dict(first.metrics) == pytest.approx({WRITE: 2.5e6, TIME: 1.5e-6})
    assert dict(second.metrics) == {WRITE: 500_000.0}


def test_bytes_add_up_and_percentages_average() -> None:
    assert parse.totals(parse.read_csv(LONG)) == pytest.approx({WRITE: 1_234_500.0, PCT: 25.0, TIME: 3.5e-6})
    assert parse.totals([]) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no header row"),
        ("==ERROR== nothing", "no header row"),
        (LONG.replace("Kbyte", "furlong"), "'furlong'"),
        (LONG.replace("1,234.50", "many"), "expected a number"),
        (WIDE.replace('"","","","","","","Mbyte","ns","warp"\n', ""), "no row of units"),
        (LONG.replace(',"Metric Value"', ""), "lacks a column"),
        (WIDE.replace(',"3"\n', ',"3","4"\n'), "row of 10 fields"),
    ],
)
def test_csv_that_cannot_be_trusted_is_an_error(text: str, says: str) -> None:
    with pytest.raises(CorruptFileError) as caught:
        parse.read_csv(text)
    assert says in str(caught.value)


@settings(max_examples=1000, deadline=None)
@given(source=st.sampled_from([LONG, WIDE]), at=st.integers(0, 1500), junk=st.text(max_size=5), cut=st.booleans())
def test_fuzzed_csv_is_an_error_or_kernels(source: str, at: int, junk: str, cut: bool) -> None:
    try:
        found = parse.read_csv(source[:at] + junk + ("" if cut else source[at:]))
    except NworError as error:
        assert str(error)
        return
    json.dumps(parse.totals(found), allow_nan=False)


@pytest.mark.parametrize("content", [b"", b"not a report", b"NVR\0" + b"\0" * 200])
def test_a_report_without_kernels_is_an_error(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("ncu_report")
    path = tmp_path / "x.ncu-rep"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError):
        parse.read_report(path)
    with pytest.raises(CorruptFileError, match="missing or has no bytes"):
        parse.read_report(tmp_path / "no.ncu-rep")


def fake_ncu(tmp_path: Path, body: str) -> dict[str, str]:
    path = tmp_path / "bin" / "ncu"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return {**os.environ, "PATH": f"{path.parent}:{os.environ['PATH']}"}


def run(tmp_path: Path, body: str, limit: float = 20.0) -> tuple[probe.Probe, list[str]]:
    environ, lines = fake_ncu(tmp_path, body), list[str]()
    report = tmp_path / "x.ncu-rep"
    argv = [str(tmp_path / "bin" / "ncu"), *probe.command(report, ["true"], 3)[1:]]
    return probe.run(argv, report, tmp_path / "ncu.log", limit, environ, lines.append, heartbeat_s=0.2), lines


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_hanging_ncu_ends_with_everything_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    started = time.monotonic()
    # Neither ncu nor what it profiles listens to SIGTERM.
    body = f"trap '' TERM\n(trap '' TERM; echo $BASHPID >>{pids}; while :; do sleep 1; done) &\necho $$ >>{pids}\nwait"
    found, lines = run(tmp_path, body, limit=1.0)
    assert found.status == "timeout"
    assert "did not finish in 1 s" in found.reason
    assert time.monotonic() - started < 15
    assert len(lines) >= 2
    assert lines[0].startswith("ncu: running for")
    numbers = [int(text) for text in pids.read_text(encoding="utf-8").split()]
    assert len(numbers) == 2
    assert not any(alive(pid) for pid in numbers)


def test_what_a_finished_ncu_left_behind_ends_too(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    found, _ = run(tmp_path, f"sleep 300 & echo $! >{pids}\nexit 3")
    assert found.status == "failed"
    assert not alive(int(pids.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (
            'echo "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"; exit 1',
            "denied",
            "refused GPU counters",
        ),
        ('while [ "$1" != -o ]; do shift; done; : >"$2"', "empty", "no bytes"),
        ("true", "empty", "missing"),
        ("echo boom >&2; exit 9", "failed", "ncu ended with 9: boom"),
    ],
)
def test_every_other_end_is_bounded_and_named(tmp_path: Path, body: str, status: str, says: str) -> None:
    found, _ = run(tmp_path, body)
    assert found.status == status
    assert says in found.reason
    assert found.kernels == ()


def test_an_old_report_does_not_pass_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "x.ncu-rep").write_bytes(b"yesterday's")
    assert run(tmp_path, "true")[0].status == "empty"


def test_preflight_says_what_is_missing(tmp_path: Path) -> None:
    assert probe.preflight([], {}).reason == "no NVIDIA GPU on this machine"
    assert "not on PATH" in probe.preflight(["H200"], {"PATH": str(tmp_path)}).reason
    environ = fake_ncu(tmp_path, "true")
    assert probe.preflight(["H200"], environ, admin=True).status == "denied"
    assert probe.preflight(["H200"], environ, admin=False).status == "ok"


def test_command_brackets_the_child() -> None:
    argv = probe.command(Path("x.ncu-rep"), ["python", "y.py"], 7)
    assert argv[-2:] == ["python", "y.py"]
    assert argv[argv.index("--launch-count") + 1] == "7"
    assert set(parse.METRICS) == set(argv[argv.index("--metrics") + 1].split(","))
    assert argv[argv.index("--profile-from-start") + 1] == "off"


def model(tmp_path: Path, **changes: object) -> Path:
    shape = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 192}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "torch_dtype": "bfloat16", **changes}), encoding="utf-8")
    return tmp_path


def test_bytes_of_a_row(tmp_path: Path) -> None:
    assert expect.kv_shape(model(tmp_path)).bytes_per_token == 2 * 6 * 2 * 32 * 2
    assert expect.kv_shape(model(tmp_path), "float32").bytes_per_token == 2 * 6 * 2 * 32 * 4
    # Llama-3.1-8B: 128 KiB a token.
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert expect.kv_shape(model(tmp_path, **llama)).bytes_per_token == 128 * 1024
    with pytest.raises(ConfigError, match="cache type"):
        expect.kv_shape(model(tmp_path), "int3")
    with pytest.raises(CorruptFileError, match="attention shape"):
        expect.kv_shape(model(tmp_path, num_attention_heads=None))


def cell(tmp_path: Path, **changes: object) -> Cell:
    engine = Engine(target=str(model(tmp_path)), drafter="d", draft_length=4)
    base = {"requests": 1, "max_tokens": 8, "temperature": 0.0, "draft_length": 4, "batches": 1, "ncu": True}
    return Cell.model_validate({"engine": engine, **base, **changes})


def test_a_contradiction_on_the_baseline_is_one(tmp_path: Path) -> None:
    window = {"logical_bytes": 32_000.0, "analytic_bytes": 32_000.0}
    agree, contradict = {parse.METRICS[3]: 1000.0}, {parse.METRICS[3]: 500.0}
    assert profile.judge(cell(tmp_path), agree, 3, window).status == "ok"
    bad = profile.judge(cell(tmp_path), contradict, 3, window)
    assert bad.status == "contradiction"
    assert "16000 bytes where the model's shape says 32000" in bad.reason
    assert profile.judge(cell(tmp_path, threshold=0.5), contradict, 3, window).status == "ok"  # bytes are meant to go


def test_counted_and_expected_bytes_agree_on_a_run_worked_by_hand(tmp_path: Path) -> None:
    """10 prompt tokens; the prefill gives token 1; two rounds of 4 drafts keep 2 and 1, so 3 and 2 tokens: 6 in all."""
    counters = Counters(2, 8, 8, 3, (2, 1), 0, 0, 2, {4: 2}, target_kv_bytes_written=20 * 1536)
    done = RequestResult("a", tuple(range(6)), "length", None, None, None, prompt_tokens=10)
    found = profile.clock_bytes(cell(tmp_path), [BatchResult(0, 0, 1.0, "", (done,), counters)])
    assert found == (20 * 1536.0, (10 + 2 * 5) * 1536.0)


def test_without_ncu_the_other_bytes_are_still_there(tmp_path: Path) -> None:
    counters = Counters(0, 0, 0, 0, (), 0, 0, 0, {}, target_kv_bytes_written=1536)
    done = RequestResult("a", (1,), "length", None, None, None, prompt_tokens=1)
    result = [BatchResult(0, 0, 1.0, "", (done,), counters)]
    ncu = profile.run(cell(tmp_path), tmp_path, {}, lambda text: None).beside_clock(cell(tmp_path), result)
    assert ncu.status == "unavailable"
    assert (ncu.logical_bytes, ncu.analytic_bytes) == (1536.0, 1536.0)
    assert ncu.store_bytes is None
    assert ncu.reasons["store_bytes"] == "no NVIDIA GPU on this machine"
