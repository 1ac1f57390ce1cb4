"""The Triton decode kernels against their float64 references: compiled on a GPU, under Triton's interpreter elsewhere."""

import os
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
triton = pytest.importorskip("triton")

from winnow.kernels import gpu_ops, invariant, ops, torch_attention, torch_indexer  # noqa: E402
from winnow.kernels import reference_decode as ref  # noqa: E402
from winnow.kernels.decode_select import select_decode, select_workspace  # noqa: E402
from winnow.kernels.gqa_decode import gqa_decode, gqa_decode_workspace  # noqa: E402
from winnow.kernels.indexer_logits import indexer_logits_decode, indexer_logits_prefill  # noqa: E402
from winnow.kernels.invariant import linear, linear_plan, rms_norm, softmax  # noqa: E402
from winnow.kernels.mla_decode import mla_decode  # noqa: E402
from winnow.kernels.packing import known  # noqa: E402
from winnow.kernels.quant import quantise_query, write_index_keys, write_mla  # noqa: E402
from winnow.kernels.selection import Selection  # noqa: E402
from winnow.kernels.topk import topk  # noqa: E402
from winnow.kernels.topk_rows import topk_rows  # noqa: E402

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEV = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter computes in fp32 only
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
REPEATS = 20 if GPU else 2


def seeded(seed):
    return torch.Generator(device=DEV).manual_seed(seed)


def randn(*shape, seed=0, dtype=None):
    return torch.randn(*shape, generator=seeded(seed), device=DEV, dtype=torch.float32).to(dtype or DTYPE)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEV)


def pages_for(lengths, page, seed=0):
    """A shuffled block table for sequences of these lengths, and the number of pages."""
    need = [-(-max(n, 1) // page) for n in lengths]
    order = torch.randperm(sum(need) + 2, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lengths), max(need)), -(2**30), dtype=torch.int32)  # an entry nobody may touch
    for b, n in enumerate(need):
        table[b, :n] = order[sum(need[:b]) : sum(need[:b]) + n]
    return table.to(DEV), len(order)


def poison(cache, table, lengths, keep):
    """NaN in every row of the cache that no sequence selected. keep: per sequence the positions that stay."""
    mask = torch.ones(cache.shape[:2], dtype=torch.bool, device=DEV)
    page = cache.shape[1]
    for b, positions in enumerate(keep):
        for p in positions:
            if 0 <= p < lengths[b]:
                mask[int(table[b, p // page]), p % page] = False
    cache[mask] = float("nan") if cache.is_floating_point() else 0xFF
    return cache


def selections(lengths, k, seed=0, hostile=True):
    """Random ascending sets with a -1 tail; hostile: sentinels beyond every bound and duplicates in the first row."""
    indices = torch.full((len(lengths), k), -1, dtype=torch.int32)
    for b, n in enumerate(lengths):
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed + b))[:k].sort().values
        indices[b, : len(chosen)] = chosen.int()
    counts = (indices >= 0).sum(1).int()
    if hostile and k >= 8:
        indices[0, 1:6] = torch.tensor([-1, lengths[0], INT_MIN, INT_MAX, int(indices[0, 0])], dtype=torch.int32)
        counts[0] = max(int(counts[0]), 6)
    return indices.to(DEV), counts.to(DEV)


def close(got, want, lse_atol=2e-5):
    """Tolerances: output abs 8e-4 or rel 3/128, cosine distance 7e-6; prints where it fails."""
    out, out_ref = got[0].double(), want[0]
    bad = ~((out - out_ref).abs() <= 8e-4 + 3 / 128 * out_ref.abs())
    assert not bad.any(), (
        f"{int(bad.sum())} outputs differ, first at {bad.nonzero()[0].tolist()}: {out[bad][0]} for {out_ref[bad][0]}"
    )
    if out_ref.abs().sum() > 0:
        cosine = 1 - 2 * (out * out_ref).sum() / (out.square().sum() + out_ref.square().sum())
        assert cosine < 7e-6, f"cosine distance {float(cosine)}"
    empty = want[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, empty) and (out[empty] == 0).all()
    assert torch.allclose(got[1].double()[~empty], want[1][~empty], rtol=2 / 65536, atol=lse_atol)


GQA_CASES = [  # heads, kv heads, dim, page, lengths, k, split
    (8, 2, 64, 16, [40, 1, 100], 24, 16),
    (6, 2, 32, 61, [70, 0, 23], 24, 16),
    (5, 1, 80, 64, [65, 24, 25], 24, 32),
    (4, 4, 128, 69, [23, 70], 16, 16),
    (2, 1, 8, 64, [9], 4, 16),  # narrower than a tile of a product may be
]


def gqa_case(heads, kv, dim, page, lengths, k, seed=0):
    table, pages = pages_for(lengths, page, seed)
    k_cache, v_cache = randn(pages, page, kv, dim, seed=seed + 1), randn(pages, page, kv, dim, seed=seed + 2) / 10
    indices, counts = selections(lengths, k, seed)
    clean = (k_cache.clone(), v_cache.clone())
    for cache in (k_cache, v_cache):
        poison(cache, table, lengths, indices.tolist())
    return (
        randn(len(lengths), heads, dim, seed=seed + 3),
        k_cache,
        v_cache,
        table,
        ints(lengths),
        indices,
        counts,
        clean,
    )


@pytest.mark.parametrize("heads,kv,dim,page,lengths,k,split", GQA_CASES)
def test_gqa_decode(heads, kv, dim, page, lengths, k, split):
    q, k_cache, v_cache, table, lens, indices, counts, clean = gqa_case(heads, kv, dim, page, lengths, k)
    options = {"split": split, "block_n": 16}
    got = gqa_decode(q, k_cache, v_cache, table, lens, indices, counts, **options)
    close(got, ref.gqa_decode(q, k_cache.nan_to_num(), v_cache.nan_to_num(), table, lens, indices, counts))
    close(
        gqa_decode(q, k_cache, v_cache, table, lens, indices, counts),
        ref.gqa_decode(q, *clean, table, lens, indices, counts),
    )
    sink = randn(heads, seed=9, dtype=torch.float32)
    close(
        gqa_decode(q, k_cache, v_cache, table, lens, indices, counts, sink=sink, scale=0.2, **options),
        ref.gqa_decode(q, k_cache.nan_to_num(), v_cache.nan_to_num(), table, lens, indices, counts, 0.2, sink),
    )
    if kv == 4:  # neighbouring kv heads joined in one program: the same bits
        joined = gqa_decode(q, k_cache, v_cache, table, lens, indices, counts, join=2, **options)
        assert torch.equal(joined[0], got[0]) if GPU else torch.allclose(joined[0], got[0], atol=1e-6)
    dense = gqa_decode(q, *clean, table, lens, **options)
    close(dense, ref.gqa_decode(q, *clean, table, lens))
    for _ in range(REPEATS):
        again = gqa_decode(q, k_cache, v_cache, table, lens, indices, counts, **options)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    for b in range(len(lengths)):  # the same row alone
        one = slice(b, b + 1)
        alone = gqa_decode(q[one], k_cache, v_cache, table[one], lens[one], indices[one], counts[one], **options)
        assert torch.equal(got[0][one], alone[0]) and torch.equal(got[1][one], alone[1])


MLA_CASES = [(20, 64, [33, 0, 90], 24), (16, 61, [24, 23], 24), (3, 69, [70], 16)]
HOPPER_CASES = [
    (128, 64, [700, 0, 90, 299], 300),
    (100, 61, [400, 1], 128),
    (64, 16, [5000] * 9, 2048),
]  # 33 heads and more


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads,page,lengths,k", MLA_CASES + (HOPPER_CASES if GPU else []))
def test_mla_decode(heads, page, lengths, k, fp8):
    table, pages = pages_for(lengths, page)
    latent, rope = randn(pages * page, 512, seed=1) / 10, randn(pages * page, 64, seed=2) / 10
    cache = ref.mla_cache(latent, rope, page) if fp8 else torch.cat([latent, rope], 1).reshape(pages, page, 576)
    clean, q = cache.clone(), randn(len(lengths), heads, 576, seed=3)
    indices, counts = selections(lengths, k)
    poison(cache, table, lengths, indices.tolist())
    lens, sink = ints(lengths), randn(heads, seed=4, dtype=torch.float32)
    options = {"splits": 2, "block_h": 16, "block_n": 16, "num_warps": 4, "num_stages": 2} if not GPU else {"splits": 2}
    loose = 3e-3 if fp8 and heads > 32 else 2e-5  # the SM90 kernel rounds an fp8 value times its scale to bf16
    got = mla_decode(q, cache, table, lens, indices, counts, **options)
    close(got, ref.mla_decode(q, clean, table, lens, indices, counts), loose)
    close(
        mla_decode(q, cache, table, lens, indices, counts, sink=sink, scale=0.1, **options | {"splits": 1}),
        ref.mla_decode(q, clean, table, lens, indices, counts, 0.1, sink),
        loose,
    )
    for _ in range(REPEATS - 1):
        again = mla_decode(q, cache, table, lens, indices, counts, **options)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    alone = mla_decode(q[-1:], cache, table[-1:], lens[-1:], indices[-1:], counts[-1:], **options)
    assert torch.equal(got[0][-1:], alone[0])
    if GPU:  # the plan that follows the batch
        close(
            mla_decode(q, cache, table, lens, indices, counts),
            ref.mla_decode(q, clean, table, lens, indices, counts),
            loose,
        )
        close(mla_decode(q, clean, table, lens), ref.mla_decode(q, clean, table, lens), loose)


def rows_of(kind, width, seed):
    scores = randn(1, width, seed=seed, dtype=torch.float32)[0]
    if kind == "plateau":  # what ReLU gives: exact zeros of both signs
        scores = torch.where(scores < 0.8, torch.where(scores < 0, -0.0, 0.0).to(DEV), scores)
    elif kind == "below":  # a plateau with most scores below it
        scores = torch.where(scores.abs() < 0.5, torch.where(scores < 0, -0.0, 0.0).to(DEV), -scores.abs())
    elif kind == "zeros":
        scores = torch.zeros_like(scores)
    elif kind == "sorted":
        scores = scores.sort().values
    elif kind == "coarse":
        scores = (scores * 4).round() / 4
    elif kind == "infinite":
        scores = torch.where(scores > 1, torch.inf, torch.where(scores < 0, -torch.inf, scores))
    return scores


KINDS = ["random", "plateau", "below", "zeros", "sorted", "coarse", "infinite"]


@pytest.mark.parametrize(
    "width,k", [(300, 32), (8892, 64)] + ([(16384, 2048), (131072, 2048), (40000, 512)] if GPU else [])
)
def test_topk(width, k):
    kinds = KINDS if GPU or width < 1000 else KINDS[:3]
    scores = torch.stack([rows_of(kind, width, seed) for seed, kind in enumerate(kinds)])
    for lengths in [[width] * len(kinds), [0, 1, k - 1, k, k + 1, width - 1, width // 2][: len(kinds)]]:
        poisoned = scores.clone()
        for r, n in enumerate(lengths):
            poisoned[r, n:] = float("nan")  # beyond the length nothing is read
        got = topk(poisoned, ints(lengths), k)
        want = ref.topk(scores, ints(lengths), k)
        assert torch.equal(got[1], want[1])
        for r in range(len(kinds)):
            assert torch.equal(got[0][r], want[0][r]), f"row {r} ({kinds[r]}, length {lengths[r]})"
    for _ in range(REPEATS - 1):
        assert torch.equal(topk(poisoned, ints(lengths), k)[0], got[0])
    for r in range(len(kinds)) if GPU else [1]:
        assert torch.equal(topk(poisoned[r : r + 1], ints(lengths[r : r + 1]), k)[0], got[0][r : r + 1])


@pytest.mark.parametrize(
    "width,k",
    [(300, 1), (300, 299), (300, 32), (1501, 40), (8892, 64)]
    + ([(16384, 2048), (131072, 2048), (40003, 512)] if GPU else []),
)
def test_topk_of_many_rows(width, k):
    kinds = KINDS if GPU or width < 2000 else KINDS[:3]
    scores = torch.stack([rows_of(kind, width, seed) for seed, kind in enumerate(kinds)])
    some = [k + 1, k + 2, 64, 65, width - 3, width // 32 * 32, width // 32 * 32 - 1]
    for lengths in [[width] * len(kinds), [0, 1, k - 1, k, k + 1, width - 1, width // 2], some]:
        lengths = lengths[: len(kinds)]
        poisoned = scores.clone()
        for r, n in enumerate(lengths):
            poisoned[r, n:] = float("nan")
        want = ref.topk(scores, ints(lengths), k)
        out, counts, bad = (
            torch.full((len(kinds), k), -7, dtype=torch.int32, device=DEV),
            ints([-7] * len(kinds)),
            ints([0]),
        )
        topk_rows(poisoned, ints(lengths), k, out, counts, bad)
        assert int(bad) == 0 and torch.equal(counts, want[1])
        for r in range(len(kinds)):
            assert torch.equal(out[r], want[0][r]), f"row {r} ({kinds[r]}, length {lengths[r]})"


@pytest.mark.parametrize("place", [0, 31, 299])
def test_topk_of_many_rows_reports_nan(place):
    scores = torch.stack([rows_of("random", 300, seed) for seed in range(3)])
    scores[1, place] = float("nan")
    for k in (16, 400):
        out, counts, bad = torch.empty(3, k, dtype=torch.int32, device=DEV), ints([0] * 3), ints([0])
        topk_rows(scores, ints([300] * 3), k, out, counts, bad)
        assert int(bad) == 1
        assert torch.equal(out[0], ref.topk(scores[:1], ints([300]), k)[0][0])  # other rows have their sets
    scores[1] = float("nan")
    out.fill_(-7)
    topk_rows(scores, ints([300] * 3), 400, out, counts, bad)
    topk_rows(scores, ints([300] * 3), 16, out[:, :16], counts, bad)
    assert bool((out[1, :16] == -1).all()), "who reads the sets before the flag must find none, or a position"


def test_topk_of_nothing():
    got, counts = topk(torch.zeros(64, 0, device=DEV), torch.zeros(64, dtype=torch.int32, device=DEV), 3)
    assert bool((got == -1).all()) and bool((counts == 0).all())


def test_topk_refuses_nan():
    scores = rows_of("random", 300, 0)[None].clone()
    scores[0, 17] = float("nan")
    for k in (16, 400):  # a row that needs no choice is looked at too
        with pytest.raises(ValueError, match="NaN"):
            topk(scores, ints([300]), k)
    assert int(topk(scores[:, 20:], ints([280]), 16)[1]) == 16  # the flag was taken back


INDEXER_CASES = [
    (4, 32, 16, [40, 0, 129]),
    (5, 64, 61, [70, 1]),
    (16, 64, 16, [130, 7]),
    (32, 128, 64, [130]),
    (64, 128, 69, [70]),
]
WIDE_CASES = [(4, 32, 16, [4096]), (8, 128, 61, [5001]), (16, 64, 64, [9000])]  # those of the SM90 kernel


def index_case(heads, dim, page, lengths, fp8, seed=0):
    table, pages = pages_for(lengths, page, seed)
    keys = randn(pages * page, dim, seed=seed + 1)
    q, w = (
        randn(len(lengths), heads, dim, seed=seed + 2),
        randn(len(lengths), heads, seed=seed + 3, dtype=torch.float32),
    )
    if not fp8:
        return q, keys.reshape(pages, page, dim), w, table, (q, keys.reshape(pages, page, dim), w)
    values, scale = ref.quantise(q, dim)
    cache, w = ref.index_cache(keys, page), w * scale[..., 0]
    return values, cache, w, table, (values.float(), ref.dequantise_index(cache, dim), w)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads,dim,page,lengths", INDEXER_CASES + (WIDE_CASES if GPU else []))
def test_indexer_logits(heads, dim, page, lengths, fp8):
    q, cache, w, table, exact = index_case(heads, dim, page, lengths, fp8)
    got = indexer_logits_decode(q, cache, w, table, ints(lengths), chunk=128)
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        want = ref.indexer_logits(exact[0][b : b + 1], ref.gather_pages(exact[1], table[b], n), exact[2][b : b + 1])[0]
        ours = got[b, :n].double()
        assert 1 - 2 * (ours * want).sum() / (ours.square().sum() + want.square().sum()) < 5e-6
        prefill = indexer_logits_prefill(q[b : b + 1], cache, w[b : b + 1], table[b], n)
        assert torch.equal(prefill[0], got[b, :n]), "prefill and decode differ"
    if not GPU:
        return
    many = indexer_logits_prefill(
        q[:1].expand(70, -1, -1), cache, w[:1].expand(70, -1), table[0], lengths[0], ends=ints([lengths[0]] * 70)
    )
    assert torch.equal(many, got[:1, : lengths[0]].expand(70, -1))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "heads,dim,grouped",
    [(4, 32, None), (8, 64, None), (16, 64, None), (16, 64, 4)] + ([(16, 128, None), (64, 128, None)] if GPU else []),
)
def test_prefill_gives_the_bits_of_decode(heads, dim, grouped, given):
    """NaN, zeros of both signs, ends inside a tile and before it, a partial last tile and a partial last group of queries."""
    keys, tokens = (200, 11) if not GPU else (5003, 131)
    q, cache, w, table, _ = index_case(heads, dim, 16, [keys], False)
    q, w = randn(tokens, heads, dim, seed=4), randn(tokens, heads, seed=5, dtype=torch.float32)
    w[1] = -w[1].abs()  # no score above 0, and -0 where a key is 0
    w[2] = float("-inf")
    for spot, value in ((3, 0.0), (77, 0.0), (130, float("nan"))):
        cache[int(table[0, spot // 16]), spot % 16] = value
    ends = ints([(t * 37) % (keys + 9) for t in range(tokens)])
    ends[4:8] = 40  # a product whose queries end before the second tile of a program that others need
    want = indexer_logits_decode(q, cache, w, table[:1].expand(tokens, -1), ints([keys] * tokens), max_len=keys)
    options = {"grouped": grouped} | ({"block_n": 64} if grouped else {})
    for queries in (4, 128):
        width = keys + 5
        out = torch.full((tokens, width), 7.0, device=DEV)
        indexer_logits_prefill(q, cache, w, table[0], keys, ends if given else None, out, queries=queries, **options)
        seen = torch.arange(keys, device=DEV) < (ends[:, None] if given else keys)
        got, wanted = out[:, :keys].contiguous().view(torch.int32), want[:, :keys].contiguous().view(torch.int32)
        same = (got == wanted) | (out[:, :keys].isnan() & want[:, :keys].isnan())
        if grouped and not GPU:  # BLAS's bits depend on how many columns a product has
            same |= torch.isclose(out[:, :keys], want[:, :keys], rtol=1e-5, atol=1e-5)
        assert bool((same | ~seen).all()) and bool((out[:, keys:] == 7).all())


@pytest.mark.parametrize("fp8", [False, True])
def test_select_decode(fp8):
    lengths = [300, 15, 16, 17, 0] if not GPU else [9000, 31, 32, 33, 0, 20000]
    k = 16 if not GPU else 32
    q, cache, w, table, _ = index_case(4, 32, 16, lengths, fp8)
    scores = indexer_logits_decode(q, cache, w, table, ints(lengths), chunk=256)
    want = ref.topk(scores, ints(lengths), k)
    got = select_decode(q, cache, w, table, ints(lengths), k, max(lengths))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    one = select_decode(q[:1], cache, w[:1], table[:1], ints(lengths[:1]), k, max(lengths))
    assert torch.equal(one[0], got[0][:1])


def test_quantised_writes():
    x = torch.cat(
        [
            randn(30, 64, seed=1, dtype=torch.float32) * 10 ** randn(30, 1, seed=2, dtype=torch.float32),
            torch.zeros(2, 64, device=DEV),
        ]
    )
    page = 5
    cache = torch.zeros(7, page * 68, dtype=torch.uint8, device=DEV)
    slots = torch.arange(32, device=DEV) + 3
    slots[4] = -1
    write_index_keys(x, slots, cache)
    values = cache[:, : page * 64].reshape(-1, 64)[3:35]
    want, scale = ref.quantise(x, 64)
    keep = [i for i in range(32) if i != 4]
    assert (values[4] == 0).all() and torch.equal(values[keep], want.view(torch.uint8)[keep])
    scales = cache[:, page * 64 :].contiguous().view(torch.float32).reshape(-1)[3:35]
    assert torch.equal(scales[keep], scale[keep, 0])
    q8, w = quantise_query(x.reshape(8, 4, 64), torch.ones(8, 4, device=DEV))
    assert torch.equal(q8.view(torch.uint8).reshape(32, 64), want.view(torch.uint8)) and torch.equal(
        w.reshape(-1), scale[:, 0]
    )
    latent, rope = randn(6, 512, seed=3), randn(6, 64, seed=4, dtype=torch.bfloat16)
    mla = torch.zeros(2, 4, 656, dtype=torch.uint8, device=DEV)
    write_mla(latent, rope, torch.arange(6, device=DEV), mla)
    assert torch.equal(mla.reshape(8, 656)[:6], ref.mla_cache(latent, rope, 6)[0])


def test_encoder_on_every_step():
    """Every e4m3 value, the midpoints between neighbours and what lies just beside them."""
    grid = torch.arange(256, dtype=torch.uint8, device=DEV).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middle, middle * (1 + 1e-6), middle * (1 - 1e-6)])
    x = torch.cat([x, torch.zeros(-len(x) % 15, device=DEV)]).reshape(-1, 15)
    x = torch.cat([x, torch.full((len(x), 1), 448.0, device=DEV)], 1)  # scale exactly 1
    cache = torch.zeros(1, len(x) * 20, dtype=torch.uint8, device=DEV)
    write_index_keys(x, torch.arange(len(x), device=DEV), cache)
    assert torch.equal(cache[0, : len(x) * 16].reshape(-1, 16), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("n,k", [(80, 100), (130, 256)] + ([(2048, 2048), (2048, 6144), (12288, 2048)] if GPU else []))
def test_linear_is_batch_invariant(n, k):
    x, weight, bias = randn(70, k, seed=1), randn(n, k, seed=2), randn(n, seed=3)
    options = {"plan": (16, 2), "block_k": 32} if not GPU and n > 100 else {}
    whole = linear(x, weight, bias, **options)
    want = x.double() @ weight.double().T + bias.double()
    assert (
        (whole.double() - want).abs() <= (1e-4 if torch.float32 == DTYPE else 0.02) * want.abs().clamp_min(k**0.5)
    ).all()
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70)):
        part = linear(x[rows], weight, bias, **options)
        assert (
            torch.equal(part, whole[rows]) if GPU else torch.allclose(part, whole[rows], atol=1e-4)
        )  # the interpreter's dot is BLAS


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_cut_products_of_fp32_share_their_counters(precision, request):
    """The indexer's products of an exact pass: inner dimension in pieces, one array of counters for all, left as it was found."""
    settings = torch.backends.cuda.matmul
    request.addfinalizer(partial(setattr, settings, "fp32_precision", settings.fp32_precision))
    settings.fp32_precision = precision
    x, scratch = randn(37, 1024, seed=1, dtype=torch.float32), {}
    for n in (80, 33):
        weight = randn(n, 1024, seed=n, dtype=torch.float32)
        assert linear_plan(n, 1024, 4)[1] == 8
        whole = gpu_ops.linear(x, weight, None, scratch)
        [counters] = scratch.values()
        assert not counters.any() and torch.equal(whole, gpu_ops.linear(x, weight, None))
        want = x.double() @ weight.double().T
        assert ((whole.double() - want).abs() <= (1e-4 if precision == "ieee" or not GPU else 0.05) * 1024**0.5).all()
        for rows in (slice(0, 1), slice(5, 22)):
            part = gpu_ops.linear(x[rows], weight, None, scratch)
            assert torch.equal(part, whole[rows]) if GPU else torch.allclose(part, whole[rows], atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 70])
def test_who_adds_up_the_pieces_changes_no_bits(tokens, monkeypatch):
    x, weight = randn(tokens, 520, seed=1, dtype=torch.float32), randn(80, 520, seed=2, dtype=torch.float32)
    weight[33] = -0.0
    parts = invariant.linear_parts(x, weight)
    assert parts.shape == (4, tokens, 80), "the last piece is shorter: 520 columns are four of 160"
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    last = linear(x, weight)
    monkeypatch.setattr(invariant, "FULL", 1)
    here = linear(x, weight)
    assert torch.equal(last, total) and torch.equal(here, total) and not torch.signbit(here[:, 33]).any()
    assert (total.double() - x.double() @ weight.double().T).abs().max() < 1e-3
    assert invariant.linear_parts(x[:0], weight).shape == (4, 0, 80)


def test_norm_and_softmax():
    x, weight, residual = randn(5, 300, seed=1), randn(300, seed=2), randn(5, 300, seed=3)
    total = (x.float() + residual.float()).to(DTYPE)
    carried = residual.clone()
    got = rms_norm(x, weight, 1e-6, carried)
    want = total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert torch.equal(carried, total)
    assert torch.allclose(got.double(), want, rtol=1e-5 if not GPU else 0.02, atol=1e-5 if not GPU else 0.02)
    assert torch.equal(rms_norm(x[2:3], weight, 1e-6), rms_norm(x, weight, 1e-6)[2:3])
    wide = torch.full((5, 300), float("nan"), device=DEV)
    assert torch.equal(rms_norm(x, weight, 1e-6, residual.clone(), wide), got) and torch.equal(wide, got.float())
    wide = randn(3, 5000, seed=4, dtype=torch.float32)
    wide[1, 7] = -torch.inf
    assert torch.allclose(softmax(wide), torch.softmax(wide, -1), atol=1e-6)
    assert torch.allclose(softmax(wide, log=True), torch.log_softmax(wide, -1), atol=1e-5)
    assert torch.equal(softmax(wide[1:2]), softmax(wide)[1:2])


@pytest.mark.skipif(not GPU, reason="too many programs and bytes for the interpreter")
def test_many_queries_and_far_pages():
    batch, k, page = 70_000, 16, 64
    pages = 2**31 // (page * 128) + 8  # the last pages lie beyond 2^31 elements
    k_cache, v_cache = (torch.empty(pages, page, 1, 128, dtype=DTYPE, device=DEV) for _ in range(2))
    k_cache[-4:], v_cache[-4:] = randn(4, page, 1, 128, seed=1), randn(4, page, 1, 128, seed=2) / 10
    table = ints([[pages - 1, pages - 4, pages - 2, pages - 3]]).expand(batch, 4).contiguous()
    lens, (indices, counts) = ints([256] * batch), selections([256, 256], k, hostile=False)
    indices, counts = indices[1:].expand(batch, k).contiguous(), counts[1:].expand(batch).contiguous()
    q = randn(2, 4, 128, seed=3)[torch.arange(batch, device=DEV) % 2].contiguous()
    out, lse = gqa_decode(q, k_cache, v_cache, table, lens, indices, counts)
    close(
        (out[-2:], lse[-2:]), ref.gqa_decode(q[-2:], k_cache, v_cache, table[-2:], lens[-2:], indices[-2:], counts[-2:])
    )
    assert torch.equal(out, out[-2:][torch.arange(batch, device=DEV) % 2])


@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_graph_replays_selection_and_attention():
    lengths, k = [5000, 100, 3000], 64
    iq, cache, w, table, _ = index_case(4, 32, 16, lengths, True)
    kc, vc = randn(cache.shape[0], 16, 2, 64, seed=8), randn(cache.shape[0], 16, 2, 64, seed=9)
    q, lens = randn(3, 8, 64, seed=10), ints(lengths)
    work, scratch = select_workspace(3, 5000, k, DEV), gqa_decode_workspace(3, 8, 2, 64, 1, DEV)
    indices, counts = torch.empty(3, k, dtype=torch.int32, device=DEV), torch.empty(3, dtype=torch.int32, device=DEV)
    out, lse = torch.empty_like(q), torch.empty(3, 8, device=DEV)

    def step():
        select_decode(iq, cache, w, table, lens, k, 5000, indices, counts, work, check=False)
        gqa_decode(q, kc, vc, table, lens, indices, counts, out=out, lse=lse, workspace=scratch, split=64, block_n=32)

    step()
    want = [t.clone() for t in (indices, counts, out, lse)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(REPEATS):
        for t in (indices, counts):
            t.fill_(-7)
        out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((indices, counts, out, lse), want, strict=True))
    lens.copy_(ints([4000, 64, 65]))  # new lengths through the same graph
    graph.replay()
    assert torch.equal(indices, select_decode(iq, cache, w, table, lens, k, 5000)[0])


@pytest.mark.parametrize("way", ["short", "long", "many"])
@pytest.mark.parametrize("heads,dim,page", [(4, 32, 16)] + ([(5, 64, 61)] if GPU else []))
def test_public_selections_keep_the_rule_of_the_torch_ones(heads, dim, page, way, monkeypatch):
    """Decode, chunked prefill and packed sequences through gpu_ops: the sets of torch_indexer, and of one another."""
    if way != "short":
        monkeypatch.setattr("winnow.kernels.select_short.LONGEST", 0)
        monkeypatch.setattr("winnow.kernels.select_short.DECODED", 0)
    if way == "many":
        monkeypatch.setattr("winnow.kernels.topk_rows.ROWS", 1)
        monkeypatch.setattr("winnow.kernels.topk_rows.WIDTH", 0)
    lengths, queries, k = [70, 9, 33], [4, 9, 1], 16
    q, cache, w, table, _ = index_case(heads, dim, page, lengths, False)
    lens = ints(lengths)
    got = gpu_ops.select_paged(q, cache, w, table, lens, k)
    want = torch_indexer.decode_selection(q, cache, w, table.clamp_min(0), lens, k, "indexer")
    assert torch.equal(got.indices, want.indices) and torch.equal(got.counts, want.counts)
    faults, scratch = ints([0]), {}  # as in a graph
    for spoilt in (
        w,
        torch.where(ints([[0], [1], [0]]) == 0, w, float("nan")),
        torch.where(ints([[0], [0], [1]]) == 0, w, float("nan")),
    ):
        noted = gpu_ops.select_paged(q, cache, spoilt, table, lens, k, scratch, faults)
        assert bool(faults) == bool(spoilt[2].isnan().any()), "row 1 is no longer than k, and nothing of it is scored"
        if not faults:
            assert torch.equal(noted.indices, want.indices) and torch.equal(noted.counts, want.counts)
    bounds = ints([0, 4, 13, 14])
    many_q, many_w = randn(14, heads, dim, seed=11), randn(14, heads, seed=12, dtype=torch.float32)
    many_q[-1], many_w[-1] = q[2], w[2]  # the last query of sequence 2 is its decode query
    many_w[2] = many_w[7] = 0.0  # every score is 0, or -0
    many_w[1] = -many_w[1].abs()  # the best scores are the plateau of zeros
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(lengths, queries, strict=True)]).to(DEV)
    got_prefill = gpu_ops.select_prefill(many_q, cache, many_w, bounds, positions, table, lens, k)
    safe = table.clamp_min(0)
    want = torch_indexer.paged_selection(many_q, cache, many_w, bounds, positions, safe, lens, k, "indexer")
    assert torch.equal(got_prefill.indices, want.indices) and torch.equal(got_prefill.counts, want.counts)
    assert torch.equal(got_prefill.indices[-1], got.indices[2])
    spoilt, faults = many_w.clone(), ints([0])
    spoilt[3] = float(
        "nan"
    )  # noted: attention runs on these sets before anybody looks, so they hold positions or nothing
    noted = gpu_ops.select_prefill(many_q, cache, spoilt, bounds, positions, table, lens, k, faults)
    others = torch.arange(14, device=DEV) != 3
    assert faults.tolist() == [1] and torch.equal(noted.indices[others], want.indices[others])
    assert bool((noted.indices[3] >= -1).all()) and bool((noted.indices[3] <= positions[3]).all())
    keys, fresh = randn(14, dim, seed=13), torch.cat([torch.arange(m) for m in queries]).to(DEV)
    got = gpu_ops.select_packed(many_q, keys, many_w, bounds, fresh, 5)
    want = torch_indexer.packed_selection(many_q, keys, many_w, bounds, fresh, 5, "indexer")
    assert torch.equal(got.indices, want.indices) and torch.equal(got.counts, want.counts)
    for broken in (many_w, many_q):  # a GPU's max(NaN, 0) is 0 unless it is told otherwise
        sound = broken[11].clone()
        broken[11] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            gpu_ops.select_packed(many_q, keys, many_w, bounds, fresh, 5)
        faults = ints([0])
        gpu_ops.select_packed(many_q, keys, many_w, bounds, fresh, 5, faults)  # noted, and nobody waits
        assert faults.tolist() == [1]
        broken[11] = sound
        gpu_ops.select_packed(many_q, keys, many_w, bounds, fresh, 5, faults)
        assert faults.tolist() == [1]  # of a layer before: a sound one does not take it back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if GPU else [torch.float32])
def test_public_decode_matches_torch(dtype):
    """SmolLM2's heads (9 over 3, D 64) in both dtypes of an engine, with and without a selection."""
    lengths, k = [70, 1, 33], 16
    table, pages = pages_for(lengths, 16)
    k_cache, v_cache = randn(pages, 16, 3, 64, seed=1, dtype=dtype), randn(pages, 16, 3, 64, seed=2, dtype=dtype) / 10
    q, (indices, counts) = randn(3, 9, 64, seed=3, dtype=dtype), selections(lengths, k, hostile=False)
    for selection in (Selection(indices, counts), None):
        got = gpu_ops.sparse_decode(q, k_cache, v_cache, table, ints(lengths), selection, 0.125)
        wide = [x.float() for x in (q, k_cache, v_cache)]
        want = torch_attention.decode_attention(*wide, table.clamp_min(0), ints(lengths), selection, 0.125)
        tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 3 / 128}
        assert torch.allclose(got[0].float(), want[0], **tolerance) and torch.allclose(got[1], want[1], atol=1e-4)
    if GPU:
        assert gpu_ops.takes_attention(q, k_cache, v_cache)
        same = ops.sparse_decode(q, k_cache, v_cache, table, ints(lengths), None, 0.125)
        assert torch.equal(same[0], got[0])


@pytest.mark.parametrize("sparse", [True, False])
def test_public_prefill_at_the_end_of_paged_contexts(sparse):
    """Chunks with and without an earlier context, a page of three sequences in one list; NaN in every page that nobody holds."""
    lengths, queries, k = [70, 9, 33], [14, 9, 1], 16
    table, pages = pages_for(lengths, 16)
    k_cache, v_cache = randn(pages, 16, 2, 32, seed=1), randn(pages, 16, 2, 32, seed=2) / 10
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(lengths, queries, strict=True)]).to(DEV)
    cu, lens, q = ints([0, 14, 23, 24]), ints(lengths), randn(24, 4, 32, seed=3)
    selection = None
    if sparse:
        rows = [
            torch.randperm(int(t) + 1, generator=torch.Generator().manual_seed(int(t)))[:k].sort().values
            for t in positions
        ]
        indices = torch.full((24, k), -1, dtype=torch.int32)
        for row, chosen in enumerate(rows):
            indices[row, : len(chosen)] = chosen.int()
        selection = Selection(indices.to(DEV), (indices >= 0).sum(1).int().to(DEV))
    want = torch_attention.paged_context_attention(
        q.float(), k_cache.float(), v_cache.float(), cu, table.clamp_min(0), lens, selection, 0.2
    )
    held = torch.zeros(pages, dtype=torch.bool, device=DEV)
    for b, n in enumerate(lengths):
        held[table[b, : -(-n // 16)].long()] = True
    k_cache[~held], v_cache[~held] = float("nan"), float("nan")
    got = gpu_ops.sparse_prefill(q, k_cache, v_cache, cu, table, lens, selection, 0.2)
    tolerance = {"atol": 1e-5} if torch.float32 == DTYPE else {"atol": 2e-3, "rtol": 3 / 128}
    assert torch.allclose(got[0].float(), want[0], **tolerance) and torch.allclose(got[1], want[1].float(), atol=1e-4)
    noted = [known(cu.clone(), cu.tolist()), known(lens.clone(), lens.tolist())]
    again = gpu_ops.sparse_prefill(q, k_cache, v_cache, noted[0], table, noted[1], selection, 0.2)
    assert torch.equal(again[0], got[0])


@pytest.mark.parametrize("k", [16, 64])
def test_short_selection_at_its_edges(k):
    """Contexts of k-1, k, k+1, a step and one more, and the longest that the kernel takes; scores with ties, and one row of zeros."""
    from winnow.kernels.select_short import LONGEST

    lengths = [k - 1, k, k + 1, 64, 65, LONGEST - 1, LONGEST]
    q, cache, w, table, _ = index_case(4, 32, 16, lengths, False)
    cache.copy_(cache.sign())  # many equal scores
    w[3] = 0.0
    w[4] *= 1e35  # keys from near one end of the integers to near the other
    w[5] = 3e38  # infinities: as many ties as there are, and lower than a NaN
    w[6] = -w[6].abs()  # the best ones are zeros, and minus zeros
    bounds, lens = ints(range(len(lengths) + 1)), ints(lengths)
    positions = lens.long() - 1
    got = gpu_ops.select_prefill(q, cache, w, bounds, positions, table, lens, k)
    want = torch_indexer.paged_selection(q, cache, w, bounds, positions, table.clamp_min(0), lens, k, "indexer")
    assert torch.equal(got.counts, want.counts) and torch.equal(got.indices, want.indices)
