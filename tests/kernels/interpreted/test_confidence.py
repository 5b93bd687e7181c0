from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_vllm.kernels import Confidence, confidence, confidence_combine, confidence_partial

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(got: Confidence, want: Confidence) -> None:
    """Tokens exactly. fp32 sums of up to 262,144 terms in another order: 1e-5 relative."""
    assert torch.equal(got.token, want.token)
    for name in ("max_prob", "log_odds", "margin", "entropy"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def rows_of(kind: str, vocab: int, gen: torch.Generator) -> torch.Tensor:
    x = torch.randn(vocab, generator=gen) * 4
    place = int(torch.randint(0, vocab, (1,), generator=gen))
    if kind == "equal":
        x.fill_(1.5)
    elif kind == "dead":
        x.fill_(-torch.inf)
    elif kind == "one":
        x.fill_(-torch.inf)
        x[place] = 3.0
    elif kind == "saturated":
        x[place] = 60.0
    elif kind == "huge":
        x[place] = 6e4
    elif kind == "nan":
        x[place:] = torch.nan
    elif kind == "infinite":
        x[place] = torch.inf
    elif kind == "ties":
        x[torch.randint(0, vocab, (4,), generator=gen)] = 20.0
    elif kind == "holes":
        x[torch.rand(vocab, generator=gen) < 0.5] = -torch.inf
    return x


KINDS = ["plain", "equal", "dead", "one", "saturated", "huge", "nan", "infinite", "ties", "holes"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    st.sampled_from([1, 2, 7, 31, 512, 2047, 4096, 5000]),
    st.sampled_from(DTYPES),
    st.sampled_from(["dense", "padded", "offset", "transposed", "strided"]),
    st.sampled_from([None, 0.0, 0.6, 1.7]),
    st.sampled_from(["none", "shared", "each"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_equals_the_twin(
    kinds: list[str],
    vocab: int,
    dtype: torch.dtype,
    layout: str,
    temperature: float | None,
    masking: str,
    margin: bool,
    entropy: bool,
    seed: int,
) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.stack([rows_of(kind, vocab, gen) for kind in kinds]).to(dtype)
    rows = len(kinds)
    if layout == "padded":
        x = torch.nn.functional.pad(x, (0, 5), value=99.0)[:, :vocab]
    elif layout == "offset":
        x = torch.nn.functional.pad(x, (3, 0), value=99.0)[:, 3:]
    elif layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=1)[:, ::2]
    shape = {"none": None, "shared": (vocab,), "each": (rows, vocab)}[masking]
    mask = None if shape is None else torch.rand(shape, generator=gen) < 0.7
    options = {"temperature": temperature, "mask": mask, "margin": margin, "entropy": entropy}
    assert_same(confidence(x, backend="triton", **options), confidence(x, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [32000, 128256, 151936])
def test_real_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(vocab)
    kind = {torch.float32: "plain", torch.float16: "nan", torch.bfloat16: "saturated"}[dtype]
    x = rows_of(kind, vocab, gen).to(dtype)[None]
    want = confidence(x, margin=True, entropy=True)
    assert_same(confidence(x, margin=True, entropy=True, backend="triton"), want)


@pytest.mark.parametrize("places", [(4095, 4096), (2047, 2048), (0, 31999), (8, 4104), (4096, 4095 + 8192)])
def test_ties_across_blocks_go_to_the_first(places: tuple[int, int]) -> None:
    x = torch.zeros(1, 32000, dtype=torch.bfloat16)
    x[0, list(places)] = 5.0
    got = confidence(x, margin=True, backend="triton")
    assert got.token.item() == min(places)
    assert got.margin is not None and got.margin.item() == 0.0


def test_every_split_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from nwor_vllm.kernels.fused import confidence as module

    x = torch.randn(2, 20000, generator=torch.Generator().manual_seed(1)) * 5
    want = confidence(x, margin=True, entropy=True)
    for programs in (1, 4, 6, 20, 1056):
        monkeypatch.setattr(module, "programs_wanted", lambda device, n=programs: n)
        assert_same(confidence(x, margin=True, entropy=True, backend="triton"), want)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([None, 0.7]),
    st.integers(0, 10_000),
)
def test_shards_equal_the_whole(kinds: list[str], shards: int, temperature: float | None, seed: int) -> None:
    vocab = 1200
    gen = torch.Generator().manual_seed(seed)
    x = torch.stack([rows_of(kind, vocab, gen) for kind in kinds])
    width = vocab // shards
    parts = [
        confidence_partial(x[:, a : a + width], a, temperature=temperature, backend="triton")
        for a in range(0, vocab, width)
    ]
    assert parts[0].shape == (len(kinds), 5)
    options = {"temperature": temperature, "margin": True, "entropy": True}
    want = confidence(x, **options)
    assert_same(confidence_combine(parts, backend="triton", **options), want)
    assert_same(confidence_combine(parts[::-1], backend="triton", **options), want)
    assert_same(confidence_combine(parts, **options), want)


def test_fills_static_buffers_and_leaves_no_arrivals() -> None:
    from nwor_vllm.kernels import Workspace

    space = Workspace(3, "cpu")
    x = torch.randn(3, 9000)
    out = confidence(x, margin=True, backend="triton", workspace=space)
    assert confidence(x + 1, margin=True, backend="triton", out=out, workspace=space) is out
    assert_same(out, confidence(x + 1, margin=True))
    assert int(space.arrivals.abs().sum()) == 0
    with pytest.raises(ValueError, match="workspace: got 3 rows; expected at least 4 rows"):
        confidence(torch.randn(4, 9000), backend="triton", workspace=space)
