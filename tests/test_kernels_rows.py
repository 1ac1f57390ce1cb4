"""The row-wise kernels of an inference forward against torch: compiled on a GPU, under Triton's interpreter elsewhere."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton")

from winnow.kernels import draw, rows, torch_rows

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEV = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter computes in fp32 only
CLOSE = {"atol": 2e-2, "rtol": 2e-2} if GPU else {"atol": 2e-6, "rtol": 1e-5}


def randn(*shape, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEV, dtype or DTYPE)


def angles(tokens, dim):
    turn = torch.outer(torch.arange(tokens) * 3.0 + 1, 1e4 ** (-torch.arange(dim // 2) * 2 / dim))
    return (torch.cat((f(turn), f(turn)), -1).to(DEV, DTYPE) for f in (torch.cos, torch.sin))


def caches(heads, dim, fill=float("nan")):
    return [torch.full((4, 4, heads, dim), fill, dtype=DTYPE, device=DEV) for _ in range(2)]


@pytest.mark.parametrize(
    "heads,norm", [((4, 2, 16), True), ((9, 3, 64), False), ((16, 8, 128), True), ((2, 1, 24), True)]
)
def test_split_heads(heads, norm):
    hq, hkv, dim = heads
    qkv = randn(5, (hq + 2 * hkv) * dim + 8, seed=1)[:, : (hq + 2 * hkv) * dim]  # a row stride of its own
    norms = (randn(dim, seed=2), randn(dim, seed=3)) if norm else None
    cos, sin = angles(5, dim)
    slots = torch.tensor([3, 0, 15, 7, 8], device=DEV)
    got_cache, want_cache = caches(hkv, dim), caches(hkv, dim)
    q, k = rows.split_heads(qkv, heads, norms, 1e-6, cos, sin, slots, *got_cache, keep=True)
    want_q, want_k = torch_rows.split_heads(qkv, heads, norms, 1e-6, cos, sin, slots, *want_cache, keep=True)
    assert torch.allclose(q, want_q, **CLOSE) and torch.allclose(k, want_k, **CLOSE)
    for got, want in zip(got_cache, want_cache, strict=True):
        assert torch.equal(got.isnan(), want.isnan())  # nothing else was written
        assert torch.allclose(got.nan_to_num(), want.nan_to_num(), **CLOSE)
    assert torch.equal(got_cache[1].nan_to_num(), want_cache[1].nan_to_num())  # values are copied
    assert torch.equal(got_cache[0].view(-1, hkv, dim)[slots], k)
    alone = rows.split_heads(qkv[2:3], heads, norms, 1e-6, cos[2:3], sin[2:3], slots[2:3], *caches(hkv, dim))[0]
    assert torch.equal(alone[0], q[2])


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize(
    "shape,layout", [((4, 32, 16), "half"), ((2, 16, 8), "interleaved"), ((3, 64, 32), "half"), ((2, 16, 0), "half")]
)
def test_index_rows(shape, layout, queries):
    heads, dim, _ = shape
    proj = randn(5, heads * dim + dim + heads if queries else dim, seed=1, dtype=torch.float32)
    norm = (randn(dim, seed=2, dtype=torch.float32), randn(dim, seed=3, dtype=torch.float32), 1e-6)
    cos, sin = angles(5, 64)
    slots = torch.tensor([3, 0, 15, 7, 8], device=DEV)
    got_cache, want_cache = (torch.full((4, 4, dim), float("nan"), dtype=DTYPE, device=DEV) for _ in range(2))
    got = rows.index_rows(proj, shape, norm, cos, sin, layout, slots, got_cache, queries, keep=True)
    want = torch_rows.index_rows(proj, shape, norm, cos, sin, layout, slots, want_cache, queries, keep=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, **CLOSE))
    assert torch.equal(got_cache.isnan(), want_cache.isnan())
    assert torch.equal(got_cache.view(-1, dim)[slots], got[1])
    pieces = torch.stack([2 * proj, -proj, proj, -proj])  # sums without rounding
    summed = rows.index_rows(pieces, shape, norm, cos, sin, layout, slots, got_cache, queries, keep=True)
    assert all(one is None or torch.equal(one, other) for one, other in zip(summed, got, strict=True))


def test_silu_mul():
    x = randn(3, 2600, seed=1)
    assert torch.allclose(rows.silu_mul(x), torch_rows.silu_mul(x), **CLOSE)
    assert torch.equal(rows.silu_mul(x[1:2]), rows.silu_mul(x)[1:2])


def test_drawing_inverts_the_cumulative_distribution():
    vocab, repeats = 2 * draw.BLOCK + 77, 6
    logits = randn(repeats, vocab, seed=1, dtype=torch.float32) * 2
    logits[:, 100:300] = -torch.inf
    logits[1, :] = -torch.inf
    logits[1, 5000] = 3.0  # one token has all of the mass
    logits[3, 17] = logits[3, 8200] = 50.0  # a tie, in two pieces
    temperature = torch.tensor([0.7, 1.0, 1.3, 0.0, 1.0, 1.0], device=DEV)
    uniform = torch.tensor([0.3, 0.999, 0.75, 0.5, 0.0, 1 - 2**-53], dtype=torch.float64, device=DEV)
    tokens, logprobs, bad = draw.draw(logits, temperature, uniform)
    assert int(bad) == 0
    warm = torch.where(temperature > 0, temperature, 1.0).double()
    p = torch.softmax(logits.double() / warm[:, None], 1)
    upto = p.cumsum(1)
    for row, token in enumerate(tokens.tolist()):
        if row == 3:
            assert token == 17
        else:
            target = float(uniform[row])
            assert float(upto[row, token]) > target - 1e-6
            assert token == 0 or float(upto[row, token - 1]) <= target + 1e-6
        assert float(p[row, token]) > 0
        assert abs(float(logprobs[row]) - float(p[row, token].log())) < 1e-5
    assert tokens[1] == 5000 and torch.isfinite(logits[4, tokens[4]])
    again = draw.draw(logits[2:3], temperature[2:3], uniform[2:3])
    assert torch.equal(again[0], tokens[2:3]) and torch.equal(again[1], logprobs[2:3])
    nowhere = torch.full((6, 9), -torch.inf, device=DEV)
    broken = [logits.clone(), logits.clone(), torch.full_like(logits, torch.nan), nowhere]
    broken[0][2:4, 4100], broken[1][2:4, 4100] = torch.nan, torch.inf
    for values in broken:
        tokens, logprobs, bad = draw.draw(values, temperature, uniform)
        assert int(bad) == 1 and 0 <= int(tokens.min()) <= int(tokens.max()) < values.shape[1], (
            "the next step reads them"
        )
        torch_rows.draw(values, temperature, uniform, tokens, logprobs, bad.zero_())
        assert int(bad) == 1 and 0 <= int(tokens.min()) <= int(tokens.max()) < values.shape[1]
