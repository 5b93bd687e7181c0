"""`nwor verify` without engines: what is sampled, what a journal keeps, what counts as proof. The engines are in
tests/plugin/test_verify.py."""

from __future__ import annotations

import json
import subprocess

import pytest

from nwor_vllm.bench import cli, verify, verify_identity, verify_journal, verify_sampling
from nwor_vllm.bench.verify_journal import Check, Journal
from nwor_vllm.errors import ConfigError, CorruptFileError

GOOD = Check(runner="v1", asynchronous=False, drafter="eagle", scene="plain", rule="both", compared=12)
CAUGHT = GOOD.model_copy(update={"rule": "planted", "planted": True, "differences": 9, "caught": True})


def change(check, **values):
    return Check.model_validate(check.model_dump() | values)


def test_a_sample_meets_every_value_of_every_axis():
    for seed in range(50):
        four, six = verify_identity.combinations(4, seed), verify_identity.combinations(6, seed)
        for cells in (four, six):
            assert {c.drafter for c in cells} == set(verify_identity.DRAFTERS)
            assert {c.scene for c in cells} == set(verify_identity.SCENES)
            assert {c.asynchronous for c in cells} == {False, True}
        assert len({(c.drafter, c.asynchronous) for c in six}) == 6
    assert verify_identity.combinations(4, 1) == verify_identity.combinations(4, 1)
    assert len({tuple(verify_identity.combinations(4, seed)) for seed in range(20)}) > 10


def test_everything_is_every_combination_once():
    cells = verify_identity.combinations(None, 0)
    assert len(cells) == len(set(cells)) == 24
    assert verify_identity.combinations(24, 3) == cells
    assert len(set(verify_identity.combinations(11, 3))) == 11
    starts = {(verify_identity.rules_of(index)[0], cell.scene) for index, cell in enumerate(cells)}
    assert len(starts) == 16  # every rule is what an engine starts with, in every scene
    assert all(sorted(verify_identity.rules_of(index)) == sorted(verify_identity.RULES) for index in range(24))


@pytest.mark.parametrize(
    ("checks", "passed"),
    [
        ([GOOD, CAUGHT], True),
        ([], False),
        ([GOOD], False),
        ([CAUGHT], False),
        ([GOOD, change(CAUGHT, caught=False)], False),
        ([GOOD, CAUGHT, change(CAUGHT, asynchronous=True, caught=False)], False),
        ([change(GOOD, differences=1), CAUGHT], False),
        ([change(GOOD, met=False), CAUGHT], False),
        ([change(GOOD, z={"jointly": 3.4}), CAUGHT], True),
        ([change(GOOD, z={"jointly": -3.6}), CAUGHT], False),
        ([GOOD, CAUGHT, change(GOOD, scene="preemption", refused="no")], True),
        ([change(GOOD, refused="no"), CAUGHT], False),
    ],
)
def test_what_counts_as_proof(checks, passed):
    assert verify.judge(checks, 1.0).passed is passed


def test_the_verdicts_json():
    found = json.loads(verify.judge([change(GOOD, z={"jointly": -1.5}), CAUGHT], 1.0).model_dump_json())
    assert list(found) == [
        "passed", "compared", "differences", "samples", "max_abs_z", "negative_control_caught", "seconds", "checks"
    ]  # fmt: skip
    assert (found["compared"], found["differences"], found["max_abs_z"]) == (12, 0, 1.5)
    assert found["negative_control_caught"] is True and found["samples"] == 12
    verify.Verdict.model_validate(found)
    schema = verify.Verdict.model_json_schema()
    assert schema["additionalProperties"] is False and set(schema["required"]) == set(found)
    assert verify.judge([GOOD], 1.0).negative_control_caught is None
    assert verify.judge([GOOD, CAUGHT], 1.0).samples is None  # nothing was sampled


def test_a_wrong_rule_is_planted_wherever_drafts_are_drawn():
    for runner, interpreted in [("v1", False), ("v2", False), ("v2", True)]:
        for asynchronous in (False, True):
            drawn = verify_sampling.rules_of(runner, (asynchronous, "probabilistic"), interpreted)
            greedy = verify_sampling.rules_of(runner, (asynchronous, "greedy"), interpreted)
            assert drawn == [*greedy, verify_sampling.PLANTED]
            assert greedy and set(greedy) <= set(verify_sampling.RULES)
    assert len(verify_sampling.rules_of("v1", (False, "greedy"), False)) == len(verify_sampling.RULES)


@pytest.mark.parametrize(
    ("rule", "verified", "stopped", "met"),
    [
        ("fixed", 9000, 0, True),
        ("fixed", 4000, 0, False),
        ("early exit", 9000, 9000, True),
        ("early exit", 9000, 10, False),
        ("both", 9000, 0, False),
        ("adaptive", 9000, 0, True),
        ("zero", 0, 0, True),
        ("zero", 1, 0, False),
    ],
)
def test_a_sampled_rule_must_have_done_what_it_is_about(rule, verified, stopped, met):
    counts = {"verified_tokens": verified, "tokens_stopped_by_confidence": stopped}
    assert verify_sampling._met(verify_sampling.RULES[rule], counts, 20000) is met


def test_the_summary_names_what_did_not_happen():
    refused = change(GOOD, scene="preemption", refused="too small")
    text = verify.summary(verify.judge([GOOD, refused, change(GOOD, rule="adaptive", met=False)], 2.0))
    assert "refused by the engine: v1 sync" in text and "preemption      both: too small" in text
    assert "did not happen: v1 sync" in text
    assert "FAILED: 24 outputs compared, 0 differ; the planted wrong rule was NOT RUN" in text


@pytest.mark.parametrize("code", [0, 1, -9])
def test_a_check_of_the_v2_runner_that_dies_half_way_proves_nothing(tmp_path, monkeypatch, capsys, code):
    """What it had checked until then was all well, and for once the whole was called so."""

    def dies(command, **kwargs):
        with path.open("a") as file:
            file.writelines(change(check, runner="v2").model_dump_json() + "\n" for check in (GOOD, CAUGHT))
        return subprocess.CompletedProcess(command, code, stdout="vLLM says something\n")

    path = tmp_path / "journal"
    monkeypatch.setattr(verify.subprocess, "run", dies)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert cli.main(["verify", "--runner", "v2", "--journal", str(path)]) != 0
    assert f"ended early, with code {code}" in capsys.readouterr().err


def test_a_journal_goes_on_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "journal"
    first = Journal(path, {"seed": 1})
    first.expect([GOOD.name, CAUGHT.name])
    first.add(GOOD)
    with path.open("a") as file:
        file.write('{"runner": "v1", "asyn')  # killed while it wrote
    again = Journal(path, {"seed": 1})
    again.expect([GOOD.name, CAUGHT.name])
    assert again.checks == {GOOD.name: GOOD}
    again.add(CAUGHT)
    assert list(Journal(path, {"seed": 1}).checks.values()) == [GOOD, CAUGHT]
    told = capsys.readouterr().err
    assert "1 of 2 checks were made before" in told and "[  2/2" in told and "both" in told and "identical" in told


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "journal"
    Journal(path, {"temperature": 0.0}).add(GOOD)
    with pytest.raises(ConfigError, match="other code, versions or flags; name another file"):
        Journal(path, {"temperature": 1.0})
    path.write_text(path.read_text() + '{"runner": "v3"}\n')
    with pytest.raises(CorruptFileError, match="is damaged"):
        Journal(path, {"temperature": 0.0})


def test_changed_code_starts_a_journal_anew(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    Journal(path, {})
    monkeypatch.setattr(verify_journal.provenance, "code", lambda: "other")
    with pytest.raises(ConfigError, match="other code"):
        Journal(path, {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "0.7"], "--temperature is 0.7; expected 0 (token identity) or 1 (distribution)"),
        (["--temperature", "1", "--samples", "19999"], "--samples is 19999; expected at least 20000"),
        (["--temperature", "1", "--runner", "v2", "--samples", "10"], "--samples is 10; expected at least 2000"),
        (["--engines", "0"], "--engines is 0; expected 1 or more"),
        (["--temperature", "1", "--target", "x"], "--target is for temperature 0"),
        (["--target", "nowhere"], "--target needs at least one --drafter METHOD=DIR"),
        (["--target", "nowhere", "--drafter", "medusa=x"], "expected METHOD=DIR with METHOD one of"),
        (["--target", "nowhere", "--drafter", "eagle=x"], "nowhere is no model folder"),
    ],
)
def test_bad_flags_end_in_one_line(arguments, words, capsys):
    assert cli.main(["verify", *arguments]) in (1, 2)
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told
