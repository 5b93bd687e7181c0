"""Scripted pairs through real vLLM: what was programmed is what is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nwor_vllm.zoo.script_marks import parse_class
from nwor_vllm.zoo.script_shape import DECOY, Shape
from nwor_vllm.zoo.scripted import ScriptedPair, write_scripted

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

K = 5
SMALL = Shape(hidden=192, layers=2, heads=6, kv_heads=2, ffn=384, vocab=18035)
MEDIUM = Shape(hidden=1024, layers=4, heads=16, kv_heads=4, ffn=2816, vocab=32000)


@dataclass
class Engine:
    """An engine with its per-position counters, and the drafter's distributions where a test listens."""

    pair: ScriptedPair
    llm: Any
    rounds: list[list[int]] = field(default_factory=list)  # accepted drafts of each round, per request
    heard: list[tuple[int, float]] = field(default_factory=list)  # drafted token, its probability

    def counters(self) -> list[int]:
        values = {metric.name: metric for metric in self.llm.get_metrics()}
        accepted = values["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        return [values["vllm:spec_decode_num_drafts"].value, *accepted]

    def write(self, prompts: list[list[int]], n: int) -> list[int]:
        """Check every token, and return rounds and acceptances per position as vLLM counts them."""
        from vllm import SamplingParams

        before = self.counters()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, SamplingParams(temperature=0, max_tokens=n), use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == self.pair.expected_output(prompt, n)
        self.rounds = [output.outputs[0].spec_decode_metrics.per_step_accepted for output in outputs]
        return [after - start for start, after in zip(before, self.counters(), strict=True)]

    def expected(self, prompts: list[list[int]], n: int) -> list[int]:
        rounds = [accepted for prompt in prompts for accepted in self.pair.expected_rounds(prompt, n, K)]
        return [len(rounds), *(sum(accepted > position for accepted in rounds) for position in range(K))]

    def listen(self) -> None:
        model = (
            self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter.model
        )
        compute_logits = model.compute_logits

        def heard(hidden: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = compute_logits(hidden)
            # After a decoy every mark is set, and drafts stay wrong and unsure: hear a round up to its first error.
            marks = hidden[:, self.pair.layout.wrong : self.pair.layout.doubt]
            probability, token = logits[(marks < 0).any(-1)].float().softmax(-1).max(-1)
            self.heard.extend(zip(token.tolist(), probability.tolist(), strict=True))
            return logits

        model.compute_logits = heard


def start(pair: ScriptedPair, dtype: str, **more: Any) -> Engine:
    from vllm import LLM

    drafter = {"method": "eagle", "model": str(pair.drafter), "num_speculative_tokens": K}
    return Engine(
        pair,
        LLM(
            str(pair.target),
            speculative_config=drafter,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=32,
            disable_log_stats=False,
            per_request_spec_decode_metrics="detailed",
            **more,
        ),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    classes = [parse_class(text) for text in ("falling=0.9,0.7,0.5,0.3,0.2", "flat=0.3", "drift=0.9@60/0.2@60")]
    yield start(write_scripted(tmp_path_factory.mktemp("small") / "pair", SMALL, classes), "float32")


def hazards(counts: list[int]) -> list[float]:
    return [after / before if before else math.nan for before, after in pairwise(counts)]


def test_measured_acceptance_is_the_programmed_one(small: Engine) -> None:
    """32 prompts write the class's ring once: acceptance given reached, position by position."""
    prompts = [small.pair.prompt("falling", i, of=32) for i in range(32)]
    counts = small.write(prompts, 187)
    assert counts == small.expected(prompts, 187)
    assert hazards(counts) == pytest.approx(small.pair.expected_acceptance("falling", K), abs=0.02)


def test_classes_and_a_regime_switch_in_one_batch(small: Engine) -> None:
    names = ("falling", "flat", "drift")
    prompts = [small.pair.prompt(name, i) for i in range(10) for name in names]
    assert small.write(prompts, 120) == small.expected(prompts, 120)

    # Request by request, each round accepts what the pair's own replay says.
    written = dict(zip(map(tuple, prompts), small.rounds, strict=True))
    assert all(small.pair.expected_rounds(prompt, 120, K) == written[tuple(prompt)] for prompt in prompts)

    by_class = {name: [written[tuple(prompt)] for prompt in prompts[i::3]] for i, name in enumerate(names)}
    flat = [accepted for rounds in by_class["flat"] for accepted in rounds]
    survival = [sum(accepted >= position for accepted in flat) / len(flat) for position in range(1, K + 1)]
    assert survival == pytest.approx([0.3**position for position in range(1, K + 1)], abs=0.02)

    # The switch: 60 tokens at 0.9 take a few long rounds, the next 60 at 0.2 many short ones.
    early, late = [], []
    for rounds in by_class["drift"]:
        written_tokens = 1
        for accepted in rounds:
            (early if written_tokens + K < 60 else late).append(accepted)
            written_tokens += accepted + 1
    assert sum(accepted > 0 for accepted in early) / len(early) == pytest.approx(0.9, abs=0.04)
    assert sum(accepted > 0 for accepted in late) / len(late) < 0.35


def test_a_medium_shape_filled_by_the_load_format_in_bfloat16(tmp_path: Path) -> None:
    """Its drafts are unsure where they are wrong, and on the share of right ones that is blurred."""
    classes = [parse_class("falling=0.9,0.7,0.5,0.3,0.2"), parse_class("flat=0.7")]
    pair = write_scripted(tmp_path / "pair", MEDIUM, classes, doubt_confidence=0.35, blur=0.1, weights=False)
    assert not list(pair.path.rglob("*.safetensors"))
    loader = {"load_format": "scripted", "worker_extension_cls": "nwor_vllm.zoo.script_loader.ScriptedWorker"}
    engine = start(pair, "bfloat16", **loader)
    engine.listen()
    prompts = [pair.prompt(name, i) for i in range(8) for name in ("falling", "flat")]
    assert engine.write(prompts, 45) == engine.expected(prompts, 45)

    wrong = [confidence for token, confidence in engine.heard if token == DECOY]
    right = [confidence for token, confidence in engine.heard if token != DECOY]
    assert min(len(wrong), len(right)) > 150
    for confidences, sure in ((right, 0.9), (wrong, 0.1)):
        unsure = [confidence for confidence in confidences if confidence < 0.6]
        assert 1 - len(unsure) / len(confidences) == pytest.approx(sure, abs=0.05)
        assert unsure == pytest.approx([0.35] * len(unsure), abs=0.08)
        assert all(confidence > 0.9 for confidence in confidences if confidence >= 0.6)


def test_paths_that_are_no_scripted_pair() -> None:
    from vllm.config.load import LoadConfig

    from nwor_vllm.errors import MissingError
    from nwor_vllm.zoo import script_loader

    script_loader.register()
    loader = script_loader.ScriptedModelLoader(LoadConfig(load_format="scripted"))

    class Elsewhere:
        model = "somewhere/else"

    with pytest.raises(MissingError, match="is not the target or drafter of a scripted pair"):
        loader.load_weights(torch.nn.Linear(1, 1), Elsewhere())  # type: ignore[arg-type]
