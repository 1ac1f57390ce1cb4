"""Sparse attention of packed queries, grouped-query form: tiles of (block of neighbouring queries) x (64 keys of its list).

The rows of a tile are the block's queries times the heads that share a kv head (at most 128 rows), so a key is read once for all of
them. key_lists.py makes the lists; without a selection they hold every position and the tiles are plain causal ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.key_lists import UNIT, WHOLE, Lists, keep_small, key_lists, query_blocks
from winnow.kernels.selection import Selection

LOG2E = 1.4426950408889634


@triton.jit
def row_places(first, rows, kv, HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr):  # fmt: skip
    """Offsets and mask of a block's rows [BLOCK_Q * PACK, BLOCK_D], the heads of kv's group query by query; [T * H] rows and their mask."""
    m = tl.arange(0, BLOCK_Q * PACK)
    query, member = m // PACK, m % PACK
    inside = (query < rows) & (member < GROUP)
    head = (first + query).to(tl.int64) * HEADS + kv * GROUP + member
    d = tl.arange(0, BLOCK_D)
    return head[:, None] * D + d[None, :], inside[:, None] & (d < D)[None, :], head, inside


@triton.jit
def tile_mask(
    bits, entry, key, row, inside, query,
    DENSE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which (row, key) pairs of a tile are selected: bool [rows, BLOCK_N]. key: packed rows [BLOCK_N], row: packed rows of the queries."""
    if DENSE:
        chosen = inside[:, None] & (key <= row[:, None])
    else:
        n = tl.arange(0, BLOCK_N)
        at = bits + entry // 32 * BLOCK_Q + query
        word = tl.load(at)[:, None]
        if BLOCK_N == 64:
            word = tl.where(n[None, :] < 32, word, tl.load(at + BLOCK_Q)[:, None])
        chosen = ((word >> (n & 31)[None, :]) & 1) != 0
    return chosen


@triton.jit(do_not_specialize=["begin", "blocks"], do_not_specialize_on_alignment=["stops"])
def _forward(
    q, k, v, out, lse, keys, bits, offsets, stops, first, rows, origin, shift, begin, blocks, scale_log2,
    HKV: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    kv, block = tl.program_id(0) % HKV, blocks - 1 - tl.program_id(0) // HKV  # the longest lists first
    row0, num, base = tl.load(first + begin + block), tl.load(rows + begin + block), tl.load(origin + begin + block)
    at, mask_q, head, inside = row_places(row0, num, kv, HKV * GROUP, GROUP, PACK, D, BLOCK_D, BLOCK_Q)
    query = tl.load(q + at, mask=mask_q, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    member = tl.arange(0, BLOCK_Q * PACK) // PACK
    move = tl.load(shift + begin + block)
    row = row0 + move + member
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    start, stop = tl.load(offsets + block), tl.load(stops + block)
    top = tl.full([BLOCK_Q * PACK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q * PACK], tl.float32)
    acc = tl.zeros([BLOCK_Q * PACK, BLOCK_D], tl.float32)
    for entry in range(start, stop, BLOCK_N):
        if WHOLE:
            key = base + entry - start + n
            there = key < row0 + num + move
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
        score = tl.dot(query, tl.trans(keyed), input_precision="ieee") * scale_log2
        score = tl.where(chosen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    norm = tl.where(total > 0, total, 1.0)
    tl.store(out + at, (acc / norm[:, None]).to(out.dtype.element_ty), mask=mask_q)
    tl.store(lse + head, tl.where(total > 0, (top + tl.log2(norm)) * 0.6931471805599453, float("-inf")), mask=inside)


def tile_plan(group: int, dim: int, sm: int) -> tuple[int, int, int, int]:
    """(queries of a block, keys of a step, warps, stages) for `group` heads a kv head, dimension and compute capability (0: CPU)."""
    pack = triton.next_power_of_2(group)
    if sm == 0:
        return max(1, 32 // pack), 64, 4, 1
    rows = 128 if sm >= 90 and dim <= 128 else 64
    roomy = sm in (80, 90)
    stages = 5 if sm >= 90 and dim <= 128 else 3 if roomy and dim <= 128 else 2
    return max(1, rows // pack), 64 if roomy and dim <= 128 else 32, 8 if rows == 128 else 4, stages


def capability(device: torch.device) -> int:
    """10 * major + minor; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def plan_for(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """`tile_plan` of these tensors; fp32 takes the tiles of twice the dimension."""
    return tile_plan(q.shape[1] // k.shape[1], q.shape[2] * q.element_size() // 2, capability(q.device))


def context_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, keys: tuple[tuple[int, int], ...], selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sparse_prefill` for queries at the end of longer contexts: keys says where each sequence's rows of k and v begin, and how many."""
    check_shapes(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    plan = plan_for(q, k)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for lists in key_lists(query_blocks(cu_seqlens, plan[0], keys), selection, bare=True):
        forward_piece(q, k, v, out, lse, lists, scale, plan)
    return out, lse


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"sparse attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit [T, H, D] and [T, Hkv, D]"
        )


def forward_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
    plan: tuple[int, int, int, int],
) -> None:
    """Fill out [T, H, D] and lse fp32 [T, H] for the queries of one piece. All contiguous."""
    kv_heads, dim = k.shape[1:]
    group = q.shape[1] // kv_heads
    blocks = lists.end - lists.begin
    host = lists.blocks
    if (
        host.longest > WHOLE and plan[1] == UNIT and capability(q.device) // 10 == 9
    ):  # tiles of short contexts are soon done
        from winnow.kernels import gqa_prefill_sm90  # Gluon

        if gqa_prefill_sm90.fits(q, k, host.size, scale):
            gqa_prefill_sm90.launch(q, k, v, out, lse, lists, scale)
            return
    _forward[(blocks * kv_heads,)](
        q, k, v, out, lse, lists.keys, lists.bits, lists.offsets, lists.stops, host.first, host.rows, host.origin, host.shift, lists.begin,
        blocks, scale * LOG2E,
        HKV=kv_heads, GROUP=group, PACK=triton.next_power_of_2(group), D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_Q=host.size, BLOCK_N=plan[1], DENSE=lists.bits is None, WHOLE=lists.bits is None or lists.fixed, UPCAST=q.device.type == "cpu",
        num_warps=plan[2], num_stages=plan[3], enable_fp_fusion=True,
    )  # fmt: skip


def sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float, kept: list[Lists] | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [T, H, D], k and v [T, Hkv, D] packed -> out [T, H, D] in q's dtype, lse fp32 [T, H] (natural; -inf and out 0 on an empty set).

    kept: filled with the lists for the backward while they are small beside q, or no larger where they were not waited for. Positions outside [0, t] of a set and
    repeated ones change nothing. Bits depend on a block's queries, and on whether a sequence is longer than `key_lists.WHOLE`.
    """
    check_shapes(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    plan = plan_for(q, k)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    assert UNIT % plan[1] == 0
    for lists in key_lists(query_blocks(cu_seqlens, plan[0]), selection):
        forward_piece(q, k, v, out, lse, lists, scale, plan)
        if kept is not None:
            keep_small(kept, lists, q.nbytes // 4 if lists.shared is None else q.nbytes)
    return out, lse
