"""The measuring driver's own answers, on a real engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nwor_vllm.bench import workload
from nwor_vllm.bench.backends.engine import VllmDriver
from nwor_vllm.bench.grid import Cell, Engine

pytestmark = pytest.mark.vllm
ENGINE = Engine(
    target="zoo:target", method="none", draft_length=0, max_model_len=512, dtype="float32", enforce_eager=True
)
CELL = Cell(engine=ENGINE, requests=3, max_tokens=12, temperature=0.0, draft_length=0, batches=1, warmup_batches=0)


@pytest.fixture(scope="module")
def driver() -> Iterator[VllmDriver]:
    opened = VllmDriver(ENGINE)
    yield opened
    opened.close()


def test_what_the_target_says_next_is_what_it_said(driver: VllmDriver) -> None:
    """Where two outputs part, this is what tells a near tie from a violation."""
    (prompts,) = workload.build(CELL).batches
    _, results = driver.generate(prompts, CELL)
    texts = [(p, r.token_ids[:i]) for p, r in zip(prompts, results, strict=True) for i in range(len(r.token_ids))]
    said = [token for r in results for token in r.token_ids]
    scores = driver.top_logprobs(texts, CELL)
    assert [max(found, key=found.__getitem__) for found in scores] == said
    assert all(len(found) >= 5 and max(found.values()) <= 0 for found in scores)


def test_an_engine_without_a_drafter_counts_nothing_and_says_what_it_is(driver: VllmDriver) -> None:
    driver.switch({"policy": "off", "policy_params": {}, "early_exit": {"threshold": 0.0}})
    assert driver.counters() is None
    assert driver.dtype() == "float32"
    peak, why = driver.peak_memory_bytes()
    assert peak is not None
    assert peak > 1 << 28
    assert why == ""
