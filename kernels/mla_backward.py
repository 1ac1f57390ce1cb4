"""Gradients of absorbed MLA over selected sets: dq [T, H, 576] and dkv [T, 576], the same bits in every run.

    _shares   a query's tile of keys: weights and slopes once, its share of dkv (P^T dO + dS^T Q) to a row of its own
    _queries  dq = dS K over a query's whole set
    add_rows  the shares of a key, in the order of the queries, in fp32

A share is the sum over a block of heads in fp32, rounded once to the inputs' dtype. Queries go in chunks whose shares fit PARTS_BYTES.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.mla_prefill import absolute, mla_prefill
from winnow.kernels.segments import add_rows
from winnow.kernels.selection import Selection
from winnow.kernels.sparse_prefill import capability

LATENT, WIDTH = 512, 576
PARTS_BYTES = 1 << 31


@triton.jit
def _delta(grad, out, delta, LATENT: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, LATENT)
    product = tl.load(grad + row * LATENT + d).to(tl.float32) * tl.load(out + row * LATENT + d).to(tl.float32)
    tl.store(delta + row, tl.sum(product, 0))


@triton.jit
def _shares(
    q, kv, grad, lse, delta, rows, slopes, parts, sums, first, K, scale,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, ATOMIC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Tile of BLOCK_N keys of a query and BLOCK_H heads; slopes [queries, K, H] and parts [queries * K, blocks, 576] of a chunk."""
    BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tiles = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    part, tile, query = pid % BLOCKS, pid // BLOCKS % tiles, (pid // (BLOCKS * tiles)).to(tl.int64)
    h, n, d = part * BLOCK_H + tl.arange(0, BLOCK_H), tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_h = h < H
    row = tl.load(rows + (first + query) * K + n, mask=n < K, other=-1)
    valid = row >= 0
    head = (first + query) * H + h
    at_k = kv + row.to(tl.int64)[:, None] * 576 + d[None, :]
    at_q = q + head[:, None] * 576 + d[None, :]
    at_g = grad + head[:, None] * 512 + d[None, :]
    score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    slope = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for c in range(0, 512, BLOCK_D):
        key = tl.load(at_k + c, mask=valid[:, None], other=0.0)  # [N, D]
        own = tl.load(at_q + c, mask=mask_h[:, None], other=0.0)  # [H, D]
        given = tl.load(at_g + c, mask=mask_h[:, None], other=0.0)
        if UPCAST:
            key, own, given = key.to(tl.float32), own.to(tl.float32), given.to(tl.float32)
        score = tl.dot(key, tl.trans(own), score, input_precision="ieee")
        slope = tl.dot(key, tl.trans(given), slope, input_precision="ieee")
    r = 512 + tl.arange(0, 64)
    rope = tl.load(kv + row.to(tl.int64)[:, None] * 576 + r[None, :], mask=valid[:, None], other=0.0)
    own = tl.load(q + head[:, None] * 576 + r[None, :], mask=mask_h[:, None], other=0.0)
    if UPCAST:
        rope, own = rope.to(tl.float32), own.to(tl.float32)
    score = tl.dot(rope, tl.trans(own), score, input_precision="ieee")
    norm = tl.load(lse + head, mask=mask_h, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm)
    weight = tl.exp2((score * scale - norm[None, :]) * 1.4426950408889634)
    weight = tl.where(valid[:, None] & mask_h[None, :], weight, 0.0)  # [N, H]
    slope = weight * (slope - tl.load(delta + head, mask=mask_h, other=0.0)[None, :]) * scale
    weight, slope = weight.to(own.dtype), slope.to(own.dtype)
    at_s = slopes + (query * K + n)[:, None] * H + h[None, :]
    tl.store(at_s, slope.to(slopes.dtype.element_ty), mask=(n < K)[:, None] & mask_h[None, :])

    share = tl.dot(slope, own, input_precision="ieee")  # the rotary columns
    place = ((query * K + n) * BLOCKS + part)[:, None] * 576
    if ATOMIC:
        place = row.to(tl.int64)[:, None] * 576
        tl.atomic_add(sums + place + r[None, :], share, mask=valid[:, None], sem="relaxed")
    else:
        tl.store(parts + place + r[None, :], share.to(parts.dtype.element_ty), mask=valid[:, None])
    w = tl.arange(0, COLUMNS)
    for c in range(0, 512, COLUMNS):
        more = tl.load(q + head[:, None] * 576 + (c + w)[None, :], mask=mask_h[:, None], other=0.0)  # [H, W]
        other = tl.load(grad + head[:, None] * 512 + (c + w)[None, :], mask=mask_h[:, None], other=0.0)
        if UPCAST:
            more, other = more.to(tl.float32), other.to(tl.float32)
        wide = tl.dot(slope, more, input_precision="ieee")
        wide = tl.dot(weight, other, wide, input_precision="ieee")
        if ATOMIC:
            tl.atomic_add(sums + place + (c + w)[None, :], wide, mask=valid[:, None], sem="relaxed")
        else:
            tl.store(parts + place + (c + w)[None, :], wide.to(parts.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _queries(
    kv, rows, slopes, dq, first, K,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of one query, BLOCK_H heads and one half of the columns: 256 latent ones and 32 rotary ones."""
    BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    half, part, query = pid % 2, pid // 2 % BLOCKS, (pid // (2 * BLOCKS)).to(tl.int64)
    h, n = part * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    latent, rope = half * 256 + tl.arange(0, 256), 512 + half * 32 + tl.arange(0, 32)
    mask_h = h < H
    acc = tl.zeros([BLOCK_H, 256], tl.float32)
    acc_rope = tl.zeros([BLOCK_H, 32], tl.float32)
    for start in range(0, K, BLOCK_N):
        row = tl.load(rows + (first + query) * K + start + n, mask=start + n < K, other=-1)
        valid = row >= 0
        at = kv + row.to(tl.int64)[:, None] * 576
        key = tl.load(at + latent[None, :], mask=valid[:, None], other=0.0)
        key_rope = tl.load(at + rope[None, :], mask=valid[:, None], other=0.0)
        at_s = slopes + (query * K + start + n)[:, None] * H + h[None, :]
        slope = tl.load(at_s, mask=(start + n < K)[:, None] & mask_h[None, :], other=0.0)  # [N, H]
        if UPCAST:
            key, key_rope, slope = key.to(tl.float32), key_rope.to(tl.float32), slope.to(tl.float32)
        acc = tl.dot(tl.trans(slope), key, acc, input_precision="ieee")
        acc_rope = tl.dot(tl.trans(slope), key_rope, acc_rope, input_precision="ieee")
    at = dq + ((first + query) * H + h)[:, None] * 576
    tl.store(at + latent[None, :], acc.to(dq.dtype.element_ty), mask=mask_h[:, None])
    tl.store(at + rope[None, :], acc_rope.to(dq.dtype.element_ty), mask=mask_h[:, None])


def backward_plan(sm: int, heads: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of `_shares` and `_queries`."""
    block_h = min(64, max(16, triton.next_power_of_2(heads)))
    if sm == 0:
        return (
            {"BLOCK_H": 16, "BLOCK_N": 32, "BLOCK_D": 128, "COLUMNS": 256, "num_warps": 4, "num_stages": 1},
            {"BLOCK_H": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        )
    roomy = sm in (80, 90)
    return (
        {"BLOCK_H": block_h, "BLOCK_N": 128 if sm >= 90 else 64, "BLOCK_D": 64, "COLUMNS": 128 if roomy else 64,
         "num_warps": 8 if sm >= 90 else 4, "num_stages": 3 if roomy else 2},
        {"BLOCK_H": block_h, "BLOCK_N": 64 if roomy else 32, "num_warps": 8, "num_stages": 3 if roomy else 2},
    )  # fmt: skip


def mla_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, rows: Tensor, scale: float,
    parts_bytes: int = PARTS_BYTES, atomic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq [T, H, 576] and dkv [T, 576] in the inputs' dtypes from grad and out [T, H, 512], lse fp32 [T, H], rows int32 [T, k].

    atomic=True adds the shares with fp32 atomics instead: another order in every run, for comparison only.
    """
    grad, q, kv, out, lse, rows = (x.contiguous() for x in (grad, q, kv, out, lse, rows))
    tokens, heads = q.shape[:2]
    k = rows.shape[1]
    for_shares, for_queries = backward_plan(capability(q.device), heads)
    blocks = triton.cdiv(heads, for_shares["BLOCK_H"])
    delta = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    dq, sums = torch.empty_like(q), torch.zeros(len(kv), WIDTH, dtype=torch.float32, device=kv.device)
    if tokens == 0:
        return dq, sums.to(kv.dtype)
    _delta[(tokens * heads,)](grad, out, delta, LATENT=LATENT)
    step = max(1, min(tokens, parts_bytes // (k * (blocks * WIDTH + heads) * kv.element_size())))
    slopes = torch.empty(step * k * heads, dtype=kv.dtype, device=kv.device)
    parts = torch.empty(0 if atomic else step * k * blocks, WIDTH, dtype=kv.dtype, device=kv.device)
    common = {"H": heads, "UPCAST": q.device.type == "cpu", "enable_fp_fusion": True}
    for first in range(0, tokens, step):
        num = min(step, tokens - first)
        tiles = triton.cdiv(k, for_shares["BLOCK_N"])
        _shares[(num * tiles * blocks,)](
            q, kv, grad, lse, delta, rows, slopes, parts, sums, first, k, scale, ATOMIC=atomic, **common, **for_shares
        )
        _queries[(num * blocks * 2,)](kv, rows, slopes, dq, first, k, **common, **for_queries)
        if not atomic:
            keys = rows[first : first + num].reshape(-1)
            keys = keys.repeat_interleave(blocks) if blocks > 1 else keys
            add_rows(parts[: len(keys)], keys, sums)
    return dq, sums.to(kv.dtype)


class _MlaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows = absolute(selection, cu_seqlens, len(q))
        out, lse = mla_prefill(q, kv, rows, scale)
        sets = () if selection is None else (selection.indices, selection.counts)
        ctx.save_for_backward(
            q, kv, out, lse, cu_seqlens, *sets
        )  # not in attributes: checkpointing lets go of tensors only
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        q, kv, out, lse, cu_seqlens, *sets = ctx.saved_tensors
        rows = absolute(Selection(*sets) if sets else None, cu_seqlens, len(q))
        return *mla_backward(grad, q, kv, out, lse, rows, ctx.scale), None, None, None


def mla_attention(
    q: Tensor, kv: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [T, H, 576], kv [T, 576] packed -> out [T, H, 512], lse fp32 [T, H] without gradient; differentiable in q and kv."""
    return _MlaAttention.apply(q, kv, cu_seqlens, selection, scale)
