"""What a training step does to each token between its matrix products, with gradients: one launch forward and one back for each.

add_norm     the residual sum and its RMS norm
turn         RoPE of queries or keys, the model's or an indexer's
split_heads  queries and keys turned and values as they are, out of one product
silu_mul     silu(gate) * up, of one product or two

Written out in torch's operations these were half of a small model's launches and a third of its device time, and kept fp32 copies of every
input for the backward pass. Here that is the inputs themselves and a number a row. Results are rounded where transformers' modules
round them, gradients once. Sums run in a fixed order: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.rows import pairs

# How many rows there are is never compiled into a kernel: every batch has another number.
TILE = 2048  # numbers that a program has in hand
COLUMNS = 1024  # of a program of silu_mul
PROGRAMS = 528  # of a norm's backward: each keeps its own share of the weight's gradient


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x, residual, weight, total, y, scales, eps, rows,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (offs < C)[None, :]
    at = row[:, None] * C + offs[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        v = (v + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=mask)
        v = v.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, 1) / C + eps)
    tl.store(scales + row, scale, mask=row < rows)
    v = (v * scale[:, None]).to(y.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + offs, mask=offs < C, other=0.0).to(tl.float32)
    tl.store(y + at, (v * gain[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "per"])
def _norm_grad(
    grad, grad_total, total, weight, scales, dx, shares, rows, per,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    first, offs = tl.program_id(0).to(tl.int64) * per, tl.arange(0, BLOCK)
    gain = tl.load(weight + offs, mask=offs < C, other=0.0).to(tl.float32)[None, :]
    share = tl.zeros([BLOCK], tl.float32)
    for start in range(0, per, ROWS):
        inside = start + tl.arange(0, ROWS)
        row = first + inside
        kept = (inside < per) & (row < rows)
        mask, at = kept[:, None] & (offs < C)[None, :], row[:, None] * C + offs[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=kept, other=0.0)[:, None]
        v = tl.load(total + at, mask=mask, other=0.0).to(tl.float32) * scale
        if WEIGHT:
            share += tl.sum(g * v.to(total.dtype.element_ty).to(tl.float32), 0)
        g = g * gain
        d = scale * (g - v * (tl.sum(g * v, 1) / C)[:, None])
        if ADD:
            d += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
    if WEIGHT:
        tl.store(shares + tl.program_id(0).to(tl.int64) * C + offs, share, mask=offs < C)


@triton.jit(do_not_specialize=["rows"])
def _turn(
    x, cos, sin, y, rows, x_stride, angle_stride,
    HEADS: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # A row is a head of a token. Back is the turn the other way.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    mate, angle, sign, turns = pairs(d, ROPE, STEP, PAIRS)
    if BACK:
        sign = -sign
    mask = (row < rows)[:, None] & (d < D)[None, :]
    begin = ((row // HEADS) * x_stride + (row % HEADS) * D)[:, None]
    one = tl.load(x + begin + d[None, :], mask=mask, other=0.0).to(tl.float32)
    two = tl.load(x + begin + mate[None, :], mask=mask, other=0.0).to(tl.float32)
    at = (row // HEADS)[:, None] * angle_stride + angle[None, :]
    c = tl.load(cos + at, mask=mask & turns[None, :], other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=mask & turns[None, :], other=0.0).to(tl.float32) * sign[None, :]
    turned = tl.where(turns[None, :], one * c + two * s, one)
    tl.store(y + row[:, None] * D + d[None, :], turned.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _split_heads(
    qkv, cos, sin, q, k, v, rows, angle_stride,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # A row is a head of a token: H queries, HKV keys, HKV values. Back is from three gradients to one, turned the other way.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    mate, angle, sign, turns = pairs(d, D, 1, False)
    if BACK:
        sign = -sign
    token, head = row // (H + 2 * HKV), row % (H + 2 * HKV)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    of_q, of_v = (head < H)[:, None] & mask, (head >= H + HKV)[:, None] & mask
    of_k = mask & ~of_q & ~of_v
    at = token[:, None] * angle_stride + angle[None, :]
    c = tl.load(cos + at, mask=mask & turns[None, :] & ~of_v, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=mask & turns[None, :] & ~of_v, other=0.0).to(tl.float32) * sign[None, :]
    begin = (row * D)[:, None]
    to_q, to_k = ((token * H + head) * D)[:, None], ((token * HKV + head - H) * D)[:, None]
    to_v = ((token * HKV + head - H - HKV) * D)[:, None]
    if BACK:
        one = tl.load(q + to_q + d[None, :], mask=of_q, other=0.0).to(tl.float32)
        one += tl.load(k + to_k + d[None, :], mask=of_k, other=0.0).to(tl.float32)
        one += tl.load(v + to_v + d[None, :], mask=of_v, other=0.0).to(tl.float32)
        two = tl.load(q + to_q + mate[None, :], mask=of_q, other=0.0).to(tl.float32)
        two += tl.load(k + to_k + mate[None, :], mask=of_k, other=0.0).to(tl.float32)
        tl.store(qkv + begin + d[None, :], (one * c + two * s).to(qkv.dtype.element_ty), mask=mask)
    else:
        one = tl.load(qkv + begin + d[None, :], mask=mask, other=0.0).to(tl.float32)
        two = tl.load(qkv + begin + mate[None, :], mask=mask & ~of_v, other=0.0).to(tl.float32)
        turned = (one * c + two * s).to(q.dtype.element_ty)
        tl.store(q + to_q + d[None, :], turned, mask=of_q)
        tl.store(k + to_k + d[None, :], turned, mask=of_k)
        tl.store(v + to_v + d[None, :], turned, mask=of_v)


@triton.jit
def _silu_mul(gate, up, y, width, stride, BLOCK: tl.constexpr):
    # gate and up have `stride` numbers between their rows
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * stride + col, mask=col < width, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + col, mask=col < width, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + col, (silu * u).to(y.dtype.element_ty), mask=col < width)


@triton.jit
def _silu_mul_grad(grad, gate, up, dgate, dup, width, stride, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * stride + col
    d = tl.load(grad + row * width + col, mask=col < width, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=col < width, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=col < width, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dup + at, (d * g * sigmoid).to(dup.dtype.element_ty), mask=col < width)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), mask=col < width)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        x = x.contiguous()
        add = residual is not None
        total, y = torch.empty_like(x) if add else x, torch.empty_like(x)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        each = max(1, TILE // block)
        if rows:
            _norm[(triton.cdiv(rows, each),)](
                x, residual.contiguous() if residual is not None else None, weight, total, y, scales, eps, rows,
                C=width, BLOCK=block, ROWS=each, ADD=add, num_warps=4 if block <= 4096 else 8,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, scales)
        ctx.add = add
        return (total, y) if add else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total, weight, scales = ctx.saved_tensors
        grad, grad_total = grads[-1].contiguous(), grads[0].contiguous() if ctx.add else None
        width, rows = total.shape[-1], len(scales)
        block = triton.next_power_of_2(width)
        each = max(1, TILE // block)
        per = triton.cdiv(triton.cdiv(rows, PROGRAMS), each) * each
        programs = triton.cdiv(rows, per) if rows else 0
        wanted = ctx.needs_input_grad[2]
        dx = torch.empty_like(total)
        shares = torch.empty(programs if wanted else 0, width, dtype=torch.float32, device=total.device)
        if rows:
            _norm_grad[(programs,)](
                grad, grad_total, total, weight, scales, dx, shares, rows, per,
                C=width, BLOCK=block, ROWS=each, ADD=ctx.add, WEIGHT=wanted, num_warps=4 if block <= 4096 else 8,
            )  # fmt: skip
        return dx, dx if ctx.add else None, shares.sum(0).to(weight.dtype) if wanted else None, None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rope: int, layout: str, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = (rope, layout)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin, rope, layout, dtype, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        rope, layout = ctx.how
        return _turned(grads[0], cos, sin, rope, layout, ctx.dtype, back=True), None, None, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rope: int, layout: str, dtype: torch.dtype, back: bool) -> Tensor:
    tokens, heads, dim = x.shape
    x = x if x.stride()[1:] == (dim, 1) else x.contiguous()  # a part of each token's numbers will do
    y = torch.empty(tokens, heads, dim, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(dim)
    each = max(1, TILE // block)
    if tokens:
        _turn[(triton.cdiv(tokens * heads, each),)](
            x, cos, sin, y, tokens * heads, x.stride(0), cos.stride(0),
            HEADS=heads, D=dim, ROPE=rope, STEP=cos.shape[-1] // rope, PAIRS=layout == "interleaved", BLOCK=block, ROWS=each, BACK=back,
            num_warps=4,
        )  # fmt: skip
    return y


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, ...]:
        qkv = qkv.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        number, kv, dim = heads
        parts = tuple(torch.empty(len(qkv), n, dim, dtype=qkv.dtype, device=qkv.device) for n in (number, kv, kv))
        _run_split(qkv, cos, sin, parts, heads, back=False)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        parts = tuple(grad.contiguous() for grad in grads)
        number, kv, dim = ctx.heads
        qkv = torch.empty(len(parts[0]), (number + 2 * kv) * dim, dtype=parts[0].dtype, device=parts[0].device)
        _run_split(qkv, cos, sin, parts, ctx.heads, back=True)
        return qkv, None, None, None


def _run_split(
    qkv: Tensor, cos: Tensor, sin: Tensor, parts: tuple[Tensor, ...], heads: tuple[int, int, int], back: bool
) -> None:  # fmt: skip
    number, kv, dim = heads
    rows, block = len(qkv) * (number + 2 * kv), triton.next_power_of_2(dim)
    each = max(1, TILE // block)
    if rows:
        _split_heads[(triton.cdiv(rows, each),)](
            qkv, cos, sin, *parts, rows, cos.stride(0), H=number, HKV=kv, D=dim, BLOCK=block, ROWS=each, BACK=back, num_warps=4
        )  # fmt: skip


class _SiluMul(torch.autograd.Function):
    """Of two tensors, or of one whose halves they are: the gradients come as they went."""

    @staticmethod
    def forward(ctx: Any, *both: Tensor) -> Tensor:
        both = tuple(x.contiguous() for x in both)
        gate, up = _halves(both)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        width, rows = gate.shape[-1], gate.numel() // max(1, gate.shape[-1])
        if rows:
            grid = (rows, triton.cdiv(width, COLUMNS))
            _silu_mul[grid](gate, up, y, width, gate.stride(-2), BLOCK=COLUMNS, num_warps=4)
        ctx.save_for_backward(*both)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        both = ctx.saved_tensors
        into = tuple(torch.empty_like(x) for x in both)
        (gate, up), (dgate, dup) = _halves(both), _halves(into)
        width, rows = gate.shape[-1], gate.numel() // max(1, gate.shape[-1])
        if rows:
            grid = (rows, triton.cdiv(width, COLUMNS))
            _silu_mul_grad[grid](
                grads[0].contiguous(), gate, up, dgate, dup, width, gate.stride(-2), BLOCK=COLUMNS, num_warps=4
            )
        return into


def _halves(both: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    gate, up = both if len(both) == 2 else both[0].chunk(2, -1)
    return gate, up


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., C]; weight [C] -> their sum, and its RMS norm times the weight, both in their dtype."""
    return _AddNorm.apply(x, residual, weight, eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of x [..., C] over its last dimension, times weight [C]."""
    return _AddNorm.apply(x, None, weight, eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor, rope: int, layout: str, dtype: torch.dtype) -> Tensor:
    """x [T, H, D] with its first `rope` dims turned, in `dtype`.

    cos, sin [T, W], both halves alike, W a multiple of rope: every (W / rope)-th angle is taken, as `indexer.rope_angles` does. layout:
    which dims are a pair, those of two "half"s or "interleaved" neighbours.
    """
    return _Turn.apply(x, cos, sin, rope, layout, dtype)


def split_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 Hkv) D], heads (H, Hkv, D) -> q [T, H, D] and k [T, Hkv, D] turned over whole heads, v [T, Hkv, D], all contiguous.

    cos, sin [T, D], both halves alike; dims of two halves are a pair.
    """
    q, k, v = _SplitHeads.apply(qkv, cos, sin, heads)
    return q, k, v


def silu_mul(*both: Tensor) -> Tensor:
    """silu(gate) * up: of gate and up, [..., T, F] both, or of [..., T, 2 F], gate before up."""
    return _SiluMul.apply(*both)
