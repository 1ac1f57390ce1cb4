"""Indexer scores and their exact top-k for many queries of many short contexts, in one launch.

A batch of a few hundred sequences of about a hundred tokens would cost a launch of every kernel for each sequence. Here a program takes one
query, whatever sequence it is of: it writes its scores as the decode kernel does (the same bits), reads all of them back at once and searches
for the k-th as topk.py does among its candidates. A program holds a whole context: of up to `LONGEST` tokens.
"""

import torch
import triton
import triton.language as tl

from winnow.kernels.indexer_logits import _add_heads, _load_keys, _load_page, _load_query
from winnow.kernels.topk import _count, _keys, _narrow, _thresholds

LONGEST = 1024  # tokens of a context
DECODED = 512  # in decode, where many programs share a row, they catch up beyond this
BLOCK_N = 64  # keys of one step


@triton.jit(do_not_specialize=["k", "table_stride"])
def _select_short(
    q, cache, w, table, owner, ends, scores, bad, out, counts, k, table_stride, page_stride,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, OWNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(ends + row)
    target = out + row * k
    if length <= k:  # nothing to choose
        for base in range(0, k, K_BLOCK):
            slot = base + tl.arange(0, K_BLOCK)
            tl.store(target + slot, tl.where(slot < length, slot, -1), mask=slot < k)
        tl.store(counts + row, length)
        return
    query, weight = _load_query(q + row * H * D, w + row * H, H, D, BLOCK_H, False, False, UPCAST)
    sequence = tl.load(owner + row).to(tl.int64) if OWNED else row
    table_row = table + sequence * table_stride
    mine = scores + row * WIDTH
    for start in range(0, length, BLOCK_N):
        pos = start + tl.arange(0, BLOCK_N)
        page = _load_page(table_row, start, length, PAGE, BLOCK_N)
        key, scale = _load_keys(cache, cache, page, start, length, page_stride, D, PAGE, BLOCK_N, False, False, UPCAST)
        dots = tl.dot(key, tl.trans(query), input_precision="ieee")  # [N, H]
        score = tl.reshape(_add_heads(dots, weight, BLOCK_N, 1, BLOCK_H), [BLOCK_N]) * scale
        tl.store(mine + pos, score, mask=pos < length)
    tl.debug_barrier()
    offs = tl.arange(0, WIDTH)
    own = _keys(tl.load(mine + offs, mask=offs < length, other=float("-inf")))
    if tl.max(tl.where(offs < length, own, -2147483648), 0) == 2147483647:  # a NaN
        tl.store(bad, 1)
    own = tl.where(offs < length, own, -2147483648)
    low, high, at_low, above_high = tl.min(tl.where(offs < length, own, 2147483647), 0), tl.max(own, 0), length, 0
    while low < high:  # to the k-th largest key, or to one that exactly k keys reach
        one, two, three = _thresholds(low, high)
        reach = tl.sum(_count(own, one, two, three), 0)
        low, high, at_low, above_high = _narrow(reach, low, high, at_low, above_high, one, two, three, k, k)
    bigger, equal = own > low, ((own == low) & (offs < length)).to(tl.int32)
    ties = k - tl.sum(bigger.to(tl.int32), 0)
    chosen = (bigger | ((equal > 0) & (tl.cumsum(equal, 0) <= ties))).to(tl.int32)
    tl.store(target + tl.cumsum(chosen, 0) - 1, offs, mask=chosen > 0)
    tl.store(counts + row, k)


def select_short(q, cache, w, table, owner, ends, top_k, bad):
    """The top_k best positions of each query: int32 [T, top_k] ascending with a -1 tail, and counts int32 [T].

    q [T, H, D] and cache [pages, page, D] of one float dtype; w fp32 [T, H]; table int32 [n, pages]; owner int32 [T]: each query's row of
    the table, None where they have one each, in order; ends int32 [T]: it sees positions below this, at most LONGEST. bad int32 [1] becomes 1 when a score is NaN.
    """
    tokens, heads, dim = q.shape
    page, cpu = cache.shape[1], q.device.type == "cpu"
    width = min(LONGEST, max(BLOCK_N, triton.next_power_of_2(table.shape[1] * page)))
    out = torch.empty(tokens, top_k, dtype=torch.int32, device=q.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=q.device)
    if tokens:
        scores = torch.empty(tokens, width, dtype=torch.float32, device=q.device)
        _select_short[(tokens,)](
            q.contiguous(), cache, w.contiguous(), table, owner, ends, scores, bad, out, counts, top_k, table.stride(0), cache.stride(0),
            H=heads, D=dim, PAGE=page, WIDTH=width, K_BLOCK=min(2048, triton.next_power_of_2(top_k)), BLOCK_N=BLOCK_N,
            BLOCK_H=max(16, triton.next_power_of_2(heads)), OWNED=owner is not None, UPCAST=cpu, num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out, counts
