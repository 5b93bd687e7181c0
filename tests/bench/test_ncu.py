# ruff: noqa: E501
from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import BatchResult, Counters, RequestResult
from nwor_vllm.bench.ncu import expect, parse, probe, profile
from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError, NworError

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
    assert parse.read_csv(LONG.replace('"n/a"', '"no data"')) == [first, second]


def test_the_long_page_where_rules_were_applied() -> None:
    """As ncu 2022.3 prints it: three more columns in the header, none or one of them in the rows of metrics."""
    header, *rows = [line for line in LONG.splitlines() if line.startswith('"')]
    text = "\n".join([header + ',"Rule Name","Rule Type","Rule Description"', *(row + "," for row in rows)])
    assert parse.read_csv(text) == parse.read_csv(LONG)
    with pytest.raises(CorruptFileError, match="row of 10 fields"):
        parse.read_csv("\n".join([header, rows[0].rsplit('","', 1)[0] + '"']))


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


@settings(max_examples=200, deadline=None)
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


KV, OTHER = "reshape_and_cache_flash_kernel", "void cutlass::gemm<float, (bool)1>(int)"


def test_reports_in_nvidia_s_format(tmp_path: Path, ncu_file: ModuleType) -> None:
    pytest.importorskip("ncu_report")
    path = tmp_path / "x.ncu-rep"
    path.write_bytes(ncu_file.report([(KV, {WRITE: 4096.0, TIME: 3500.0, PCT: 12.5}), (OTHER, {WRITE: 0.0})]))
    first, second = parse.read_report(path)
    assert (first.name, second.name) == (KV, OTHER)
    assert dict(first.metrics) == pytest.approx({WRITE: 4096.0, TIME: 3.5e-6, PCT: 12.5})
    assert dict(second.metrics) == {WRITE: 0.0}  # measured as nothing; the others were not measured
    path.write_bytes(ncu_file.report([]))
    with pytest.raises(CorruptFileError, match="holds no kernels"):
        parse.read_report(path)


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_report_cut_off_is_an_error_or_shorter(tmp_path: Path, ncu_file: ModuleType, cut: int) -> None:
    pytest.importorskip("ncu_report")
    whole = ncu_file.report([(KV, {WRITE: 1.0})] * 8)
    path = tmp_path / "x.ncu-rep"
    path.write_bytes(whole[: len(whole) * cut // 10])
    try:
        assert len(parse.read_report(path)) < 8
    except CorruptFileError as error:
        assert str(error)


SAMPLES = Path(os.environ.get("NWOR_NCU_SAMPLES", "/usr/share/doc/nsight-compute/examples/uncoalescedGlobalAccesses"))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="NVIDIA's own reports: Debian's package nsight-compute has them")
@pytest.mark.parametrize(("name", "stored"), [("addConstDouble", 1.0), ("addConstDouble3", 2.0)])
def test_nvidia_s_own_reports(name: str, stored: float) -> None:
    """Each kernel stores 3 * 2**20 doubles; the second one uncoalesced, so that half of each sector is written twice."""
    (kernel,) = parse.read_report(SAMPLES / f"{name}.ncu-rep")
    assert kernel.name == name
    assert 1e-4 < kernel.metrics[TIME] < 1e-3
    found = profile.Profiled("ok", kernels=(kernel,)).store_bytes
    assert found == pytest.approx(stored * 3 * 2**20 * 8, rel=0.01)
    if stored == 1.0:
        assert expect.contradiction(found, 3 * 2**20 * 8.0) == ""


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


def test_a_hanging_ncu_ends_with_everything_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "GRACE_S", 0.3)
    pids = tmp_path / "pids"
    started = time.monotonic()
    # Neither ncu nor what it profiles listens to SIGTERM.
    body = f"trap '' TERM\n(trap '' TERM; echo $BASHPID >>{pids}; while :; do sleep 1; done) &\necho $$ >>{pids}\nwait"
    found, lines = run(tmp_path, body, limit=0.7)
    assert found.status == "timeout"
    assert "did not finish in 1 s" in found.reason
    assert time.monotonic() - started < 15
    assert len(lines) >= 2
    assert lines[0].startswith("ncu: running for")
    numbers = [int(text) for text in pids.read_text(encoding="utf-8").split()]
    assert len(numbers) == 2
    assert not any(alive(pid) for pid in numbers)


def test_without_the_reader_ncu_s_csv_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path) -> list[parse.Kernel]:
        raise MissingError("reading it needs the ncu-report package")

    monkeypatch.setattr(probe, "read_report", absent)
    (tmp_path / "wide.csv").write_text(WIDE, encoding="utf-8")
    found, lines = run(tmp_path, f'[ "$1" != --import ] || cat {tmp_path}/wide.csv')
    assert [kernel.name for kernel in found.kernels] == ["concat_and_cache_mla_kernel(a, b)", "nwor_stop"]
    assert "asking ncu for CSV" in lines[-1]
    monkeypatch.setattr(probe, "EXPORT_S", 0.3)
    assert run(tmp_path, '[ "$1" != --import ] || sleep 60')[0].status == "timeout"
    found, _ = run(tmp_path, '[ "$1" != --import ] || { echo "==ERROR== no"; exit 1; }')
    assert (found.status, found.reason) == ("failed", "ncu --csv ended with 1: " + found.reason.partition(": ")[2])


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
        (
            "echo \"unrecognised option '--config-file'\"; echo; echo Use --help; exit 255",
            "failed",
            "ncu ended with 255: unrecognised option '--config-file'",
        ),
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


STORES = profile.STORES[0]


def kernels(sectors: float, n: int = 1) -> tuple[parse.Kernel, ...]:
    return tuple(parse.Kernel("reshape_and_cache_flash_kernel", {STORES: sectors / n, WRITE: 64.0}) for _ in range(n))


WHOLE = probe.Probe("ok", "", (*kernels(500), parse.Kernel("gemm", {WRITE: 4096.0})))
WINDOW = {"logical_bytes": 32_000.0, "analytic_bytes": 32_000.0, "text": "a window"}


def test_a_contradiction_on_the_baseline_is_one(tmp_path: Path) -> None:
    assert profile.judge(cell(tmp_path), kernels(1000), WHOLE, WINDOW).status == "ok"
    bad = profile.judge(cell(tmp_path), kernels(500), WHOLE, WINDOW)
    assert bad.status == "contradiction"
    assert "16000 bytes where the model's shape says 32000" in bad.reason
    for elastic in ({"threshold": 0.5}, {"adaptive": True}):  # their bytes are meant to go
        assert profile.judge(cell(tmp_path, **elastic), kernels(500), WHOLE, WINDOW).status == "ok"


def test_window_totals_stand_beside_what_the_writing_kernels_stored(tmp_path: Path) -> None:
    beside = profile.judge(cell(tmp_path), kernels(1000, n=4), WHOLE, WINDOW).beside_clock(cell(tmp_path), ())
    assert (beside.store_bytes, beside.dram_bytes, beside.kernels) == (32_000.0, 64.0 + 4096.0, 4)
    assert (beside.logical_bytes, beside.analytic_bytes) == (32_000.0, 32_000.0)
    lost = profile.judge(cell(tmp_path), kernels(1000), probe.Probe("timeout", "too slow"), WINDOW)
    beside = lost.beside_clock(cell(tmp_path), ())
    assert (beside.status, beside.store_bytes, beside.dram_bytes) == ("ok", 32_000.0, None)
    assert "ended timeout, too slow" in beside.reasons["dram_bytes"]
    assert lost.totals == {STORES: 1000.0, WRITE: 64.0}  # of the writing kernels; the window says so
    assert "K/V kernels alone" in beside.window


def test_a_window_cut_by_the_launch_limit_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "LAUNCHES", 4)
    found = profile.judge(cell(tmp_path), kernels(500, n=4), WHOLE, WINDOW)
    assert found.status == "ok"
    assert "cut at 4 kernel launches" in found.scope()


def drafter(tmp_path: Path) -> str:
    (tmp_path / "drafter").mkdir(exist_ok=True)
    return str(model(tmp_path / "drafter", num_hidden_layers=1))


@pytest.mark.parametrize("by_request", [True, False])
def test_counted_and_expected_bytes_agree_on_a_run_worked_by_hand(tmp_path: Path, by_request: bool) -> None:
    """10 prompt tokens; the prefill gives token 1; two rounds of 4 drafts keep 2 and 1, so 3 and 2 tokens: 6 in all.

    Target: 10 + 2 * (1 + 4) rows. Drafter: the same without 5 rejected ones, and 3 more drafts in each of 3 steps.
    """
    own = {"target_kv_bytes_written": 20 * 1536, "draft_kv_bytes_written": 24 * 256}
    counters = Counters(2, 8, 8, 3, (2, 1), 0, 0, 3, {4: 2}, **own)
    seen = {"rounds": 2, "drafted": 8, "accepted": 3} if by_request else {}
    done = RequestResult("a", tuple(range(6)), "length", None, None, None, prompt_tokens=10, **seen)
    subject = cell(tmp_path, engine=Engine(target=str(model(tmp_path)), drafter=drafter(tmp_path), draft_length=4))
    found = profile.clock_bytes(subject, [BatchResult(0, 0, 1.0, "", (done,), counters)])
    assert found == (20 * 1536.0 + 24 * 256, 20 * 1536.0 + 24 * 256)


def test_the_end_of_a_request_cuts_its_last_round(tmp_path: Path) -> None:
    """4 tokens wanted: the prefill gives 1, one round keeps 4 of 4 and would give 5 more. No plain step is inferred."""
    counters = Counters(1, 4, 4, 4, (1,) * 4, 0, 0, 2, {4: 1}, target_kv_bytes_written=0, draft_kv_bytes_written=0)
    done = RequestResult("a", (1, 2, 3, 4), "length", None, None, None, 10, "", 1, 4, 4)
    seen = expect.steps([BatchResult(0, 0, 1.0, "", (done,), counters)], counters)
    assert (seen.rounds, seen.plain, expect.target_rows(seen, counters)) == (1, 0, 10 + 4 + 1)


def test_an_engine_that_never_drafts_has_its_bytes_too(tmp_path: Path) -> None:
    plain = cell(tmp_path, engine=Engine(target=str(model(tmp_path)), method="none", draft_length=0), draft_length=0)
    done = RequestResult("a", tuple(range(6)), "length", None, None, None, prompt_tokens=10)
    assert profile.clock_bytes(plain, [BatchResult(0, 0, 1.0, "", (done,), None)]) == (None, (10 + 5) * 1536.0)


def test_bytes_of_a_drafter_without_arithmetic_are_unknown(tmp_path: Path) -> None:
    engine = Engine(target=str(model(tmp_path)), drafter="d", method="draft_model", draft_length=4)
    counters = Counters(0, 0, 0, 0, (), 0, 0, 0, {}, target_kv_bytes_written=7, draft_kv_bytes_written=2)
    done = RequestResult("a", (1,), "length", None, None, None, prompt_tokens=1)
    assert profile.clock_bytes(cell(tmp_path, engine=engine), [BatchResult(0, 0, 1.0, "", (done,), counters)]) == (
        9,
        None,
    )


def test_without_ncu_the_other_bytes_are_still_there(tmp_path: Path) -> None:
    counters = Counters(0, 0, 0, 0, (), 0, 0, 0, {}, target_kv_bytes_written=1536, draft_kv_bytes_written=0)
    done = RequestResult("a", (1,), "length", None, None, None, prompt_tokens=1)
    result = [BatchResult(0, 0, 1.0, "", (done,), counters)]
    subject = cell(tmp_path, engine=Engine(target=str(model(tmp_path)), method="ngram", draft_length=4))
    ncu = profile.run(subject, tmp_path, {}, lambda text: None).beside_clock(subject, result)
    assert ncu.status == "unavailable"
    assert (ncu.logical_bytes, ncu.analytic_bytes) == (1536.0, 1536.0)
    assert ncu.store_bytes is None
    assert ncu.reasons["store_bytes"] == "no NVIDIA GPU on this machine"
