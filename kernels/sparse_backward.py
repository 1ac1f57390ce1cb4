"""Gradients of sparse_prefill.py, the same bits in every run: no float atomics.

One pass over the tiles of the forward recomputes the weights, sums dQ in registers and writes each tile's share of dK and dV to a row
of its own, in the inputs' dtype; segments.py adds the shares of a key in the order of the blocks, in fp32. The shares of a piece are
bounded by PARTS_BYTES.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.key_lists import Lists, all_kept, key_lists, query_blocks
from winnow.kernels.packing import known, on_host
from winnow.kernels.segments import add_rows
from winnow.kernels.selection import Selection
from winnow.kernels.sparse_prefill import capability, plan_for, row_places, sparse_prefill, tile_mask

PARTS_BYTES = 1 << 31


@triton.jit(do_not_specialize=["begin", "blocks"], do_not_specialize_on_alignment=["offsets", "stops"])
def _backward(
    q, k, v, out, grad, lse, dq, parts, sums, keys, bits, offsets, stops, first, rows, origin, begin, blocks, shift, scale,
    HKV: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, DENSE: tl.constexpr, ATOMIC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    kv, block = tl.program_id(0) % HKV, blocks - 1 - tl.program_id(0) // HKV
    row0, num, base = tl.load(first + begin + block), tl.load(rows + begin + block), tl.load(origin + begin + block)
    offset, mask_q, head, inside = row_places(row0, num, kv, HKV * GROUP, GROUP, PACK, D, BLOCK_D, BLOCK_Q)
    query = tl.load(q + offset, mask=mask_q, other=0.0)
    given = tl.load(grad + offset, mask=mask_q, other=0.0)
    delta = tl.sum(given.to(tl.float32) * tl.load(out + offset, mask=mask_q, other=0.0).to(tl.float32), 1)
    norm = tl.load(lse + head, mask=inside, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm) * 1.4426950408889634
    if UPCAST:
        query, given = query.to(tl.float32), given.to(tl.float32)
    member = tl.arange(0, BLOCK_Q * PACK) // PACK
    row = row0 + member
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    start, stop = tl.load(offsets + block), tl.load(stops + block)
    acc = tl.zeros([BLOCK_Q * PACK, BLOCK_D], tl.float32)
    for entry in range(start, stop, BLOCK_N):
        if DENSE:
            key = base + entry - start + n
            there = key < row0 + num
        else:
            key = tl.load(keys + entry + n)
            there = key >= 0
        where = (key.to(tl.int64) * HKV + kv)[:, None] * D + d[None, :]
        mask = there[:, None] & (d < D)[None, :]
        keyed = tl.load(k + where, mask=mask, other=0.0)  # [N, D]
        value = tl.load(v + where, mask=mask, other=0.0)
        if UPCAST:
            keyed, value = keyed.to(tl.float32), value.to(tl.float32)
        chosen = tile_mask(bits, entry, key[None, :], row, inside, member, DENSE, BLOCK_Q, BLOCK_N)
        score = tl.dot(query, tl.trans(keyed), input_precision="ieee") * (scale * 1.4426950408889634)
        weight = tl.where(chosen, tl.exp2(score - norm[:, None]), 0.0)  # [M, N]
        slope = tl.dot(given, tl.trans(value), input_precision="ieee")
        slope = (weight * (slope - delta[:, None]) * scale).to(keyed.dtype)
        share_v = tl.dot(tl.trans(weight.to(value.dtype)), given, input_precision="ieee")  # [N, D]
        share_k = tl.dot(tl.trans(slope), query, input_precision="ieee")
        acc = tl.dot(slope, keyed, acc, input_precision="ieee")
        if ATOMIC:
            to = sums + (key.to(tl.int64) * HKV + kv)[:, None] * (2 * D) + d[None, :]
            tl.atomic_add(to, share_k, mask=mask, sem="relaxed")
            tl.atomic_add(to + D, share_v, mask=mask, sem="relaxed")
        else:
            to = parts + ((entry - shift + n).to(tl.int64) * HKV + kv)[:, None] * (2 * D) + d[None, :]
            tl.store(to, share_k.to(parts.dtype.element_ty), mask=mask)
            tl.store(to + D, share_v.to(parts.dtype.element_ty), mask=mask)
    tl.store(dq + offset, acc.to(dq.dtype.element_ty), mask=mask_q)


def _backward_plan(plan: tuple[int, int, int, int], sm: int, dim: int) -> tuple[int, int, int]:
    """(keys of a step, warps, stages): two more tiles of queries and the weights live in shared memory than in the forward."""
    if sm == 0:
        return plan[1], 4, 1
    return (64, 8, 3) if sm >= 90 and dim <= 128 else (32, plan[2], 1 if sm in (86, 89) or dim > 128 else 2)


def _backward_slice(
    tensors: tuple[Tensor, ...], grads: tuple[Tensor, Tensor], lists: Lists, a: int, b: int, scale: float, shape: tuple[int, int, int],
    atomic: bool,
) -> None:  # fmt: skip
    """Blocks [a, b) of a piece; grads: dq, filled, and sums fp32 [T, Hkv, 2, D], added to."""
    q, k, v, out, grad, lse = tensors
    kv_heads, dim = k.shape[1:]
    group = q.shape[1] // kv_heads
    shift, stop = lists.ends[a], lists.ends[b]
    parts = torch.empty(0 if atomic else stop - shift, kv_heads * 2 * dim, dtype=k.dtype, device=k.device)
    host = lists.blocks
    _backward[((b - a) * kv_heads,)](
        q, k, v, out, grad, lse, grads[0], parts, grads[1], lists.keys, lists.bits, lists.offsets[a:], lists.stops[a:], host.first, host.rows,
        host.origin, lists.begin + a, b - a, shift, scale,
        HKV=kv_heads, GROUP=group, PACK=triton.next_power_of_2(group), D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_Q=host.size, BLOCK_N=shape[0], DENSE=lists.bits is None, ATOMIC=atomic, UPCAST=q.device.type == "cpu",
        num_warps=shape[1], num_stages=shape[2], enable_fp_fusion=True,
    )  # fmt: skip
    if not atomic:
        add_rows(parts, lists.keys[shift:stop], grads[1].view(len(k), -1), lists.order(shift, stop, len(k)))


def sparse_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float,
    parts_bytes: int = PARTS_BYTES, atomic: bool = False, kept: list[Lists] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v from grad and out [T, H, D] and lse [T, H].

    kept: the lists that `sparse_prefill` made, if it handed out all of them. Extra memory: parts_bytes, a bitmap and lists of one
    piece, and fp32 sums of dk and dv. atomic=True adds the shares with fp32
    atomics instead: another order in every run, for comparison only.
    """
    sm = capability(q.device)
    tensors = tuple(x.contiguous() for x in (q, k, v, out, grad, lse))
    kv_heads, dim = k.shape[1:]
    plan = plan_for(q, k)
    shape = _backward_plan(plan, sm, dim * q.element_size() // 2)
    dq = torch.empty_like(tensors[0])
    sums = torch.zeros(len(k), kv_heads, 2, dim, dtype=torch.float32, device=k.device)
    entries = max(1, parts_bytes // (kv_heads * 2 * dim * k.element_size()))
    for lists in kept or key_lists(query_blocks(cu_seqlens, plan[0]), selection):
        for a, b in lists.slices(entries):
            _backward_slice(tensors, (dq, sums), lists, a, b, scale, shape, atomic)
    return dq, sums[:, :, 0].to(k.dtype), sums[:, :, 1].to(v.dtype)


class _SparseAttention(torch.autograd.Function):
    """Sets and lists are saved as tensors are: what a context holds in attributes would outlive a checkpointed layer's forward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        kept: list[Lists] = []
        wanted = kept if any(ctx.needs_input_grad[:3]) else None
        out, lse = sparse_prefill(q, k, v, cu_seqlens, selection, scale, wanted)
        sets = () if selection is None else (selection.indices, selection.counts)
        whole = all_kept(kept) or []  # none: they are made again in the backward
        parts = [x for lists in whole for x in (lists.keys, lists.offsets, lists.stops, lists.bits)]
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, *sets, *parts)
        ctx.scale, ctx.num_sets = scale, len(sets)
        ctx.pieces = [(lists.blocks, lists.begin, lists.end, lists.ends, lists.shared, lists.fixed) for lists in whole]
        ctx.bounds = on_host(cu_seqlens)  # a checkpointed layer gives back another tensor, of unknown values
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        q, k, v, out, lse, cu_seqlens, *rest = ctx.saved_tensors
        selection = Selection(rest[0], rest[1]) if ctx.num_sets else None
        fours = zip(*(iter(rest[ctx.num_sets :]),) * 4, strict=True)
        kept = [
            Lists(blocks, begin, end, keys, offsets, stops, bits, ends, shared, fixed)
            for (blocks, begin, end, ends, shared, fixed), (keys, offsets, stops, bits) in zip(
                ctx.pieces, fours, strict=True
            )
        ]
        bounds = known(cu_seqlens, ctx.bounds)
        grads = sparse_backward(grad, q, k, v, out, lse, bounds, selection, ctx.scale, kept=kept or None)
        return *grads, None, None, None


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`ops.sparse_attention` in these kernels. Autograd keeps q, k, v, out, lse, the index sets, and lists that are small beside q."""
    return _SparseAttention.apply(q, k, v, cu_seqlens, selection, scale)
