from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nwor_vllm.errors import CorruptFileError, MissingError
from nwor_vllm.policy import make_policy
from nwor_vllm.policy.goodput import Goodput
from nwor_vllm.policy.profile import read, write

LADDER = (0, 1, 3, 8)
ROWS = [[n, n * (1 + k), k, k, 0, 0.01 + 0.001 * k + 0.0001 * n] for n in (1, 4, 16) for k in (0, 1, 3, 8)]


def test_a_profile_read_back_starts_the_policy_warm(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    write(ROWS, {"machine": "x"}, path)
    assert read(path).about == {"machine": "x"}
    policy = make_policy("goodput", None, LADDER, str(path))
    assert isinstance(policy, Goodput)
    measured = [row[-1] for row in ROWS if row[0] == 4]
    k = np.array([float(row[2]) for row in ROWS if row[0] == 4])
    assert policy.cost.predict(4, 4 * (1 + k), k, 0.0, k) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9; this reads version 2"),
        ({"format": "other"}, "expected a JSON object with format 'nwor-cost'"),
        ({"rows": [[1, 2, 3]]}, r"row 0 is \[1.0, 2.0, 3.0\]; expected requests"),
        ({"rows": [[1, 1, 0, 0, 0, 0]]}, "seconds above 0"),
        ({"rows": "x"}, "damaged"),
    ],
)
def test_foreign_or_damaged_profiles_are_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    write(ROWS, {}, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptFileError, match=message):
        make_policy("goodput", None, LADDER, str(path))


def test_missing_and_unparsable_profiles(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nwor profile --cost"):
        read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CorruptFileError):
        read(tmp_path / "bad.json")
