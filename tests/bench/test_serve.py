"""The loop that feeds an engine: on a clock that moves only with the engine's steps and the loop's waiting."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nwor_vllm.bench.backends.engine import Due, serve


@dataclass
class Output:
    request_id: str
    finished: bool


@dataclass
class Stepper:
    """An engine whose step takes a second and whose requests take three steps."""

    now: float = 500.0
    left: dict[str, int] = field(default_factory=dict)
    added: dict[str, tuple[float, float]] = field(default_factory=dict)  # when, and the arrival it was told
    waits: list[float] = field(default_factory=list)
    most: int = 0

    def add_request(self, name: str, prompt: Any, params: Any, arrival_time: float) -> None:
        self.left[name] = 3
        self.added[name] = (self.now - 500.0, arrival_time)
        self.most = max(self.most, len(self.left))

    def step(self) -> list[Output]:
        assert self.left, "stepped with nothing to do"
        self.now += 1.0
        for name in self.left:
            self.left[name] -= 1
        out = [Output(name, left == 0) for name, left in self.left.items()]
        self.left = {name: left for name, left in self.left.items() if left}
        return out

    def wait(self, seconds: float) -> None:
        assert not self.left, "waited while the engine had work"
        self.waits.append(seconds)
        self.now += seconds

    def serve(self, arrivals: list[float], limit: int | None, open_loop: bool) -> tuple[float, dict[str, float]]:
        requests = [Due(str(i), at, None, None) for i, at in enumerate(arrivals)]
        seconds, done = serve(self, requests, limit, open_loop, lambda: self.now, self.wait)
        assert sorted(done, key=int) == [r.id for r in requests]
        return seconds, {name: served.sent - 500.0 for name, served in done.items()}


def test_requests_enter_at_the_first_step_boundary_after_they_are_due_and_count_from_when_they_were() -> None:
    engine = Stepper()
    seconds, sent = engine.serve([0.0, 0.5, 2.0, 10.0], None, open_loop=True)
    assert {name: at for name, (at, _) in engine.added.items()} == {"0": 0.0, "1": 1.0, "2": 2.0, "3": 10.0}
    assert sent == {"0": 0.0, "1": 0.5, "2": 2.0, "3": 10.0}
    assert seconds == 13.0
    assert engine.waits == [5.0]  # idle from 5 to 10
    told = [arrival for _, arrival in engine.added.values()]
    assert [t - told[0] for t in told] == pytest.approx([0.0, 0.5, 2.0, 10.0], abs=1e-5)
    assert told[0] == pytest.approx(time.time() - time.monotonic() + 500.0, abs=5.0)


def test_a_closed_loop_counts_from_when_a_place_is_free() -> None:
    engine = Stepper()
    seconds, sent = engine.serve([0.0] * 5, 2, open_loop=False)
    assert sent == {"0": 0.0, "1": 0.0, "2": 3.0, "3": 3.0, "4": 6.0}
    assert (seconds, engine.most, engine.waits) == (9.0, 2, [])


def test_behind_a_limit_an_open_loop_counts_the_queue() -> None:
    engine = Stepper()
    _, sent = engine.serve([0.0, 0.1], 1, open_loop=True)
    assert engine.added["1"][0] == 3.0
    assert sent["1"] == pytest.approx(0.1)


@given(
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=20),
    limit=st.one_of(st.none(), st.integers(1, 4)),
    open_loop=st.booleans(),
)
def test_whatever_arrives_is_served_once_and_never_early(gaps: list[float], limit: int | None, open_loop: bool) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    engine = Stepper()
    _, sent = engine.serve(times, limit, open_loop)
    assert engine.most <= (limit or len(gaps))
    for i, due in enumerate(times):
        entered = engine.added[str(i)][0]
        assert entered >= due - 1e-6
        assert sent[str(i)] == pytest.approx(due if open_loop else entered, abs=1e-6)
