"""A sample of the matrix of `nwor verify --full`, drawn anew every run: FUZZ_SEED repeats one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nwor_vllm.bench import cli, verify, verify_identity

pytestmark = pytest.mark.vllm

BENCH = Path(cli.__file__).parent
SEED = os.environ["FUZZ_SEED"]


def test_no_check_asks_for_what_the_plugin_has_to_put_right_itself():
    """It once did, and engines of users had a fault that no check could see."""
    from nwor_vllm.plugin import compat, worker

    assert compat.fix_cpu_expand.__name__ in Path(worker.__file__).read_text()  # it is the plugin's own business
    for path in (*BENCH.glob("verify*.py"), *(BENCH / "backends").glob("*.py")):
        assert compat.fix_cpu_expand.__name__ not in path.read_text(), path.name


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
