"""Lightning-indexer scores I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s]) over a paged key cache: decode and prefill.

Keys are the rows of the product and index heads its columns, so the sum over heads stays inside a thread quad and its order
is the same in all kernels: prefill and decode give equal bits for equal inputs. Caches: bf16 [pages, page, D] (fp32 on a
CPU) or uint8 [pages, page * (D + 4)], a page's e4m3 values first and then its fp32 scales.
Decode can also write the largest key of every few scores, from which topk.py chooses without another pass. Prefills with 4, 8 or
16 heads in bf16 have a kernel of their own on SM90 (indexer_prefill_sm90.py).
"""

import torch
import triton
import triton.language as tl

from winnow.kernels.topk import _keys

GROUPED = (
    4  # queries in one product where a query has 16 heads: 285 TF on an H200, one by one 214, with equal bits (8: 226)
)


@triton.jit
def _values(at, mask, FP8: tl.constexpr, SOFT: tl.constexpr, UPCAST: tl.constexpr):
    """A tile as operand of a product: as stored, or (SOFT: chips without e4m3) its e4m3 bytes as fp16, exactly."""
    value = tl.load(at, mask=mask, other=0)
    if FP8 and SOFT:
        bits = value.to(tl.int16)
        value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    elif FP8:
        value = value.to(tl.float8e4nv, bitcast=True)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def _load_page(table, start, length, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of the tile at `start` when a tile lies in one page, else the pages of its positions."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(table + start // PAGE, mask=start < length, other=0)
    else:
        pos = start + tl.arange(0, BLOCK_N)
        page = tl.load(table + pos // PAGE, mask=pos < length, other=0)
    return page


@triton.jit
def _load_keys(
    cache, scales, page, start, length, page_stride,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr, SOFT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys [N, D] at the logical positions from `start` on, and their scales [N] (1 without fp8)."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    base = page.to(tl.int64) * page_stride
    if PAGE % BLOCK_N == 0:  # rows past the end are harmless: their scores are not stored
        at = (start % PAGE) + offs_n
        key = _values(cache + base + at[:, None] * D + offs_d[None, :], (at >= 0)[:, None], FP8, SOFT, UPCAST)
    else:
        at = (start + offs_n) % PAGE
        key = _values(
            cache + (base + at * D)[:, None] + offs_d[None, :], (start + offs_n < length)[:, None], FP8, SOFT, UPCAST
        )
    if FP8:
        scale = tl.load(scales + base // 4 + PAGE * D // 4 + at, mask=start + offs_n < length, other=0.0)
    else:
        scale = tl.full([BLOCK_N], 1.0, tl.float32)
    return key, scale


@triton.jit
def _load_query(
    q,
    w,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FP8: tl.constexpr,
    SOFT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One query's heads [BLOCK_H, D] and weights [BLOCK_H], zero beyond H."""
    offs_h = tl.arange(0, BLOCK_H)
    weight = tl.load(w + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
    at = q + offs_h[:, None] * D + tl.arange(0, D)[None, :]
    return _values(at, (offs_h < H)[:, None], FP8, SOFT, UPCAST), weight


@triton.jit
def _add_heads(dots, weight, BLOCK_N: tl.constexpr, QUERIES: tl.constexpr, BLOCK_H: tl.constexpr):
    """relu(dots [N, QUERIES * BLOCK_H]) times weight [QUERIES * BLOCK_H], summed over the heads of every query: [N, QUERIES].

    With 16 heads the order is spelt out, for compilers differ and indexer_prefill_sm90.py has a query's heads in one lane: heads 2u,
    2u + 1, 8 + 2u and 9 + 2u (what lane u of a quad holds) are added up one by one, then the four sums, first those two apart.
    """
    dots = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if BLOCK_H == 16:
        x0, x1, x2, x3 = _by_lane(dots, BLOCK_N, QUERIES)
        w0, w1, w2, w3 = _by_lane(weight, 1, QUERIES)
        part = tl.fma(x1, tl.broadcast_to(w1, x1.shape), x0 * w0)
        part = tl.fma(x2, tl.broadcast_to(w2, x2.shape), part)
        part = tl.fma(x3, tl.broadcast_to(w3, x3.shape), part)
        score = tl.sum(tl.sum(tl.reshape(part, [BLOCK_N, QUERIES, 2, 2]), 2), 2)
    else:
        score = tl.sum(tl.reshape(dots * weight[None, :], [BLOCK_N, QUERIES, BLOCK_H]), 2)
    return score


@triton.jit
def _by_lane(x, ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """Columns (query, head of 16) -> heads 2u, 2u + 1, 8 + 2u, 9 + 2u, each [ROWS, QUERIES, u]: no lane gives anything to another."""
    even, odd = tl.split(tl.permute(tl.reshape(x, [ROWS, QUERIES, 2, 4, 2]), [0, 1, 3, 2, 4]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _decode(
    q, cache, scales, w, table, seq_lens, out, maxima,
    skip, table_stride, page_stride, out_stride, maxima_stride,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, FP8: tl.constexpr, SOFT: tl.constexpr, MAXIMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    length = tl.load(seq_lens + b)
    if (length <= skip) | (chunk * CHUNK >= length):
        return
    query, weight = _load_query(q + b * H * D, w + b * H, H, D, BLOCK_H, FP8, SOFT, UPCAST)
    last = tl.minimum(chunk * CHUNK + CHUNK, length)
    table_row = table + b * table_stride
    best = tl.full([BLOCK_N], -2147483648, tl.int32)
    page = _load_page(table_row, chunk * CHUNK, last, PAGE, BLOCK_N)
    for start in range(chunk * CHUNK, last, BLOCK_N):
        pos = start + tl.arange(0, BLOCK_N)
        valid = pos < length
        key, scale = _load_keys(cache, scales, page, start, length, page_stride, D, PAGE, BLOCK_N, FP8, SOFT, UPCAST)
        page = _load_page(table_row, start + BLOCK_N, last, PAGE, BLOCK_N)  # a step ahead of the keys that need it
        dots = tl.dot(key, tl.trans(query), input_precision="ieee")  # [N, H]
        score = tl.reshape(_add_heads(dots, weight, BLOCK_N, 1, BLOCK_H), [BLOCK_N]) * scale
        tl.store(out + b * out_stride + pos, score, mask=valid)
        if MAXIMA:
            best = tl.maximum(best, tl.where(valid, _keys(score), -2147483648))
    if MAXIMA:
        tl.store(maxima + b * maxima_stride + chunk * BLOCK_N + tl.arange(0, BLOCK_N), best)


@triton.jit
def _prefill(
    q, cache, scales, w, table, ends, out, tokens, keys, page_stride, out_stride,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, FP8: tl.constexpr, SOFT: tl.constexpr, ENDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first, start = tl.program_id(0) * QUERIES, tl.program_id(1) * BLOCK_N
    last = tl.minimum(first + QUERIES, tokens)
    pos = start + tl.arange(0, BLOCK_N)
    if ENDS:  # ends rise with t inside a sequence, yet nothing here relies on it
        offs_q = first + tl.arange(0, QUERIES)
        if tl.max(tl.load(ends + offs_q, mask=offs_q < last, other=0), 0) <= start:
            return
    valid = pos < keys
    page = _load_page(table, start, keys, PAGE, BLOCK_N)
    key, scale = _load_keys(cache, scales, page, start, keys, page_stride, D, PAGE, BLOCK_N, FP8, SOFT, UPCAST)
    # Few heads: GROUP queries side by side are the columns of one product, and the keys are read once for all of them.
    offs_c, offs_g = tl.arange(0, GROUP * BLOCK_H), tl.arange(0, GROUP)
    at_out = offs_g.to(tl.int64)[None, :] * out_stride + pos[:, None]
    for t in range(first, last, GROUP):
        row = (first * 0 + t).to(tl.int64)
        inside = row + offs_g < last
        if GROUP > 1:
            there = row * H + offs_c < last * H
            at = q + row * H * D + offs_c[:, None] * D + tl.arange(0, D)[None, :]
            query = _values(at, there[:, None], FP8, SOFT, UPCAST)
            weight = tl.load(w + row * H + offs_c, mask=there, other=0.0).to(tl.float32)
        else:
            query, weight = _load_query(q + row * H * D, w + row * H, H, D, BLOCK_H, FP8, SOFT, UPCAST)
        dots = tl.dot(key, tl.trans(query), input_precision="ieee")  # [N, GROUP * BLOCK_H]
        score = _add_heads(dots, weight, BLOCK_N, GROUP, BLOCK_H)
        if GROUP > 1:
            score *= scale[:, None]
            tl.store(out + row * out_stride + at_out, score, mask=valid[:, None] & inside[None, :])
        else:
            score = tl.reshape(score, [BLOCK_N]) * scale
            tl.store(out + row * out_stride + pos, score, mask=valid)


def _describe(q, cache):
    """(page size, fp8?, software fp8?, on the CPU?) after checking that query and cache fit."""
    dim = q.shape[-1]
    fp8, cpu = cache.dtype == torch.uint8, q.device.type == "cpu"
    if dim not in (16, 32, 64, 128) or not cache.is_contiguous():
        raise ValueError(
            f"indexer_logits: head dimension must be 16, 32, 64 or 128 and the cache contiguous, got {dim}"
        )
    page = cache.shape[1] // (dim + 4) if fp8 else cache.shape[1]
    if page * (dim + 4) != cache.shape[1] if fp8 else cache.shape[2] != dim:
        raise ValueError(f"indexer_logits: cache {tuple(cache.shape)} {cache.dtype} does not fit head dimension {dim}")
    if fp8 != (q.dtype == torch.float8_e4m3fn):
        raise ValueError(
            f"indexer_logits: q {q.dtype} with cache {cache.dtype}: an fp8 cache takes an e4m3 query and no other does"
        )
    return page, fp8, cpu or torch.cuda.get_device_capability(q.device) < (8, 9), cpu


def indexer_logits_decode(
    q, cache, w, block_table, seq_lens, out=None, max_len=None, maxima=None, skip=0,
    chunk=None, block_n=64, num_warps=4, num_stages=3,
):  # fmt: skip
    """Scores of one query per sequence against its paged keys.

    q [B, H, D] in the cache's dtype (e4m3 for an fp8 cache, its scale folded into w); w fp32 [B, H]; cache as above;
    block_table int32 [B, max_pages]; seq_lens int32 [B]. Returns fp32 [B, max_len], written below seq_lens only, and not at
    all for rows no longer than `skip`. chunk: positions per program, without influence on the bits. maxima int32
    [B, >= ceil(max_len / chunk) * block_n]: the largest keys of block_n interleaved groups of every chunk, for
    `topk.select_from_maxima` with span=chunk and group=chunk / block_n.
    """
    batch, heads, dim = q.shape
    page, fp8, soft, cpu = _describe(q, cache)
    width = block_table.shape[1] * page if max_len is None else max_len
    out = torch.empty(batch, width, dtype=torch.float32, device=q.device) if out is None else out
    chunk = chunk or 512
    chunks = triton.cdiv(width, chunk)
    if batch * chunks:
        _decode[(batch * chunks,)](
            q.contiguous().view(torch.uint8) if fp8 else q.contiguous(), cache, cache.view(torch.float32) if fp8 else cache,
            w.contiguous(), block_table, seq_lens, out, maxima,
            skip, block_table.stride(0), cache.stride(0), out.stride(0), 0 if maxima is None else maxima.stride(0),
            H=heads, D=dim, PAGE=page, CHUNKS=chunks, CHUNK=chunk, BLOCK_N=block_n, BLOCK_H=max(16, triton.next_power_of_2(heads)),
            FP8=fp8, SOFT=soft, MAXIMA=maxima is not None, UPCAST=cpu,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _own_kernel(q):
    """Whether indexer_prefill_sm90.py takes these queries (and a cache of their dtype)."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and q.shape[1] in (4, 8, 16)
        and q.shape[2] in (32, 64, 128)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


def indexer_logits_prefill(
    q, cache, w, table, keys, ends=None, out=None, queries=128, block_n=None, num_warps=4, num_stages=3,
    grouped=None,
):  # fmt: skip
    """Scores of many queries of one sequence: q [T, H, D], w fp32 [T, H], table int32 [max_pages], keys = positions to score.

    Returns fp32 [T, keys]. ends int32 [T]: only positions below ends[t] are needed, so tiles beyond every query's end stay
    unwritten. A plain key tensor k [S, D] is the one-page cache k[None] with table [0].
    """
    tokens, heads, dim = q.shape
    page, fp8, soft, cpu = _describe(q, cache)
    out = torch.empty(tokens, keys, dtype=torch.float32, device=q.device) if out is None else out
    own = block_n is None and keys >= 1024 and _own_kernel(q)
    wide = keys >= 4096 and q.element_size() < 4 and not cpu and torch.cuda.get_device_capability(q.device) >= (9, 0)
    block_n = block_n or (256 if wide else 64)
    if not (tokens and keys):
        return out
    if own:
        from winnow.kernels import indexer_prefill_sm90

        indexer_prefill_sm90.launch(q.contiguous(), cache, w.contiguous(), table, keys, ends, out, queries)
        return out
    group = grouped or (GROUPED if heads == 16 and not fp8 and not cpu else 1)  # BLAS's bits depend on the shape
    _prefill[(triton.cdiv(tokens, queries), triton.cdiv(keys, block_n))](
        q.contiguous().view(torch.uint8) if fp8 else q.contiguous(), cache, cache.view(torch.float32) if fp8 else cache,
        w.contiguous(), table, ends, out, tokens, keys, cache.stride(0), out.stride(0),
        H=heads, D=dim, PAGE=page, QUERIES=queries, BLOCK_N=block_n, BLOCK_H=max(16, triton.next_power_of_2(heads)), GROUP=group,
        FP8=fp8, SOFT=soft, ENDS=ends is not None, UPCAST=cpu,
        num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
