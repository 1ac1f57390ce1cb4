"""What an inference forward does to each token between its matrix products, one launch each: a decode step is mostly launches.

split_heads   head norm, RoPE, queries out, keys and values into their pages
index_rows    LayerNorm and RoPE of the indexer's key, RoPE of its queries, key into its page
silu_mul      silu(gate) * up
The RMS norm with the residual sum is `invariant.rms_norm`. A row's bits depend on that row alone. torch_rows.py says the same in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _split_heads(
    qkv, q_weight, k_weight, cos, sin, slots, q_out, k_out, k_cache, v_cache, eps,
    row_stride, angle_stride, token_stride, head_stride,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    # Heads are numbered queries, keys, values; a program takes BLOCK_H neighbours of one kind.
    t, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_H
    head, d = first + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask = (head[:, None] >= 0) & (d < D)[None, :]
    at = qkv + t * row_stride + head[:, None] * D
    x = tl.load(at + d[None, :], mask=mask, other=0.0)
    slot = tl.load(slots + t)
    if first >= HQ + HKV:
        kv = head - HQ - HKV
        tl.store(v_cache + slot * token_stride + kv[:, None] * head_stride + d[None, :], x, mask=mask)
        return
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    mate = tl.load(at + other[None, :], mask=mask, other=0.0)
    kind = q_out.dtype.element_ty
    x, mate = x.to(tl.float32), mate.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x, mate = (x * scale).to(kind).to(tl.float32), (mate * scale).to(kind).to(tl.float32)
        if first < HQ:
            gain, gain2 = tl.load(q_weight + d, mask=d < D, other=0.0), tl.load(q_weight + other, mask=d < D, other=0.0)
        else:
            gain, gain2 = tl.load(k_weight + d, mask=d < D, other=0.0), tl.load(k_weight + other, mask=d < D, other=0.0)
        x = (x * gain.to(tl.float32)[None, :]).to(kind).to(tl.float32)
        mate = (mate * gain2.to(tl.float32)[None, :]).to(kind).to(tl.float32)
    c = tl.load(cos + t * angle_stride + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * angle_stride + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    turned = (x * c + mate * tl.where(d < half, -s, s)).to(kind)
    if first < HQ:
        tl.store(q_out + (t * HQ + head)[:, None] * D + d[None, :], turned, mask=mask)
    else:
        kv = head - HQ
        tl.store(k_cache + slot * token_stride + kv[:, None] * head_stride + d[None, :], turned, mask=mask)
        if KEEP:
            tl.store(k_out + (t * HKV + kv)[:, None] * D + d[None, :], turned, mask=mask)


@triton.jit
def pairs(d, ROPE: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr):
    """Of dim d under RoPE over the first ROPE dims: its partner, its angle's place in a row of cos, the partner's sign, whether it turns. PAIRS:
    neighbours are partners, not the dims of two halves."""
    if PAIRS:
        mate, angle, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        half: tl.constexpr = ROPE // 2
        mate = tl.where(d < half, d + half, d - half)
        angle, sign = tl.where(d < half, d, d - half), tl.where(d < half, -1.0, 1.0)
    turns = d < ROPE
    mate, angle = tl.where(turns, mate, d), tl.where(turns, angle, 0) * STEP
    return mate, angle, sign, turns


@triton.jit
def _folded(at, mask, piece_stride, PIECES: tl.constexpr):
    """The sum of what lies `piece_stride` apart, from zero in ascending order: what invariant.py's `linear` makes of its pieces."""
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32) + 0.0
    for p in tl.static_range(1, PIECES):
        total += tl.load(at + p * piece_stride, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _index_rows(
    proj, gamma, beta, cos, sin, slots, q_out, w_out, k_out, cache, eps, w_scale, piece_stride, row_stride, angle_stride,
    PIECES: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr,
    KEY: tl.constexpr, HEADS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    # proj holds the head queries (HEADS), then the key from column KEY on, then the head weights.
    t, d = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    row = proj + t * row_stride
    mate, angle, sign, turns = pairs(d, ROPE, STEP, PAIRS)
    c = tl.load(cos + t * angle_stride + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + t * angle_stride + angle, mask=turns, other=0.0).to(tl.float32) * sign
    kind = cache.dtype.element_ty

    key = _folded(row + KEY + d, d < D, piece_stride, PIECES)
    mean = tl.sum(key, 0) / D
    inverse = 1.0 / tl.sqrt_rn(tl.sum((key - mean) * (key - mean), 0) / D + eps)
    one = (key - mean) * inverse * tl.load(gamma + d) + tl.load(beta + d)
    two = _folded(row + KEY + mate, d < D, piece_stride, PIECES)
    two = (two - mean) * inverse * tl.load(gamma + mate) + tl.load(beta + mate)
    turned = tl.where(turns, one * c + two * s, one).to(kind)
    tl.store(cache + tl.load(slots + t) * D + d, turned)
    if KEEP:
        tl.store(k_out + t * D + d, turned)
    if HEADS:
        head = tl.arange(0, BLOCK_H)
        mask = (head < H)[:, None] & (d >= 0)[None, :]
        one2 = _folded(row + head[:, None] * D + d[None, :], mask, piece_stride, PIECES)
        two2 = _folded(row + head[:, None] * D + mate[None, :], mask, piece_stride, PIECES)
        both = tl.where(turns[None, :], one2 * c[None, :] + two2 * s[None, :], one2)
        tl.store(q_out + (t * H + head)[:, None] * D + d[None, :], both.to(q_out.dtype.element_ty), mask=mask)
        weight = _folded(row + KEY + D + head, head < H, piece_stride, PIECES)
        tl.store(w_out + t * H + head, weight * w_scale, mask=head < H)


@triton.jit
def _silu_mul(x, y, width, row_stride, BLOCK: tl.constexpr):
    t, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = tl.load(x + t * row_stride + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + t * row_stride + width + offs, mask=mask, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + t * width + offs, (gate * up).to(y.dtype.element_ty), mask=mask)


def split_heads(
    qkv: Tensor, heads: tuple[int, int, int], norms: tuple[Tensor, Tensor] | None, eps: float, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """qkv [T, (Hq + 2 Hkv) D] -> q [T, Hq, D], normed and turned; k and v go to the physical slots int64 [T] of their caches.

    heads: (Hq, Hkv, D); norms: RMS-norm weights [D] of q and k, or None; cos, sin [T, D], both halves alike; caches
    [pages, page, Hkv, D], pages back to back. keep: the turned keys too, [T, Hkv, D].
    """
    hq, hkv, dim = heads
    tokens = len(qkv)
    q = qkv.new_empty(tokens, hq, dim)
    k = qkv.new_empty(tokens, hkv, dim) if keep else None
    block = next(n for n in (8, 4, 2, 1) if hq % n == 0 and hkv % n == 0)
    q_norm, k_norm = norms or (None, None)
    if tokens:
        _split_heads[(tokens, (hq + 2 * hkv) // block)](
            qkv, q_norm, k_norm, cos, sin, slots, q, k, k_cache, v_cache, eps,
            qkv.stride(0), cos.stride(0), *k_cache.stride()[1:3],
            HQ=hq, HKV=hkv, D=dim, BLOCK_H=block, BLOCK_D=triton.next_power_of_2(dim), NORM=norms is not None, KEEP=keep,
            num_warps=2 if block >= 4 else 1,
        )  # fmt: skip
    return q, k


def index_rows(
    proj: Tensor, shape: tuple[int, int, int], norm: tuple[Tensor, Tensor, float], cos: Tensor, sin: Tensor, layout: str,
    slots: Tensor, cache: Tensor, queries: bool, keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The indexer's products -> q [T, H_I, D_I] in the cache's dtype, k likewise [T, D_I] (keep), w fp32 [T, H_I], scaled; k to its page.

    proj fp32 [T, D_I], the keys, or with `queries` [T, H_I D_I + D_I + H_I]: queries, keys, weights; or pieces of it [P, T, ...], to be added
    up. shape: (H_I, D_I, rope_dim); norm: LayerNorm weight, bias, eps; cos, sin [T, D] of the model; cache [pages, page, D_I].
    """
    heads, dim, rope = shape
    pieces, tokens = len(proj) if proj.ndim == 3 else 1, proj.shape[-2]
    q = torch.empty(tokens, heads, dim, dtype=cache.dtype, device=proj.device) if queries else None
    w = torch.empty(tokens, heads, dtype=torch.float32, device=proj.device) if queries else None
    k = torch.empty(tokens, dim, dtype=cache.dtype, device=proj.device) if keep else None
    if tokens:
        _index_rows[(tokens,)](
            proj, norm[0], norm[1], cos, sin, slots, q, w, k, cache, norm[2], (heads * dim) ** -0.5,
            proj.stride(0), proj.stride(-2), cos.stride(0), PIECES=pieces,
            H=heads, D=dim, ROPE=rope, STEP=cos.shape[-1] // rope if rope else 1, PAIRS=layout == "interleaved",
            BLOCK_H=triton.next_power_of_2(heads), KEY=heads * dim if queries else 0, HEADS=queries, KEEP=keep, num_warps=2,
        )  # fmt: skip
    return q, k, w


def silu_mul(x: Tensor) -> Tensor:
    """x [T, 2 I], gate before up -> silu(gate) * up [T, I]."""
    tokens, width = len(x), x.shape[1] // 2
    y = x.new_empty(tokens, width)
    if tokens:
        _silu_mul[(tokens, triton.cdiv(width, 1024))](x, y, width, x.stride(0), BLOCK=1024, num_warps=4)
    return y
