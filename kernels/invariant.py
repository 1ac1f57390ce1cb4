"""Batch-invariant linear, RMS norm and softmax: a row's bits do not depend on how many rows are computed with it.

Linear: weights are the rows of the product and tokens its columns; blocks, and the number of pieces the inner dimension is cut
into, follow from the weight's shape alone. The pieces are added in ascending order, whoever adds them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _product(
    row_w, row_x, acc, here_n, here_t, first, last, K, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_T] plus the product of columns [first, last) of the weight's rows and the tokens."""
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        w = tl.load(row_w + offs_k[None, :], mask=here_n[:, None] & (offs_k < K)[None, :], other=0.0)
        v = tl.load(row_x + offs_k[None, :], mask=here_t[:, None] & (offs_k < K)[None, :], other=0.0)
        if UPCAST:
            w, v = w.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(w, tl.trans(v), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _linear(
    x, weight, bias, y, parts, arrivals, tokens, N, K, x_stride, weight_stride,
    PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    FOLD: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    piece, block = (0, tl.program_id(0)) if FOLD == "here" else (tl.program_id(0) % PIECES, tl.program_id(0) // PIECES)
    offs_n, offs_t = block * BLOCK_N + tl.arange(0, BLOCK_N), group * BLOCK_T + tl.arange(0, BLOCK_T)
    row_w = weight + offs_n.to(tl.int64)[:, None] * weight_stride
    row_x = x + offs_t.to(tl.int64)[:, None] * x_stride
    here_n, here_t = offs_n < N, offs_t < tokens
    zeros = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    last = tl.minimum(piece * PIECE + PIECE, K)
    acc = _product(row_w, row_x, zeros, here_n, here_t, piece * PIECE, last, K, BLOCK_K, UPCAST, PRECISION)
    mask = here_n[:, None] & here_t[None, :]
    at = offs_t.to(tl.int64)[None, :] * N + offs_n[:, None]
    size = tl.cast(tokens, tl.int64) * N
    if FOLD == "later":
        tl.store(parts + piece * size + at, acc, mask=mask)
    else:
        if FOLD == "here":
            for p in range(1, PIECES):
                last = tl.minimum(p * PIECE + PIECE, K)
                acc += _product(row_w, row_x, zeros, here_n, here_t, p * PIECE, last, K, BLOCK_K, UPCAST, PRECISION)
        else:
            tl.store(parts + piece * size + at, acc, mask=mask)
            tl.debug_barrier()
            count = arrivals + group * tl.num_programs(0) // PIECES + block
            if tl.atomic_add(count, 1, sem="acq_rel") != PIECES - 1:
                return
            tl.store(count, 0)
            acc = zeros
            for p in tl.static_range(PIECES):
                acc += tl.load(parts + p * size + at, mask=mask, other=0.0, cache_modifier=".cg")
        if BIAS:
            acc += tl.load(bias + offs_n, mask=here_n, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm(x, weight, y, residual, wide, eps, C, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = offs < C
    v = tl.load(x + row * C + offs, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        v = (v + tl.load(residual + row * C + offs, mask=mask, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + row * C + offs, v, mask=mask)
        v = v.to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / C + eps)
    scaled = v.to(y.dtype.element_ty).to(tl.float32) * tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
    scaled = scaled.to(y.dtype.element_ty)
    tl.store(y + row * C + offs, scaled, mask=mask)
    if WIDE:
        tl.store(wide + row * C + offs, scaled.to(tl.float32), mask=mask)


@triton.jit
def _softmax(x, y, C, LOG: tl.constexpr, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, C, BLOCK):
        top = tl.maximum(
            top, tl.load(x + row * C + start + offs, mask=start + offs < C, other=float("-inf")).to(tl.float32)
        )
    peak = tl.max(top, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        sums += tl.exp(
            tl.load(x + row * C + start + offs, mask=start + offs < C, other=float("-inf")).to(tl.float32) - peak
        )
    total = tl.sum(sums, 0)
    for start in range(0, C, BLOCK):
        mask = start + offs < C
        v = tl.load(x + row * C + start + offs, mask=mask, other=float("-inf")).to(tl.float32) - peak
        v = v - tl.log(total) if LOG else tl.exp(v) / total
        tl.store(y + row * C + start + offs, v.to(y.dtype.element_ty), mask=mask)


def linear_plan(n, k, bytes_each=2):
    """(rows of the weight per program, pieces of the inner dimension): from the weight's shape and the size of its numbers only."""
    block_n, pieces, shortest = 64, 1, 1536 if bytes_each < 4 else 128
    while triton.cdiv(n, block_n) * pieces < 128 and k // (pieces * 2) >= shortest:
        pieces *= 2
    return block_n, pieces


@dataclass(frozen=True, kw_only=True)
class LinearTiles:
    """How one product is cut. Of these only block_n, block_k and piece (columns of one of `pieces`) define its bits."""

    block_n: int
    block_t: int
    block_k: int
    pieces: int
    piece: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, x, weight, precision, plan=None, block_t=None, block_k=None, num_warps=4, num_stages=None):
        tokens, k = x.shape
        n = len(weight)
        wide = x.element_size() == 4
        block_k = block_k or (32 if wide else 128)
        block_n, pieces = plan or linear_plan(n, k, x.element_size())
        if (
            plan is None and not wide and tokens > 64 and n >= 8192
        ):  # a wider tile: rows of the weight do not mix either
            block_n, block_t, block_k, num_warps, num_stages = 128, 128, 64, 8, 4
        if x.is_cuda and torch.cuda.get_device_capability(x.device) in ((8, 6), (8, 9)):
            block_k = min(block_k, 64)  # 99 KiB of shared memory
        programs = triton.cdiv(n, block_n) * pieces
        widest = (
            128 if programs >= 100 else 64 if programs >= 64 else 32
        )  # columns do not mix: their number changes no bits
        block_t = block_t or min(widest, max(16, triton.next_power_of_2(tokens)))
        num_stages = num_stages or (3 if block_t == 128 or (wide and precision == "ieee") else 4)
        piece = triton.cdiv(triton.cdiv(k, pieces), block_k) * block_k
        return cls(
            block_n=block_n, block_t=block_t, block_k=block_k, pieces=pieces, piece=piece, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip

    def launch(self, x, weight, bias, y, parts, arrivals, fold, precision):
        """fold, of pieces: "here", one program adds up all of its tile's; "last", the last program to arrive; "later", the reader."""
        tokens, k = x.shape
        blocks = triton.cdiv(len(weight), self.block_n) * (1 if fold == "here" else self.pieces)
        _linear[(blocks, triton.cdiv(tokens, self.block_t))](
            x, weight, bias, y, parts, arrivals, tokens, len(weight), k, x.stride(0), weight.stride(0),
            PIECES=self.pieces, PIECE=self.piece, BLOCK_N=self.block_n, BLOCK_T=self.block_t, BLOCK_K=self.block_k, FOLD=fold,
            BIAS=bias is not None, UPCAST=x.device.type == "cpu", PRECISION=precision, num_warps=self.num_warps,
            num_stages=self.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


FULL = 256  # tiles of a result with which a GPU has enough to do: a program then adds up its own pieces


def check_linear(x, weight):
    if weight.shape[1] != x.shape[1] or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit, or are not contiguous inside"
        )


def linear(x, weight, bias=None, arrivals=None, precision="ieee", **options):
    """x [T, K] @ weight [N, K]^T (+ bias [N]) -> [T, N] in x's dtype, fp32 sums. Inner dimensions contiguous.

    arrivals: int32 [FULL] of zeros for graphs, one a stream; every launch leaves it zero. precision of fp32 products: "ieee", or "tf32"
    on tensor cores (fp32 sums all the same). options: of `LinearTiles.of`. How pieces are folded follows from how many tiles there are,
    and changes no bits.
    """
    check_linear(x, weight)
    tokens, n = len(x), len(weight)
    y = x.new_empty(tokens, n)
    if tokens == 0:
        return y
    tiles = LinearTiles.of(x, weight, precision, **options)
    parts, fold = None, "here"
    if tiles.pieces > 1 and triton.cdiv(tokens, tiles.block_t) * triton.cdiv(n, tiles.block_n) < FULL:
        fold = "last"
        parts = torch.empty(tiles.pieces * tokens * n, dtype=torch.float32, device=x.device)
        arrivals = torch.zeros(FULL, dtype=torch.int32, device=x.device) if arrivals is None else arrivals
    tiles.launch(x, weight, bias, y, parts, arrivals, fold, precision)
    return y


def linear_parts(x, weight, precision="ieee", **options):
    """As `linear`, the pieces of its inner dimension left apart: fp32 [pieces, T, N], whose sum from zero in ascending order is its result
    before that is rounded, bit for bit."""
    check_linear(x, weight)
    tiles = LinearTiles.of(x, weight, precision, **options)
    parts = torch.empty(tiles.pieces, len(x), len(weight), dtype=torch.float32, device=x.device)
    if len(x):
        tiles.launch(x, weight, None, parts, parts, None, "later", precision)
    return parts


def rms_norm(x, weight, eps, residual=None, wide=None):
    """RMS norm over the last dimension of x [..., C] in fp32. residual [..., C]: x is first added to it, in place.

    wide fp32 [..., C], contiguous: gets the result, rounded to x's dtype all the same, for a reader of fp32.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            x,
            weight,
            y,
            residual,
            wide,
            eps,
            width,
            BLOCK=block,
            RESIDUAL=residual is not None,
            WIDE=wide is not None,
            num_warps=4 if block <= 4096 else 8,
            enable_fp_fusion=True,
        )
    return y


def softmax(x, log=False):
    """Softmax (or its logarithm) over the last dimension of x [..., C], summed in fp32 in fixed blocks."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if rows:
        _softmax[(rows,)](
            x, y, width, LOG=log, BLOCK=min(4096, triton.next_power_of_2(width)), num_warps=8, enable_fp_fusion=True
        )
    return y
