"""The twins against independent double-precision arithmetic, at scale; and the sampling twins' distributions."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from nwor_vllm.kernels import confidence, residual_sample, sample_with_confidence


@pytest.mark.parametrize("vocab", [1, 31, 32000, 128256, 151936, 262144])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_confidence_is_softmax_in_double(vocab: int, temperature: float | None) -> None:
    x = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    got = confidence(x, temperature=temperature, margin=True, entropy=True)
    p = torch.softmax(x.double() / (temperature or 1.0), dim=-1)
    top = torch.cat((p, torch.zeros(3, 1)), dim=-1).topk(2).values
    assert torch.equal(got.token, x.argmax(-1))
    torch.testing.assert_close(got.max_prob.double(), top[:, 0], rtol=2e-6, atol=0)
    torch.testing.assert_close(got.margin.double(), top[:, 0] - top[:, 1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)
    if vocab > 1:
        odds = torch.log(top[:, 0]) - torch.log1p(-top[:, 0])
        torch.testing.assert_close(got.log_odds.double(), odds, rtol=1e-5, atol=1e-5)
    else:
        assert got.log_odds.tolist() == [80.0] * 3


def test_log_odds_do_not_cancel_when_the_drafter_is_sure() -> None:
    x = torch.zeros(1, 3)
    for gap in (10.0, 20.0, 40.0, 70.0):
        x[0, 1] = gap
        got = confidence(x)
        assert got.log_odds.item() == pytest.approx(gap - torch.tensor(2.0).log().item(), rel=1e-6)
    assert got.max_prob.item() == 1.0  # where log(p / (1 - p)) would have been infinite


def test_sampling_follows_softmax() -> None:
    n = 200_000
    logits = torch.tensor([1.0, 0.0, -0.5, 0.7, -3.0])
    token, conf = sample_with_confidence(
        logits.expand(n, -1), torch.full((n,), 11), torch.arange(n), torch.full((n,), 0.7)
    )
    p = torch.softmax(logits.double() / 0.7, -1)
    counts = torch.bincount(token, minlength=5).numpy()
    assert chisquare(counts, (p * n).numpy()).pvalue > 1e-4
    assert chisquare(counts, (torch.softmax(logits.double() / 0.75, -1) * n).numpy()).pvalue < 1e-8
    assert conf.max_prob[0].item() == pytest.approx(p.max().item(), rel=1e-6)


def test_seeds_positions_and_streams_are_independent() -> None:
    n = 50_000
    x, one = torch.zeros(n, 4), torch.ones(n)
    arms = {
        "seed": sample_with_confidence(x, torch.arange(n), torch.zeros(n).long(), one)[0],
        "position": sample_with_confidence(x, torch.zeros(n).long(), torch.arange(n), one)[0],
        "target": sample_with_confidence(x, torch.arange(n), torch.zeros(n).long(), one, drafting=False)[0],
    }
    for token in arms.values():
        assert chisquare(torch.bincount(token, minlength=4).numpy()).pvalue > 1e-4
    pairs = torch.bincount(arms["seed"] * 4 + arms["target"], minlength=16).numpy()
    assert chisquare(pairs).pvalue > 1e-4
    assert chisquare(torch.bincount(arms["seed"] * 5, minlength=16).numpy()).pvalue < 1e-8


@pytest.mark.parametrize("siblings", [1, 3])
def test_a_chain_of_rounds_is_exact(siblings: int) -> None:
    """Whatever the drafts are, the token that comes out is distributed as the target: and is not if a round is lost."""
    n = 200_000
    gen = torch.Generator().manual_seed(siblings)
    p = torch.softmax(torch.randn(6, generator=gen, dtype=torch.float64) * 1.5, -1)
    q = torch.softmax(torch.randn(siblings, 6, generator=gen, dtype=torch.float64) * 1.5, -1)
    drawn = torch.stack([torch.multinomial(each, n, replacement=True, generator=gen) for each in q], dim=1)
    uniforms = torch.rand(n, siblings, generator=gen)
    args = (p.float().expand(n, -1), q.float().expand(n, -1, -1), torch.full((n,), 5), torch.arange(n))
    result = residual_sample(*args, candidates=drawn, uniforms=uniforms)
    assert (result.accepted >= 0).any() and (result.accepted < 0).any()
    assert chisquare(torch.bincount(result.token, minlength=6).numpy(), (p * n).numpy()).pvalue > 1e-4
    # The negative control redraws rejected rows from the target itself.
    plain = residual_sample(*args, rounds=torch.zeros(n, dtype=torch.int32))
    wrong = torch.where(result.accepted >= 0, result.token, plain.token)
    assert chisquare(torch.bincount(wrong, minlength=6).numpy(), (p * n).numpy()).pvalue < 1e-8


def test_zero_mass_draws_from_what_was_left() -> None:
    n = 100_000
    p = torch.tensor([0.5, 0.25, 0.25])
    result = residual_sample(p.expand(n, -1), p.expand(n, -1), torch.full((n,), 1), torch.arange(n))
    assert (result.mass == 0).all()
    assert chisquare(torch.bincount(result.token, minlength=3).numpy(), (p.double() * n).numpy()).pvalue > 1e-4


def test_fp8_saturates_instead_of_overflowing() -> None:
    from nwor_vllm.kernels import masked_kv_write

    cache = torch.zeros(1, 16, 1, 4).to(torch.float8_e4m3fn)
    key = torch.tensor([[[1e6, -1e6, 1.0, 0.0]]])
    one = torch.tensor([2.0])
    masked_kv_write(key, key, cache, cache.clone(), torch.tensor([2]), k_scale=one, v_scale=one)
    assert cache[0, 2, 0].float().tolist() == [448.0, -448.0, 0.5, 0.0]
