"""What is published is what is served, what the dashboard asks for, and what the guide explains."""

from __future__ import annotations

import json
import os
import random
import re

import pytest

from nwor_vllm.plugin.counters import Counters, RequestCounts
from nwor_vllm.plugin.messages import DraftReport
from nwor_vllm.policy import POLICIES, Round, Step, make_policy

pytestmark = pytest.mark.vllm  # the metrics module builds on vLLM's logger interface

ROUNDS = [Round("a", 5, 3, 2, (0.9, 0.8, 0.7, 0.2)), Round("b", 5, 5, 5)]


@pytest.fixture
def counters():
    counts = Counters(draft_row_bytes=10, target_row_bytes=100)
    counts.report(DraftReport(5, 4, {"a": 3, "b": 5}, rows_written=12, rows_avoided=4), skipped_rows=2, caps={"a": 4})
    counts.step(Step(ROUNDS, 5, 4, 0.25, requests=2, verified_tokens=10, prefill_tokens=7))
    return counts


def test_counts(counters):
    assert counters.snapshot() == {
        "steps": 1,
        "rounds": 2,
        "draft_forwards": 4,
        "draft_forwards_saved": 1,
        "drafted_tokens": 10,
        "verified_tokens": 8,
        "accepted_tokens": 7,
        "tokens_stopped_by_confidence": 1,  # "a" might have had 4
        "draft_kv_bytes_written": 120,
        "draft_kv_bytes_avoided": 40,
        "target_kv_bytes_written": 1700,
        "target_kv_bytes_avoided": 200,
        "step_seconds": 0.25,
        "length_histogram": {"5": 1},
        "verified_per_position": [2, 2, 2, 1, 1],
        "accepted_per_position": [2, 2, 1, 1, 1],
    }


def test_requests_are_bounded(monkeypatch):
    monkeypatch.setattr(RequestCounts, "KEPT", 3)
    counts = RequestCounts()
    for index in range(10):
        counts.add([Round(f"r{index}", 2, 2, 1)])
    counts.add([Round("r9", 2, 1, 1)])
    assert counts.snapshot()["r9"] == {"rounds": 2, "drafted": 4, "verified": 3, "accepted": 2}
    assert list(counts.snapshot()) == ["r7", "r8", "r9"]


def test_published_counters_are_served_under_the_documented_names(counters, tmp_path):
    from nwor_vllm.plugin.metrics import NAMES, POLICY, Collector, Publisher

    path = tmp_path / "private" / "engine.json"
    collector = Collector([tmp_path / "nobody's.json", path], 0)
    assert list(collector.collect()) == []
    publisher = Publisher(path)
    assert publisher.due(busy=True)
    publisher.publish(counters.snapshot(), {"k": 5.0}, "fixed")
    assert publisher.due(busy=False) and not publisher.due(busy=True)
    samples = [sample for family in collector.collect() for sample in family.samples]
    assert {sample.name for sample in samples} == NAMES
    values = {sample.name: sample for sample in samples}
    assert values["nwor_accepted_tokens_total"].value == 7
    assert values["nwor_accepted_tokens_by_position_total"].labels == {"engine": "0", "position": "5"}
    assert values["nwor_steps_by_draft_length_total"].labels == {"engine": "0", "draft_length": "5"}
    assert values[POLICY].labels == {"engine": "0", "policy": "fixed", "value": "k"}
    path.write_text('{"counters": ')
    assert list(collector.collect()) == []
    publisher.close()
    assert not path.exists()


def test_api_servers_and_engines_meet_at_the_process_that_launched_them(tmp_path, monkeypatch):
    """One API server launches its engines; several are launched beside them, by `vllm serve`."""
    from multiprocessing import get_context

    from nwor_vllm.plugin import metrics

    with get_context("spawn").Pool(1) as pool:
        seen = pool.apply(metrics.launcher)
    assert seen == metrics.launcher() == os.getpid()


def test_several_api_servers_serve_them_too(counters, tmp_path, monkeypatch):
    """They answer /metrics from registries of their own, made for each request."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    from nwor_vllm.plugin import metrics

    path = tmp_path / "private" / "engine.json"
    metrics.Publisher(path).publish(counters.snapshot(), {"k": 5.0}, "fixed")
    monkeypatch.setattr(metrics, "_collectors", [metrics.Collector([path], 0), metrics.Collector([path], 1)])
    monkeypatch.setattr(MultiProcessCollector, "collect", metrics.adapt(MultiProcessCollector.collect))
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    text = generate_latest(registry).decode()
    for engine in (0, 1):
        assert f'nwor_accepted_tokens_total{{engine="{engine}"}} 7.0' in text


def test_a_folder_that_others_can_write_is_not_used(tmp_path):
    from nwor_vllm.plugin.metrics import Publisher

    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    publisher = Publisher(folder / "engine.json")
    publisher.publish({}, {}, "fixed")
    assert list(folder.iterdir()) == []


def test_the_dashboard_and_the_guide_use_names_that_exist(root):
    from nwor_vllm.plugin.metrics import NAMES

    dashboard = json.loads((root / "docs/grafana/nwor.json").read_text())
    asked = {name for p in dashboard["panels"] for t in p["targets"] for name in re.findall(r"nwor_\w+", t["expr"])}
    assert asked == NAMES
    guide = set(re.findall(r"`(nwor_\w+)`", (root / "docs/serving.md").read_text())) - {"nwor_vllm"}
    assert guide == NAMES


def reported(name):
    """What a policy reports once it has learnt something."""
    rng, policy = random.Random(0), make_policy(name, None, (0, 1, 2, 3, 5, 8))
    for _ in range(300):
        k = policy.plan(["a"]).k
        confidence = tuple(rng.random() for _ in range(k))
        kept = next((i for i, c in enumerate(confidence) if rng.random() > c), k)
        rounds = [Round("a", k, k, kept, confidence)]
        policy.observe(Step(rounds, k, k, 1e-3 * (5 + k), requests=1, verified_tokens=1 + k, judged_steps=k))
    return set(policy.metrics())


def test_what_policies_report_is_explained_and_drawn(root):
    dashboard = json.loads((root / "docs/grafana/nwor.json").read_text())
    asked = [t["expr"] for p in dashboard["panels"] for t in p["targets"] if "nwor_policy" in t["expr"]]
    filters = [re.fullmatch(r'nwor_policy\{value(=~|!~)"(.*)"\}', expr).groups() for expr in asked]
    (rest,) = (pattern for kind, pattern in filters if kind == "!~")
    drawn = [pattern for kind, pattern in filters if kind == "=~"]
    goodput = reported("goodput")
    assert {"cost_error", "calibration_error", "guard_trips", "guard_fallback_k"} <= goodput
    for value in goodput:
        shown = [pattern for pattern in drawn if re.fullmatch(pattern, value)]
        assert len(shown) == (1 if re.fullmatch(rest, value) else 0), value
    assert all(any(re.fullmatch(part, value) for value in goodput) for p in drawn for part in p.split("|"))
    guide = (root / "docs/serving.md").read_text()
    for name in POLICIES:
        for value in reported(name):
            assert f"`{re.sub(r'k[0-9]+$', 'kN', value)}`" in guide, (name, value)
