"""Indexer scores of a prefill on SM90 (Gluon) for 4, 8 or 16 heads in bf16: the bits of indexer_logits.py.

    step i      copy of queries i+1 starts | products of all keys with queries i | relu, weights, sum over heads, stores

A product's columns are 64 pairs (query, head). Of every 8 columns a lane holds two, so the columns are ordered such that all 16 of a lane
are heads of its own queries: the sum over heads needs no shuffle and a score lies in one lane, not in four. A lane holds 8 rows (keys) of
a product, 8 apart or 64 apart; the rows are ordered such that they are twice four neighbouring keys, which one instruction stores.
Several programs a multiprocessor: one adds while another multiplies.
"""

from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import PropagateNan

from winnow.kernels.mla_decode_sm90 import _barrier, _copy

COLUMNS = gl.constexpr(64)  # (query, head) pairs of a product
NAN = gl.constexpr(PropagateNan.ALL)


@gluon.jit
def _heads(x, ROWS: gl.constexpr, SHARE: gl.constexpr, H: gl.constexpr):
    """[ROWS, 4, 16] -> per step of the sum over heads (`_add_heads` of indexer_logits.py) the terms [ROWS, 4, SHARE, lanes there]."""
    if H == 16:
        even, odd = gl.split(gl.permute(gl.reshape(x, [ROWS, 4, SHARE, 2, 4, 2]), (0, 1, 2, 4, 3, 5)))
        x0, x2 = gl.split(even)
        x1, x3 = gl.split(odd)
    else:  # the others' terms are zeros there
        x0, x1 = gl.split(gl.reshape(x, [ROWS, 4, SHARE, H // 2, 2]))
        x2, x3 = x0, x1
    return x0, x1, x2, x3


@gluon.jit
def _beside(weight, x):
    """Weights [1, 4, SHARE, n] for every row of x [ROWS, 4, SHARE, n]."""
    weight = gl.convert_layout(gl.reshape(weight, x.shape[1:]), gl.SliceLayout(0, x.type.layout))
    return gl.broadcast(gl.expand_dims(weight, 0), x)[0]


@gluon.jit
def _add_heads(dots, weight, ROWS: gl.constexpr, SHARE: gl.constexpr, H: gl.constexpr):
    """dots [ROWS, 64], weight [4, 16] -> [ROWS, 4, SHARE], the queries of a lane last. The order is that of indexer_logits.py."""
    dots = gl.maximum(dots, 0.0, propagate_nan=NAN)
    dots = gl.reshape(gl.permute(gl.reshape(dots, [ROWS, 8, 4, 2]), (0, 2, 1, 3)), [ROWS, 4, 16])
    x0, x1, x2, x3 = _heads(dots, ROWS, SHARE, H)
    w0, w1, w2, w3 = _heads(gl.reshape(weight, [1, 4, 16]), 1, SHARE, H)
    part = gl.fma(x1, _beside(w1, x1), x0 * _beside(w0, x0))
    if H == 16:
        part = gl.fma(x3, _beside(w3, x3), gl.fma(x2, _beside(w2, x2), part))
    if H >= 8:
        a, b = gl.split(gl.permute(gl.reshape(part, [ROWS, 4, SHARE, 2, 2]), (0, 1, 2, 4, 3)))
        part = a + b
    a, b = gl.split(part)
    score = a + b
    if H < 16:
        score += 0.0  # the zeros of heads up to 16, which the other kernels add, make plus zero of minus zero
    return score


@gluon.jit
def _prefill_sm90(
    q, cache, w, table, ends, out, tokens, keys, page_stride, out_stride,
    H: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, QUERIES: gl.constexpr, WARPS: gl.constexpr, ENDS: gl.constexpr,
    STORE: gl.constexpr, WEIGHT: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * D), element_bitwidth=16, rank=2)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SPAN: gl.constexpr = 64 * WARPS
    TOGETHER: gl.constexpr = COLUMNS // H  # queries of a product
    SHARE: gl.constexpr = TOGETHER // 4  # of a lane

    first, start = gl.program_id(0) * QUERIES, gl.program_id(1) * SPAN
    last = gl.minimum(first + QUERIES, tokens)
    if ENDS:  # ends rise with t inside a sequence, yet nothing here relies on it
        own = first + gl.arange(0, QUERIES, layout=LINE)
        end = gl.load(ends + own, mask=own < last, other=0)
        if gl.max(end, 0) <= start:
            return
    whole = start + SPAN <= keys

    # Row r of a product, warp by warp 16 of 64 rows, is the key that makes a lane's rows neighbours.
    key_tile = gl.allocate_shared_memory(gl.bfloat16, [SPAN, D], TILE)
    even = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, D], TILE)
    odd = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, D], TILE)
    r = gl.arange(0, SPAN, layout=gl.SliceLayout(1, COPY))
    at = start + r // 16 % WARPS * 64 + r // 8 % 2 * 32 + r % 8 * 4 + r // (16 * WARPS)
    page = gl.load(table + at // PAGE, mask=at < keys, other=0).to(gl.int64)
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, COPY)), 0)
    at_key = gl.expand_dims(cache + page * page_stride + at % PAGE * D, 1) + d
    _copy(key_tile, at_key, mask=gl.expand_dims(at < keys, 1))

    # Column c of a product: two of every 8 belong to a lane.
    c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, COPY))
    term = c // 8 * 2 + c % 2
    query = term // H * 4 + c % 8 // 2
    at_query = gl.expand_dims((query * H + term % H) * D, 1) + d
    q += first.to(gl.int64) * (H * D)
    _copy(even, q + at_query, mask=gl.expand_dims(first + query < last, 1))
    async_copy.commit_group()

    term = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, WEIGHT)), 0)
    query_w = term // H * 4 + gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(1, WEIGHT)), 1)
    at_weight = query_w * H + term % H
    rows = gl.arange(0, TOGETHER, layout=gl.SliceLayout(1, STORE))
    pos = gl.arange(0, SPAN, layout=gl.SliceLayout(0, STORE))
    at_out = gl.expand_dims(rows.to(gl.int64) * out_stride, 1) + gl.expand_dims(pos, 0)
    w += first.to(gl.int64) * H
    out += first.to(gl.int64) * out_stride + start
    for pair in range(first, last, 2 * TOGETHER):
        for half in gl.static_range(2):
            row = pair + half * TOGETHER  # past the last one nothing is read or written
            async_copy.wait_group(0)
            fence_async_shared()
            _barrier()  # the tile is there for all warps, and all have done with the other one
            zeros = gl.zeros([SPAN, COLUMNS], gl.float32, layout=ACC)
            if half == 0:
                dots = warpgroup_mma(key_tile, even.permute((1, 0)), zeros, use_acc=False, is_async=True)
            else:
                dots = warpgroup_mma(key_tile, odd.permute((1, 0)), zeros, use_acc=False, is_async=True)
            weight = gl.load(w + at_weight, mask=row + query_w < last)
            q += TOGETHER * H * D
            w += TOGETHER * H
            ahead = gl.expand_dims(row + TOGETHER + query < last, 1)
            if half == 0:
                _copy(odd, q + at_query, mask=ahead)
            else:
                _copy(even, q + at_query, mask=ahead)
            async_copy.commit_group()
            dots = warpgroup_mma_wait(0, deps=[dots])
            score = _add_heads(dots, weight, SPAN, SHARE, H)
            score = gl.permute(gl.reshape(score, [4, WARPS, 2, 8, 4, SHARE]), (5, 4, 1, 2, 3, 0))
            score = gl.convert_layout(gl.reshape(score, [TOGETHER, SPAN]), STORE)
            inside = gl.expand_dims(row + rows < last, 1)
            if whole:
                gl.store(out + at_out, score, mask=inside)
            else:
                gl.store(out + at_out, score, mask=inside & gl.expand_dims(start + pos < keys, 0))
            out += TOGETHER * out_stride.to(gl.int64)
    async_copy.wait_group(0)


@lru_cache
def layouts(heads, warps):
    """How scores [queries, 64 warps] and weights [4, 16] lie in lanes: constants of the kernel.

    Lanes 4 g + t of warp v: queries t (and t + 4, ...), keys 64 v + 4 g + (0..3, 32..35).
    """
    share = [[4 << n, 0] for n in range((16 // heads).bit_length() - 1)]
    lanes = warps.bit_length() - 1
    queries = [[1, 0], [2, 0]]
    across = [[0, 64 << n] for n in range(lanes)]
    return {
        "STORE": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 32], *share],
            [*queries, [0, 4], [0, 8], [0, 16]],
            across,
            [],
            [64 // heads, 64 * warps],
        ),
        "WEIGHT": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8]], queries + [[0, 0]] * 3, [[0, 0]] * lanes, [], [4, 16]
        ),
    }


def launch(q, cache, w, table, keys, ends, out, queries=128, num_warps=4, maxnreg=168):
    """As indexer_logits_prefill. 168 registers, where the compiler would take 240, leave room for three programs a multiprocessor."""
    tokens, heads, dim = q.shape
    _prefill_sm90[(-(-tokens // queries), -(-keys // (64 * num_warps)))](
        q, cache, w, table, ends, out, tokens, keys, cache.stride(0), out.stride(0),
        H=heads, D=dim, PAGE=cache.shape[1], QUERIES=queries, WARPS=num_warps, ENDS=ends is not None,
        **layouts(heads, num_warps), num_warps=num_warps, maxnreg=maxnreg, enable_fp_fusion=True,
    )  # fmt: skip
