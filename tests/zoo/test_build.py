"""Training resumes after a kill on the data it would have seen, and what it writes is a pair."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer

from nwor_vllm import zoo
from nwor_vllm.bench.cli import main
from nwor_vllm.zoo import store
from nwor_vllm.zoo.batches import batch
from nwor_vllm.zoo.build import HEAD, TARGET, load_llama
from nwor_vllm.zoo.eagle import AUX_LAYERS, Eagle1
from nwor_vllm.zoo.llama import Llama, Shape
from nwor_vllm.zoo.losses import language_loss, unrolled_loss
from nwor_vllm.zoo.training import Stage, train

SMALL = Shape(hidden=64, layers=1, ffn=64, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(zoo.path("target") / "tokenizer.json"))


def test_batches_depend_on_stage_and_step_alone(tokenizer):
    first, again, next_step = (batch(tokenizer, "target", step, rows=2, length=64)[0] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)


def test_a_stopped_training_ends_with_the_same_weights(tokenizer, tmp_path):
    def trained(checkpoint, stop_at=None):
        torch.manual_seed(0)
        model = Llama(SMALL)

        def stop(step, _):
            if step == stop_at:
                raise KeyboardInterrupt

        stage = Stage("test", 24)
        train(
            stage, model, language_loss(model), tokenizer, checkpoint, compile_loss=False, report=stop, save_every_s=0
        )
        return model.state_dict()

    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", stop_at=20)
    resumed = trained(tmp_path / "cut.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_unrolling_reproduces_a_cache_kept_token_by_token():
    """The one-pass attention against the plain recurrence: keys of the target's features, then of the head's own."""
    torch.manual_seed(0)
    head = Eagle1(HEAD)
    final, embeds = torch.randn(1, 12, 192), torch.randn(1, 16, 192)
    with torch.no_grad():
        steps = head.unroll(final, final, embeds, 3)
        for origin in (4, 9):
            # Recompute origin by origin: a causal pass over committed features followed by the head's own.
            fed = final[:, : origin + 1]
            for step in range(3):
                alone = head.unroll(fed, fed, embeds, 1)[0][:, -1]
                assert torch.allclose(alone, steps[step][:, origin], atol=1e-5)
                fed = torch.cat([fed, alone[:, None]], dim=1)


def test_the_shipped_head_still_has_the_loss_it_was_trained_to(tokenizer):
    from safetensors.torch import load_file

    target = load_llama(zoo.path("target"), TARGET)
    head, fresh = Eagle1(HEAD), Eagle1(HEAD)
    stored = {name: value.float() for name, value in load_file(zoo.path("eagle") / "model.safetensors").items()}
    head.load_state_dict({name.replace("layers.0.", "layer."): value for name, value in stored.items()})
    ids, weights = batch(tokenizer, "held out", 0, rows=2)
    with torch.no_grad():
        assert unrolled_loss(head, target)(ids, weights) < 0.5 * unrolled_loss(fresh, target)(ids, weights)
    assert AUX_LAYERS[-1] == TARGET.layers


@pytest.mark.slow
def test_a_killed_build_is_taken_up_and_completed(tmp_path, monkeypatch):
    out = tmp_path / "pair"
    command = [sys.executable, "-m", "nwor_vllm.bench.cli", "zoo", "build", "--steps", "10", "--no-compile"]
    command += ["--threads", "1", "--out", str(out)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / ".build" / "target.pt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("NWOR_ZOO", str(out))
    for member in ("target", "eagle", "eagle3", "draft"):
        assert store.path(member) == out / member
    assert not (out / ".build").exists()


def test_build_refuses_bad_numbers(tmp_path, capsys):
    assert main(["zoo", "build", "--out", str(tmp_path), "--steps", "3"]) == 2
    assert main(["zoo", "build", "--out", str(tmp_path), "--only", "eagles"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not list(tmp_path.iterdir())
