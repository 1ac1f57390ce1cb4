"""KL(attention || indexer) and its gradients on a GPU, dense (warm-up) and over the selected sets, nothing of size [L, L].

    for a slice of query blocks:   I -> log-sum-exp of I -> loss and G = softmax(I) - target -> dw, dq -> shares of dk -> dk

The target is A / H, or, with costs (`omission.py`), these over their sum: a tensor more of the slice, written before log-sum-exp and sum.
A = sum over heads of exp(q . k scale - lse) needs no pass of its own: with the attention's own lse every row of A sums to H. A slice
keeps I in fp32, G and the shares in the inputs' dtype, for as many (query, key) pairs as SLICE_BYTES holds. No float atomics.

Where a slice begins is not specialised, here and in the other kernels of slices: a kernel would be compiled anew for each kind of number
(1, a multiple of 16, another) that it meets. At 32K, with dozens of slices, that took longer than the step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.key_lists import Lists, key_lists, query_blocks
from winnow.kernels.omission import REST, TINY, Omission
from winnow.kernels.segments import add_rows
from winnow.kernels.selection import Selection
from winnow.kernels.sparse_prefill import capability, tile_mask

SLICE_BYTES = 1 << 28


@triton.jit
def _rows(row0, num, head0, HEADS: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr):
    """PACK heads from head0 on of a block's queries, query by query: rows of [T * HEADS] and their mask."""
    m = tl.arange(0, BLOCK_Q * PACK)
    query, head = m // PACK, head0 + m % PACK
    return (row0 + query).to(tl.int64) * HEADS + head, (query < num) & (head < HEADS)


@triton.jit
def _dots(x, row, inside, y, other, there, D: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr):
    """Products of rows of x and rows of y, both of D numbers, in pieces of CHUNK: fp32 [rows, keys]."""
    d = tl.arange(0, CHUNK)
    acc = tl.zeros([row.shape[0], other.shape[0]], tl.float32)
    for c in tl.static_range((D + CHUNK - 1) // CHUNK):
        wide = c * CHUNK + d
        a = tl.load(x + row[:, None] * D + wide[None, :], mask=inside[:, None] & (wide < D)[None, :], other=0.0)
        b = tl.load(y + other[:, None] * D + wide[None, :], mask=there[:, None] & (wide < D)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def _fold(x, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    return tl.sum(tl.reshape(x, [BLOCK_Q, PACK, x.shape[1]]), 1) if PACK > 1 else x


@triton.jit
def _span(offsets, stops, block):
    """A block's first entry, the end of its list and the width of its rows in a slice: multiples of UNIT, said so that rows are read in
    wide words."""
    start, stop = tl.multiple_of(tl.load(offsets + block), 64), tl.multiple_of(tl.load(stops + block), 64)
    return start, stop, tl.multiple_of(tl.load(offsets + block + 1) - start, 64)


@triton.jit
def _tile(owner, offsets, stops, first, rows, keys, begin, shift, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a program's tile lies: first entry, its first row and number of queries, keys [N], places [BLOCK_Q, N] in the slice. No queries
    where the tile is room that the block's list does not need."""
    tile = tl.program_id(0)
    block = tl.load(owner + tile)
    entry = tl.multiple_of(shift + tile * BLOCK_N, BLOCK_N)
    start, stop, width = _span(offsets, stops, block)
    n = tl.arange(0, BLOCK_N)
    key = tl.load(keys + entry + n)
    row0, num = tl.load(first + begin + block), tl.load(rows + begin + block)
    q = tl.arange(0, BLOCK_Q)
    place = (start - shift).to(tl.int64) * BLOCK_Q + q[:, None] * width + (entry - start + n)[None, :]
    return entry, row0, tl.where(entry < stop, num, 0), key, place


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["offsets", "stops"])
def _scores(
    q, k, w, keys, offsets, stops, owner, first, rows, scores, begin, shift,
    HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    _, row0, num, key, place = _tile(owner, offsets, stops, first, rows, keys, begin, shift, BLOCK_Q, BLOCK_N)
    if num == 0:
        return
    total = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for head in range(0, HEADS, PACK):
        row, inside = _rows(row0, num, head, HEADS, PACK, BLOCK_Q)
        dots = _dots(q, row, inside, k, key.to(tl.int64), key >= 0, D, CHUNK, UPCAST)
        weight = tl.load(w + row, mask=inside, other=0.0).to(tl.float32)
        total += _fold(tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[:, None], BLOCK_Q, PACK)
    tl.store(scores + place, total)


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["offsets", "stops"])
def _costs(
    attn_q, attn_k, lse, values, pull, own, theirs, keys, offsets, stops, owner, first, rows, costs, begin, shift, scale,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, DV: tl.constexpr, CHUNK_V: tl.constexpr,
    PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, TINY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A of `omission.py`: what it costs a query to do without each key of the tile. Whatever lies outside the set is left to others."""
    HEADS: tl.constexpr = HKV * GROUP
    _, row0, num, key, place = _tile(owner, offsets, stops, first, rows, keys, begin, shift, BLOCK_Q, BLOCK_N)
    if num == 0:
        return
    there, other = key >= 0, key.to(tl.int64)
    total = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for head in range(0, HEADS, PACK):
        row, inside = _rows(row0, num, head, HEADS, PACK, BLOCK_Q)
        base = tl.load(lse + row, mask=inside, other=float("inf"))
        dots = _dots(attn_q, row, inside, attn_k, other * HKV + head // GROUP, there, D, CHUNK, UPCAST)
        share = tl.exp2((dots * scale - base[:, None]) * 1.4426950408889634)
        near = _dots(pull, row, inside, values, other * HKV + head // GROUP, there, DV, CHUNK_V, UPCAST)
        of_key = theirs + other[None, :] * HEADS + (head + tl.arange(0, BLOCK_Q * PACK) % PACK)[:, None]
        both = tl.load(of_key, mask=inside[:, None] & there[None, :], other=0.0)
        both += tl.load(own + row, mask=inside, other=0.0)[:, None]
        moved = tl.sqrt(tl.maximum(both - 2 * near, 0.0) + TINY) / tl.maximum(1 - share, REST)
        total += _fold(share * tl.maximum(moved, share * share * tl.sqrt(both)), BLOCK_Q, PACK)
    tl.store(costs + place, total)


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["offsets", "stops"])
def _normalise(
    scores, costs, keys, bits, offsets, stops, first, rows, norm, whole, begin, shift,
    COST: tl.constexpr, DENSE: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each query's scores over its set: norm fp32 [T], -inf where the set is empty; the sum of its costs: whole fp32 [T].
    ROWS queries of a block a program."""
    block, part = tl.program_id(0), tl.program_id(1)
    row0, num = tl.load(first + begin + block), tl.load(rows + begin + block)
    start, stop, width = _span(offsets, stops, block)
    q, n = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    at = (start - shift).to(tl.int64) * BLOCK_Q + q[:, None] * width
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total, cost = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for entry in range(start, stop, BLOCK_N):
        entry = tl.multiple_of(entry, 64)
        there = entry + n < stop
        key = tl.load(keys + entry + n, mask=there, other=-1)
        chosen = (
            tile_mask(bits, entry, key[None, :], row0 + q, q < num, q, DENSE, BLOCK_Q, BLOCK_N) & (key >= 0)[None, :]
        )
        place = at + (entry - start + n)[None, :]
        score = tl.where(chosen, tl.load(scores + place, mask=there[None, :], other=0.0), float("-inf"))
        if COST:
            cost += tl.sum(tl.where(chosen, tl.load(costs + place, mask=there[None, :], other=0.0), 0.0), 1)
        new_top = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
        top = new_top
    tl.store(
        norm + row0 + q, tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf")), mask=q < num
    )
    if COST:
        tl.store(whole + row0 + q, cost, mask=q < num)


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["offsets", "stops"])
def _compare(
    attn_q, attn_k, lse, scores, costs, norm, whole, keys, bits, offsets, stops, owner, first, rows, slope, loss, begin, shift, scale,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, COST: tl.constexpr, DENSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The target, the tile's part of the loss, and G = softmax(I) - target, zero outside the set. The target is A / H, or costs / whole."""
    entry, row0, num, key, place = _tile(owner, offsets, stops, first, rows, keys, begin, shift, BLOCK_Q, BLOCK_N)
    if num == 0:
        tl.store(loss + tl.program_id(0), 0.0)
        return
    q = tl.arange(0, BLOCK_Q)
    if COST:
        every = tl.load(whole + row0 + q, mask=q < num, other=0.0)
        mass = tl.load(costs + place) / tl.where(every > 0, every, 1.0)[:, None]
    else:
        mass = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for head in range(0, HKV * GROUP, PACK):
            row, inside = _rows(row0, num, head, HKV * GROUP, PACK, BLOCK_Q)
            dots = _dots(
                attn_q, row, inside, attn_k, key.to(tl.int64) * HKV + head // GROUP, key >= 0, D, CHUNK, UPCAST
            )
            base = tl.load(lse + row, mask=inside, other=float("inf"))
            mass += _fold(tl.exp2((dots * scale - base[:, None]) * 1.4426950408889634), BLOCK_Q, PACK)
        mass *= 1.0 / (HKV * GROUP)
    chosen = tile_mask(bits, entry, key[None, :], row0 + q, q < num, q, DENSE, BLOCK_Q, BLOCK_N) & (key >= 0)[None, :]
    model = tl.load(scores + place) - tl.load(norm + row0 + q, mask=q < num, other=0.0)[:, None]
    target = tl.where(chosen, mass, 0.0)
    model = tl.where(chosen, model, 0.0)
    part = target * (tl.log(tl.where(target > 0, target, 1.0)) - model)
    tl.store(loss + tl.program_id(0), tl.sum(tl.sum(part, 1), 0))
    tl.store(slope + place, tl.where(chosen, tl.exp(model) - target, 0.0).to(slope.dtype.element_ty))


@triton.jit(do_not_specialize=["begin", "blocks"], do_not_specialize_on_alignment=["offsets", "stops"])
def _query_gradient(
    q, k, w, slope, keys, offsets, stops, first, rows, dq, dw, begin, blocks, shift,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq [T, HEADS, D] and dw [T, HEADS] of PACK heads of one block, over its whole list."""
    GROUPS: tl.constexpr = (HEADS + PACK - 1) // PACK
    head, block = tl.program_id(0) % GROUPS * PACK, blocks - 1 - tl.program_id(0) // GROUPS
    row0, num = tl.load(first + begin + block), tl.load(rows + begin + block)
    start, stop, width = _span(offsets, stops, block)
    row, inside = _rows(row0, num, head, HEADS, PACK, BLOCK_Q)
    d, n, query = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Q * PACK) // PACK
    mask_q = inside[:, None] & (d < D)[None, :]
    own = tl.load(q + row[:, None] * D + d[None, :], mask=mask_q, other=0.0)
    if UPCAST:
        own = own.to(tl.float32)
    base = slope + (start - shift).to(tl.int64) * BLOCK_Q + query[:, None] * width
    acc = tl.zeros([BLOCK_Q * PACK, BLOCK_D], tl.float32)
    by_weight = tl.zeros([BLOCK_Q * PACK], tl.float32)
    for entry in range(start, stop, BLOCK_N):
        entry = tl.multiple_of(entry, 64)
        key = tl.load(keys + entry + n)
        other = tl.load(
            k + key.to(tl.int64)[:, None] * D + d[None, :], mask=(key >= 0)[:, None] & (d < D)[None, :], other=0.0
        )
        given = tl.load(base + (entry - start + n)[None, :])
        if UPCAST:
            other = other.to(tl.float32)
        dots = tl.dot(own, tl.trans(other), input_precision="ieee")
        by_weight += tl.sum(tl.maximum(dots, 0.0) * given.to(tl.float32), 1)
        acc = tl.dot(tl.where(dots > 0, given, 0.0).to(other.dtype), other, acc, input_precision="ieee")
    weight = tl.load(w + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(dq + row[:, None] * D + d[None, :], acc * weight[:, None], mask=mask_q)
    tl.store(dw + row, by_weight, mask=inside)


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["offsets", "stops"])
def _key_gradient(
    q, k, w, slope, keys, offsets, stops, owner, first, rows, parts, begin, shift,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile's share of dk: parts [entries of the slice, D]."""
    entry, row0, num, key, place = _tile(owner, offsets, stops, first, rows, keys, begin, shift, BLOCK_Q, BLOCK_N)
    if num == 0:
        return
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    given = tl.load(slope + place).to(tl.float32)
    if PACK > 1:
        given = tl.reshape(tl.broadcast_to(given[:, None, :], [BLOCK_Q, PACK, BLOCK_N]), [BLOCK_Q * PACK, BLOCK_N])
    other = tl.load(
        k + key.to(tl.int64)[:, None] * D + d[None, :], mask=(key >= 0)[:, None] & (d < D)[None, :], other=0.0
    )
    if UPCAST:
        other = other.to(tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in range(0, HEADS, PACK):
        row, inside = _rows(row0, num, head, HEADS, PACK, BLOCK_Q)
        own = tl.load(q + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            own = own.to(tl.float32)
        weight = tl.load(w + row, mask=inside, other=0.0).to(tl.float32)
        dots = tl.dot(own, tl.trans(other), input_precision="ieee")
        share = tl.where(dots > 0, given * weight[:, None], 0.0).to(own.dtype)
        acc = tl.dot(tl.trans(share), own, acc, input_precision="ieee")
    at = parts + (entry - shift + n).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, acc.to(parts.dtype.element_ty), mask=(d < D)[None, :])


def _chunk(dim: int) -> int:
    """Pieces of the head dimension: a power of two whole, else 64 at a time."""
    return max(16, triton.next_power_of_2(dim)) if (dim <= 256 and dim % 64) or dim in (64, 128) else 64


def kl_plan(sm: int, dense: bool, group: int, fp32: bool = False) -> tuple[int, int, int, int, int]:
    """(queries of a block, heads of a row group, keys of a step, warps, stages). Rows of a tile: queries x heads."""
    if sm == 0:
        return (16, 1, 32, 4, 1) if dense else (8, min(2, triton.next_power_of_2(group)), 32, 4, 1)
    roomy = sm in (80, 90)
    pack = 1 if dense else min(4, group & -group)
    if fp32:
        return 64 // pack, pack, 64 if dense else 32, 4, 1
    rows = 128 if sm >= 90 else 64
    return rows // pack, pack, 64 if not dense or not roomy else 128, 8 if rows == 128 else 4, 3 if roomy else 2


class _Slice:
    """One run of blocks: workspaces and the launches over them."""

    def __init__(self, lists: Lists, a: int, b: int, block_n: int, dtype: torch.dtype, costs: bool):
        self.lists, self.a, self.b = lists, a, b
        self.shift, self.stop = lists.ends[a], lists.ends[b]
        device = lists.keys.device
        pairs = (self.stop - self.shift) * lists.blocks.size
        self.scores = torch.empty(pairs, dtype=torch.float32, device=device)
        self.costs = torch.empty(pairs if costs else 0, dtype=torch.float32, device=device)
        self.slope = torch.empty(pairs, dtype=dtype, device=device)
        self.owner = lists.owners(a, b, block_n)
        self.tiles = len(self.owner)


def _run_slice(
    s: _Slice, tensors: tuple[Tensor, ...], cost: tuple[Tensor, ...], out: tuple[Tensor, ...], scale: float,
    plan: tuple[int, int, int, int, int], wants: bool,
) -> Tensor:  # fmt: skip
    """Loss of a slice (fp64 scalar); fills norm, whole, dq, dw of its queries and adds to dk."""
    q, k, w, attn_q, attn_k, lse = tensors
    norm, whole, dq, dk, dw = out
    size, pack, block_n, warps, stages = plan
    lists, blocks = s.lists, s.lists.blocks
    offsets, stops, begin = lists.offsets[s.a :], lists.stops[s.a :], lists.begin + s.a
    heads, dim = q.shape[1:]
    kv_heads, group = attn_k.shape[1], attn_q.shape[1] // attn_k.shape[1]
    dense, cpu = lists.bits is None, q.device.type == "cpu"
    common = {"BLOCK_Q": size, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    where = (lists.keys, offsets, stops, s.owner, blocks.first, blocks.rows)
    index = {"HEADS": heads, "D": dim, "PACK": pack, "UPCAST": cpu}
    block_d = max(16, triton.next_power_of_2(dim))
    _scores[(s.tiles,)](q, k, w, *where, s.scores, begin, s.shift, CHUNK=_chunk(dim), **index, **common)
    attention = {
        "HKV": kv_heads,
        "GROUP": group,
        "D": attn_q.shape[2],
        "CHUNK": _chunk(attn_q.shape[2]),
        "PACK": pack,
        "UPCAST": cpu,
    }
    if cost:
        single = common | {"num_stages": 1}  # two products a step: of more stages the operands do not fit
        width = cost[0].shape[2]
        _costs[(s.tiles,)](
            attn_q, attn_k, lse, *cost, *where, s.costs, begin, s.shift, scale, DV=width, CHUNK_V=_chunk(width), REST=REST, TINY=TINY, **attention, **single
        )  # fmt: skip
    rows = 4 if dense else min(16, size)
    _normalise[(s.b - s.a, size // rows)](
        s.scores, s.costs, lists.keys, lists.bits, offsets, stops, blocks.first, blocks.rows, norm, whole, begin, s.shift,
        COST=bool(cost), DENSE=dense, BLOCK_Q=size, ROWS=rows, BLOCK_N=512 if dense and not cpu else min(64, block_n), num_warps=4,
    )  # fmt: skip
    loss = torch.empty(s.tiles, dtype=torch.float32, device=q.device)
    _compare[(s.tiles,)](
        attn_q, attn_k, lse, s.scores, s.costs, norm, whole, lists.keys, lists.bits, *where[1:], s.slope, loss, begin, s.shift, scale,
        COST=bool(cost), DENSE=dense, **attention, **common,
    )  # fmt: skip
    if wants:
        _query_gradient[((s.b - s.a) * triton.cdiv(heads, pack),)](
            q, k, w, s.slope, lists.keys, offsets, stops, blocks.first, blocks.rows, dq, dw, begin, s.b - s.a, s.shift,
            BLOCK_D=block_d, **index, **common,
        )  # fmt: skip
        parts = torch.empty(s.stop - s.shift, dim, dtype=k.dtype, device=k.device)
        _key_gradient[(s.tiles,)](q, k, w, s.slope, *where, parts, begin, s.shift, BLOCK_D=block_d, **index, **common)
        add_rows(parts, lists.keys[s.shift : s.stop], dk, lists.order(s.shift, s.stop, len(dk)))
    return loss.sum(dtype=torch.float64)


def kl_and_gradients(
    q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None,
    scale: float, cost: Omission | None, wants: bool = True, slice_bytes: int = SLICE_BYTES,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """(KL summed over rows fp64, rows counted int64, gradients in q, k, w in fp32); arguments as in `ops.indexer_kl`."""
    tensors = tuple(x.contiguous() for x in (q, k, w, attn_q, attn_k, lse))
    costs = tuple(x.contiguous() for x in cost or ())
    plan = kl_plan(
        capability(q.device), selection is None, attn_q.shape[1] // attn_k.shape[1], q.dtype == torch.float32
    )
    unit = max(64, plan[2])
    norm = torch.full((len(q),), -torch.inf, dtype=torch.float32, device=q.device)
    whole = torch.zeros(len(q) if costs else 0, dtype=torch.float32, device=q.device)
    dq, dk, dw = (torch.zeros(x.shape if wants else (0, 0), dtype=torch.float32, device=q.device) for x in (q, k, w))
    total = torch.zeros((), dtype=torch.float64, device=q.device)
    pair = plan[0] * (4 + (4 if costs else 0) + q.element_size()) + k.shape[1] * k.element_size()
    for lists in key_lists(query_blocks(cu_seqlens, plan[0]), selection, unit=unit):
        for a, b in lists.slices(max(unit, slice_bytes // pair)):
            piece = _Slice(lists, a, b, plan[2], q.dtype, bool(costs))
            total = total + _run_slice(piece, tensors, costs, (norm, whole, dq, dk, dw), scale, plan, wants)
    return total, torch.isfinite(norm).sum(), (dq, dk, dw)


class _IndexerKL(torch.autograd.Function):
    """The loss and, where asked for, its gradients in one pass, as in torch_indexer.py."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor,
        selection: Selection | None, scale: float, cost: Omission | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wants = any(ctx.needs_input_grad[:3])
        total, rows, grads = kl_and_gradients(q, k, w, attn_q, attn_k, lse, cu_seqlens, selection, scale, cost, wants)
        ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(grads, (q, k, w), strict=True)))
        ctx.mark_non_differentiable(rows)
        return total.float(), rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return *((grad * x).to(x.dtype) for x in ctx.saved_tensors), None, None, None, None, None, None, None


def indexer_kl(
    q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None,
    scale: float, cost: Omission | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.indexer_kl` in these kernels. lse must be the attention's own over the same sets: the target is A / H."""
    return _IndexerKL.apply(q, k, w, attn_q.detach(), attn_k.detach(), lse.detach(), cu_seqlens, selection, scale, cost)
