"""What the faces refuse, what they leave alone, and that the package costs nothing to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import nwor_vllm.kernels as kernels
from nwor_vllm.kernels import (
    Confidence,
    StopState,
    commit_kv,
    confidence,
    confidence_and_stop,
    confidence_combine,
    confidence_partial,
    masked_kv_write,
    residual_sample,
    sample_with_confidence,
    stop,
)

X = torch.zeros(2, 8)
I64, F32 = torch.zeros(2, dtype=torch.int64), torch.ones(2)
KV, CACHE = torch.zeros(2, 1, 4), torch.zeros(2, 16, 1, 4)
GAPS = CACHE.repeat_interleave(2, 3)[..., ::2]
STAGED = torch.zeros(1, 2, 1, 4)
SLOTS = torch.zeros(2, dtype=torch.int64)
CONF = Confidence(I64, F32, F32)
META = torch.zeros(2, 8, device="meta")

BAD: list[tuple[str, Callable[[], object]]] = [
    (r"logits: got torch\.int64; expected torch\.bfloat16 or", lambda: confidence(X.long())),
    (r"logits: got shape \(8,\); expected shape \(rows, vocab\)", lambda: confidence(X[0])),
    (r"logits: got vocab 0; expected a vocabulary of 1", lambda: confidence(X[:, :0])),
    (r"logits: got list; expected a tensor", lambda: confidence([1.0])),
    (r"device: got meta; expected cuda or cpu", lambda: confidence(META)),
    (r"temperature: got -1; expected a finite number", lambda: confidence(X, temperature=-1)),
    (r"temperature: got shape \(1,\); expected shape \(2,\)", lambda: confidence(X, temperature=torch.ones(1))),
    (r"mask: got torch\.float32; expected torch\.bool", lambda: confidence(X, mask=torch.ones(8))),
    (r"mask: got shape \(7,\); expected shape \(8,\)", lambda: confidence(X, mask=torch.ones(7).bool())),
    (r"mask: got device meta", lambda: confidence(X, mask=torch.ones(8, device="meta").bool())),
    (r"out\.margin: got None", lambda: confidence(X, margin=True, out=CONF)),
    (r"out\.token: got shape \(2,\)", lambda: confidence(X[:1], out=CONF)),
    (r"backend: got 'cuda'; expected", lambda: confidence(X, backend="cuda")),
    (r"backend: got 'triton' with CPU tensors; expected CUDA", lambda: confidence(X, backend="triton")),
    (r"vocab_start: got -1", lambda: confidence_partial(X, -1)),
    (r"partials: got shape \(2, 5\)", lambda: confidence_combine(torch.zeros(2, 5))),
    (r"partials: got torch\.float16", lambda: confidence_combine(torch.zeros(1, 2, 5).half())),
    (r"rows: got 2; expected at most the state's 1", lambda: confidence_and_stop(X, StopState.create(1, 2), 0)),
    (r"position: got 2; expected 0\.\.1", lambda: stop(CONF, StopState.create(2, 2), 2)),
    (r"position: got torch\.float32", lambda: stop(CONF, StopState.create(2, 2), torch.zeros(1))),
    (r"position: got 2 elements", lambda: stop(CONF, StopState.create(2, 2), I64)),
    (r"state\.confidence: got device meta", lambda: stop(CONF, StopState.create(2, 2, "meta"), 0)),
    (r"positions: got 0; expected 1 or more", lambda: StopState.create(2, 0)),
    (r"seeds: got torch\.float32", lambda: sample_with_confidence(X, F32, I64, F32)),
    (r"positions: got shape \(1,\)", lambda: sample_with_confidence(X, I64, I64[:1], F32)),
    (r"key: got shape \(2, 4\)", lambda: masked_kv_write(KV[:, 0], KV, CACHE, CACHE, SLOTS)),
    (r"value: got torch\.float16", lambda: masked_kv_write(KV, KV.half(), CACHE, CACHE, SLOTS)),
    (r"key_cache: got shape", lambda: masked_kv_write(KV, KV, CACHE[..., :2], CACHE, SLOTS)),
    (r"key_cache: got torch\.float16", lambda: masked_kv_write(KV, KV, CACHE.half(), CACHE, SLOTS)),
    (
        r"key_cache: got strides .* dense",
        lambda: masked_kv_write(KV, KV, CACHE.repeat_interleave(2, 3)[..., ::2], CACHE, SLOTS),
    ),
    (r"slot_mapping: got torch\.int32", lambda: masked_kv_write(KV, KV, CACHE, CACHE, SLOTS.int())),
    (r"counters: got shape \(1,\)", lambda: masked_kv_write(KV, KV, CACHE, CACHE, SLOTS, counters=SLOTS[:1])),
    (
        r"k_scale: got None; expected a one-element tensor",
        lambda: masked_kv_write(KV, KV, *[CACHE.to(torch.float8_e4m3fn)] * 2, SLOTS),
    ),
    (r"accepted: got shape \(2,\)", lambda: commit_kv(STAGED, STAGED, CACHE, CACHE, SLOTS[None], I64.int())),
    (r"staged_key: got shape \(2, 1, 4\)", lambda: commit_kv(KV, KV, CACHE, CACHE, SLOTS[None], I64.int())),
    (r"draft: got shape \(2, 7\)|draft: got shape \(2, 1, 7\)", lambda: residual_sample(X, X[:, :7], I64, I64)),
    (r"target: got strides", lambda: residual_sample(X.T.contiguous().T, X, I64, I64)),
    (r"uniforms: got only one", lambda: residual_sample(X, X, I64, I64, uniforms=X[:, :1])),
    (r"rounds: got torch\.int64", lambda: residual_sample(X, X, I64, I64, rounds=I64)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_refuses(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_batch_is_a_no_op() -> None:
    x, i, f = X[:0], I64[:0], F32[:0]
    assert confidence(x, margin=True).margin.shape == (0,)
    assert confidence_partial(x).shape == (0, 5)
    assert confidence_combine(torch.zeros(2, 0, 5)).token.shape == (0,)
    state = StopState.create(2, 2)
    stop(confidence(x), state, 0)
    confidence_and_stop(x, state, 0)
    assert state.alive.all() and state.stops.sum() == 0
    assert sample_with_confidence(x, i, i, f)[0].shape == (0,)
    cache = torch.full((2, 16, 1, 4), 7.0)
    masked_kv_write(KV[:0], KV[:0], cache, cache, SLOTS[:0])
    commit_kv(STAGED[:0], STAGED[:0], cache, cache, SLOTS[None][:0], I64[:0].int())
    assert (cache == 7).all()
    assert residual_sample(x, x, i, i).token.shape == (0,)


def test_import_is_free_and_functions_survive_their_modules() -> None:
    code = (
        "import sys, nwor_vllm.kernels as k; assert not {'torch', 'triton'} & set(sys.modules);"
        "from nwor_vllm.kernels import confidence_partial, stop, confidence;"
        "assert callable(confidence) and callable(stop) and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(kernels, name) for name in kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


@pytest.mark.vllm
def test_noise_is_vllms() -> None:
    """Token for token vLLM's own V2 sampler, run by the interpreter in a process of its own."""
    code = (
        "from nwor_vllm.plugin import v2_interpreter; v2_interpreter.enable()\n"
        "import torch\n"
        "from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample\n"
        "from nwor_vllm.kernels import sample_with_confidence\n"
        "torch.manual_seed(0); x = torch.randn(8, 5000) * 2\n"
        "seeds, pos = torch.randint(-2**62, 2**62, (8,)), torch.randint(0, 5000, (8,))\n"
        "t = torch.tensor([0., .5, .7, .9, 1, 1.2, 1.5, 2])\n"
        "for drafting in (True, False):\n"
        "    want = gumbel_sample(x, torch.arange(8), t, seeds, pos, True, drafting)\n"
        "    assert torch.equal(sample_with_confidence(x, seeds, pos, t, drafting=drafting)[0], want)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
