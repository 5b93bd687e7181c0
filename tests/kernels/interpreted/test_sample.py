from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from nwor_vllm.kernels import confidence, sample_with_confidence


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 31, 4096, 5003]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_equals_the_twin(rows: int, vocab: int, dtype: torch.dtype, drafting: bool, masked: bool, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, vocab, generator=gen) * 3).to(dtype)
    if rows > 2:
        x[1, vocab // 2] = torch.nan
        x[2] = -torch.inf
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=gen)
    positions = torch.randint(0, 1 << 20, (rows,), generator=gen)
    temperature = torch.tensor([0.8, 0.0, 1.0, 1.9])[:rows]
    mask = torch.rand(vocab, generator=gen) < 0.7 if masked else None
    options = {"mask": mask, "drafting": drafting, "margin": True, "entropy": True}
    token, conf = sample_with_confidence(x, seeds, positions, temperature, backend="triton", **options)
    want, want_conf = sample_with_confidence(x, seeds, positions, temperature, **options)
    assert torch.equal(token, want)
    assert torch.equal(conf.token, want_conf.token)
    for name in ("max_prob", "log_odds", "margin", "entropy"):
        torch.testing.assert_close(getattr(conf, name), getattr(want_conf, name), rtol=1e-5, atol=2e-6, equal_nan=True)
    alone = confidence(x, temperature=temperature, mask=mask)
    assert torch.equal(conf.token, alone.token)


@pytest.mark.parametrize("vocab", [32000, 128256, 151936])
def test_real_vocabularies(vocab: int) -> None:
    x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab))
    one = torch.tensor([vocab])
    temperature = torch.tensor([0.9])
    token, _ = sample_with_confidence(x, one, one, temperature, backend="triton")
    want, _ = sample_with_confidence(x, one, one, temperature)
    assert torch.equal(token, want)


def test_the_kernel_samples_the_distribution() -> None:
    n = 250
    logits = torch.tensor([1.0, 0.0, -0.5, 0.7, 0.2])
    temperature = torch.full((n,), 0.8)
    token, _ = sample_with_confidence(
        logits.repeat(n, 1), torch.full((n,), 7), torch.arange(n), temperature, backend="triton"
    )
    counts = torch.bincount(token, minlength=5).numpy()
    assert chisquare(counts, torch.softmax(logits.double() / 0.8, -1).numpy() * n).pvalue > 1e-4
    # The negative control: the same draws are not those of another temperature.
    assert chisquare(counts, torch.softmax(logits.double() / 2.5, -1).numpy() * n).pvalue < 1e-6
