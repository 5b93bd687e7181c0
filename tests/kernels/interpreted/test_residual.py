from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from nwor_vllm.kernels import residual_sample


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 31, 1024, 3001]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["all", "some", "candidates", "both"]),
    st.sampled_from(["random", "same", "covered", "nan", "empty"]),
    st.integers(0, 10_000),
)
def test_equals_the_twin(
    rows: int, rounds: int, vocab: int, dtype: torch.dtype, mode: str, kind: str, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(rows, vocab, generator=gen) * 2, -1).to(dtype)
    q = torch.softmax(torch.randn(rows, rounds, vocab, generator=gen) * 2, -1).to(dtype)
    if kind == "same":
        q[0, 0] = p[0]
    elif kind == "covered":
        q[0] = p[0] * 1.25
    elif kind == "nan":
        p[0, vocab // 2] = torch.nan
        q[-1, 0, 0] = torch.nan
    elif kind == "empty":
        p[0] = 0
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=gen)
    positions = torch.randint(0, 10_000, (rows,), generator=gen)
    options: dict[str, torch.Tensor] = {}
    if mode in ("some", "both"):
        options["rounds"] = torch.randint(0, rounds + 1, (rows,), generator=gen, dtype=torch.int32)
    if mode in ("candidates", "both"):
        options["candidates"] = torch.randint(0, vocab, (rows, rounds), generator=gen)
        options["uniforms"] = torch.rand(rows, rounds, generator=gen)
    got = residual_sample(p, q, seeds, positions, backend="triton", **options)
    want = residual_sample(p, q, seeds, positions, **options)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.accepted, want.accepted)
    torch.testing.assert_close(got.mass, want.mass, equal_nan=True, rtol=1e-5, atol=1e-6)
    if kind == "empty" and vocab > 1 and "candidates" not in options:
        assert got.token[0].item() == -1
    if kind in ("same", "covered") and mode == "all" and rounds == 1:
        assert got.mass[0, 0].item() == 0.0
        assert p[0, got.token[0]] > 0


def test_a_real_vocabulary() -> None:
    gen = torch.Generator().manual_seed(5)
    p, q = (torch.softmax(torch.randn(1, 128256, generator=gen) * 2, -1) for _ in range(2))
    one = torch.tensor([5])
    assert torch.equal(residual_sample(p, q, one, one, backend="triton").token, residual_sample(p, q, one, one).token)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_kernel_draws_from_the_residual(rounds: int) -> None:
    n = 150
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.1, 0.2, 0.1]], dtype=torch.float64)[:rounds]
    want = p
    for each in q:
        want = (want - each).clamp_min(0)
        want = want / want.sum()
    token = residual_sample(
        p.float().repeat(n, 1),
        q.float().repeat(n, 1, 1),
        torch.full((n,), 3),
        torch.arange(n),
        backend="triton",
    ).token
    counts = torch.bincount(token, minlength=4).double()
    assert int(counts[want == 0].sum()) == 0
    kept = want > 0
    if int(kept.sum()) > 1:
        assert chisquare(counts[kept].numpy(), (want[kept] * n).numpy()).pvalue > 1e-4
    # The negative control: they are not draws from the target.
    assert chisquare(counts.numpy(), (p * n).numpy()).pvalue < 1e-6
