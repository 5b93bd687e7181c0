"""A sample of what `nwor verify --full` and `--temperature 1` run. What is drawn anew every time FUZZ_SEED repeats."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nwor_vllm.bench import cli, verify, verify_identity, verify_sampling
from nwor_vllm.bench.verify_journal import Journal

pytestmark = pytest.mark.vllm

BENCH = Path(cli.__file__).parent
SEED = os.environ["FUZZ_SEED"]


def test_no_check_asks_for_what_the_plugin_has_to_put_right_itself():
    """It once did, and engines of users had a fault that no check could see."""
    from nwor_vllm.plugin import compat

    fix = compat.fix_cpu_expand.__name__
    assert fix in Path(compat.__file__).with_name("worker.py").read_text()
    for path in (*BENCH.glob("verify*.py"), *(BENCH / "backends").glob("*.py")):
        assert fix not in path.read_text(), path.name


@pytest.mark.parametrize(("runner", "engines"), [("v1", 4), ("v2", 2)])
def test_outputs_are_the_targets_own(runner, engines, capfd):
    code = cli.main(["verify", "--json", "--runner", runner, "--engines", str(engines), "--seed", SEED])
    told = capfd.readouterr()
    verdict = verify.Verdict.model_validate(json.loads(told.out.splitlines()[-1]))
    assert (code, verdict.passed, verdict.differences) == (0, True, 0), f"FUZZ_SEED={SEED}: {told.err[-4000:]}"
    assert verdict.negative_control_caught and verdict.max_abs_z is None
    assert not [check.name for check in verdict.checks if check.refused]
    honest = [check for check in verdict.checks if not check.planted]
    assert verdict.compared == len(honest) * verify_identity.REQUESTS == engines * 4 * 12
    seen = {name: {getattr(check, name) for check in honest} for name in ("asynchronous", "rule", "drafter", "scene")}
    assert seen["asynchronous"] == {False, True} and seen["rule"] == set(verify_identity.RULES)
    if engines >= 4:  # interpreted engines are slow: theirs are two of the twelve
        assert seen["drafter"] == set(verify_identity.DRAFTERS) and seen["scene"] == set(verify_identity.SCENES)


def test_samples_are_the_targets_own_and_a_biased_rule_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    journal = Journal(tmp_path / "journal", {})
    verify_sampling.check("v1", 4000, journal, {(False, "probabilistic"): ["both", verify_sampling.PLANTED]})
    verdict = verify.judge(journal.checks.values(), 0.0)
    assert verdict.passed and verdict.samples == verdict.compared == 4000, journal.checks
    assert verdict.negative_control_caught
