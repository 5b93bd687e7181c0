"""What each running request has shown so far, and those of its kind before it: one number per request, learnt as a
Gaussian, forgotten slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nwor_vllm.policy.stop import Floats, Ints

SCRATCH = 0  # the row of rounds whose request is not known (any more): starts from the prior every time
START = 64
KINDS = 64  # that are told apart; later ones are like requests of no kind
KNOWN, LEVEL = 50.0, 1.0  # requests of a kind before the first of them fade; and for that it is like all others
BELIEVED = 4.0  # requests that the configured spread counts as
FADE = 1.0 - 1.0 / 200.0
LEAST_SHARE = 0.05  # of the configured variance


class Slots:
    """Request id -> row of the arrays below. Rows are reused after `forget`."""

    def __init__(self) -> None:
        self.row: dict[str, int] = {}
        self.free: list[int] = list(range(START - 1, SCRATCH, -1))
        self.size = START
        self.kinds: dict[str, int] = {"": 0}
        self.told: dict[str, int] = {}  # of those that have no row yet
        self.kind: Ints = np.zeros(START, np.int64)  # by row

    def begin(self, request: str, kind: str) -> None:
        number = self.kinds.setdefault(kind, len(self.kinds)) if len(self.kinds) < KINDS else self.kinds.get(kind, 0)
        if number:
            self.told[request] = number

    def rows(self, requests: Sequence[str]) -> tuple[Ints, list[int]]:
        """Rows of `requests`, and which of them are new."""
        fresh: list[int] = []
        for request in dict.fromkeys([r for r in requests if r not in self.row]):
            if not self.free:
                self.free = list(range(2 * self.size - 1, self.size - 1, -1))
                self.kind = np.append(self.kind, np.zeros(self.size, np.int64))
                self.size *= 2
            row = self.row[request] = self.free.pop()
            self.kind[row] = self.told.pop(request, 0)
            fresh.append(row)
        return np.fromiter(map(self.row.__getitem__, requests), np.int64, len(requests)), fresh

    def known(self, requests: Sequence[str]) -> Ints:
        get = self.row.get
        return np.array([get(r, SCRATCH) for r in requests], np.int64)

    def forget(self, request: str) -> int | None:
        """The row it had."""
        row = self.row.pop(request, None)
        self.told.pop(request, None)
        if row is not None:
            self.free.append(row)
        return row

    def snapshot(self) -> dict[str, Any]:
        same = {"row": dict(self.row), "free": list(self.free), "size": self.size}
        return same | {"kinds": dict(self.kinds), "told": dict(self.told), "kind": self.kind.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.row = {str(k): int(v) for k, v in state["row"].items()}
        self.free = [int(x) for x in state["free"]]
        self.size = int(state["size"])
        self.kinds, self.told = ({str(k): int(v) for k, v in state[name].items()} for name in ("kinds", "told"))
        self.kind = np.array(state["kind"], np.int64)


class Groups:
    """Which rounds are of the same row: a row that comes several times had several rounds, which count together."""

    def __init__(self, rows: Ints) -> None:
        found: dict[int, int] = {}  # a few rows: a dict is quicker than sorting arrays
        self.place = np.array([found.setdefault(row, len(found)) for row in rows.tolist()], np.int64)
        self.rows = np.array(list(found), np.int64)
        self.rounds = np.bincount(self.place)


class Effects:
    """Per row an offset in log-odds: N(level of its kind, prior) at first, then filtered, falling back to it at rate
    1 - keep. How much requests and kinds differ is learnt from those that end: where they are alike, luck must not tell
    them apart."""

    def __init__(self, spread: float, keep: float) -> None:
        self.prior, self.keep = spread * spread, keep
        self.given = self.prior
        self.apart = self.told = 0.0  # what the requests that have ended say of it, and how much
        self.mean: Floats = np.zeros(START)
        self.var: Floats = np.full(START, self.prior)
        self.kind: Ints = np.zeros(START, np.int64)
        self.level: Floats = np.zeros(KINDS)  # how much better drafts of a kind are than of all
        self.ended: Floats = np.zeros(KINDS)  # its requests, by how much each could show

    def begin(self, slots: Slots, rows: Sequence[int]) -> None:
        grow = slots.size - len(self.mean)
        if grow > 0:
            self.mean = np.append(self.mean, np.zeros(grow))
            self.var = np.append(self.var, np.full(grow, self.prior))
            self.kind = np.append(self.kind, np.zeros(grow, np.int64))
        for row in rows:  # one, mostly
            self.kind[row] = slots.kind[row]
            self._reset(row)

    def _reset(self, row: int) -> None:
        self.mean[row], self.var[row] = self.level[self.kind[row]], self.prior

    def end(self, rows: Sequence[int]) -> None:
        """These requests are over: their own offsets, less what luck would make of them, tell how requests differ."""
        kind, var = self.kind[rows], self.var[rows]
        mean = self.mean[rows] - self.level[kind]
        share = np.maximum(1.0 - var / self.prior, 0.0)  # of its offset that a request could show
        fade = FADE ** len(rows)
        self.apart = fade * self.apart + float((mean * mean - share * var).sum())
        self.told = fade * self.told + float((share * share).sum())
        found = (BELIEVED * self.given + self.apart) / (BELIEVED + self.told)
        self.prior = max(found, LEAST_SHARE * self.given)
        self.ended += np.bincount(kind, share, KINDS)
        self.level += np.bincount(kind, mean, KINDS) / (self.ended + LEVEL)
        self.ended = np.minimum(self.ended, KNOWN)
        common = float(self.ended @ self.level) / max(float(self.ended.sum()), 1e-9)
        self.level = np.where(self.ended > 0, self.level - common, 0.0)  # what all kinds share is no kind's

    def update(self, groups: Groups, residual: Floats, information: Floats) -> None:
        """One filter step: `residual` is the sum of outcome minus expectation, `information` the sum of p (1 - p)."""
        rows, keep = groups.rows, self.keep**groups.rounds
        var = keep**2 * self.var[rows] + (1.0 - keep**2) * self.prior
        var = var / (1.0 + var * np.bincount(groups.place, information))
        level = self.level[self.kind[rows]]
        mean = level + keep * (self.mean[rows] - level) + var * np.bincount(groups.place, residual)
        self.mean[rows] = np.minimum(np.maximum(mean, -6.0), 6.0)
        self.var[rows] = var
        self._reset(SCRATCH)

    def snapshot(self) -> dict[str, Any]:
        return {
            "mean": self.mean.tolist(),
            "var": self.var.tolist(),
            "prior": self.prior,
            "apart": self.apart,
            "told": self.told,
            "kind": self.kind.tolist(),
            "level": self.level.tolist(),
            "ended": self.ended.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.mean = np.array(state["mean"], float)
        self.var = np.array(state["var"], float)
        self.kind = np.array(state["kind"], np.int64)
        self.level, self.ended = np.array(state["level"], float), np.array(state["ended"], float)
        self.prior, self.apart, self.told = (float(state[name]) for name in ("prior", "apart", "told"))
