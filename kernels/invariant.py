"""Batch-invariant linear, RMS norm and softmax: a row's bits do not depend on how many rows are computed with it.

Linear: weights are the rows of the product and tokens its columns; blocks, and the number of pieces the inner dimension is cut
into, follow from the weight's shape alone. The pieces are added in ascending order by the last program to arrive.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _linear(
    x, weight, bias, y, parts, arrivals, tokens, N, K, x_stride, weight_stride,
    PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    piece, block, group = tl.program_id(0) % PIECES, tl.program_id(0) // PIECES, tl.program_id(1)
    offs_n, offs_t = block * BLOCK_N + tl.arange(0, BLOCK_N), group * BLOCK_T + tl.arange(0, BLOCK_T)
    row_w = weight + offs_n.to(tl.int64)[:, None] * weight_stride
    row_x = x + offs_t.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, K), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        w = tl.load(row_w + offs_k[None, :], mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)
        v = tl.load(row_x + offs_k[None, :], mask=(offs_t < tokens)[:, None] & (offs_k < K)[None, :], other=0.0)
        if UPCAST:
            w, v = w.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(w, tl.trans(v), acc, input_precision=PRECISION)
    mask = (offs_n < N)[:, None] & (offs_t < tokens)[None, :]
    at = offs_t.to(tl.int64)[None, :] * N + offs_n[:, None]
    if PIECES > 1:
        size = tl.cast(tokens, tl.int64) * N
        tl.store(parts + piece * size + at, acc, mask=mask)
        tl.debug_barrier()
        count = arrivals + group * tl.num_programs(0) // PIECES + block
        if tl.atomic_add(count, 1, sem="acq_rel") != PIECES - 1:
            return
        tl.store(count, 0)
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for p in tl.static_range(PIECES):
            acc += tl.load(parts + p * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    if BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
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
    block_n, pieces, shortest = 64, 1, 1536 if bytes_each < 4 else 512
    while triton.cdiv(n, block_n) * pieces < 128 and k // (pieces * 2) >= shortest:
        pieces *= 2
    return block_n, pieces


def linear_arrivals(n, tokens):
    """How many counters a product of this size needs at most: one for each tile of the result."""
    return triton.cdiv(n, 64) * triton.cdiv(tokens, 16)


def linear(
    x, weight, bias=None, workspace=None, plan=None, block_t=None, block_k=None, num_warps=4, num_stages=None, precision="ieee"
):  # fmt: skip
    """x [T, K] @ weight [N, K]^T (+ bias [N]) -> [T, N] in x's dtype, fp32 sums. Inner dimensions contiguous.

    workspace: (parts fp32 >= pieces * T * N, arrivals int32 zeros >= ceil(N / block) * ceil(T / block_t)) for graphs; every launch
    leaves `arrivals` zero. precision of fp32 products: "ieee", or "tf32" on tensor cores (fp32 sums all the same).
    """
    tokens, k = x.shape
    n = weight.shape[0]
    if weight.shape[1] != k or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit, or are not contiguous inside"
        )
    y = x.new_empty(tokens, n)
    if tokens == 0:
        return y
    wide = x.element_size() == 4
    block_k = block_k or (32 if wide else 128)
    block_n, pieces = plan or linear_plan(n, k, x.element_size())
    if plan is None and not wide and tokens > 64 and n >= 8192:  # a wider tile: rows of the weight do not mix either
        block_n, block_t, block_k, num_warps, num_stages = 128, 128, 64, 8, 4
    if x.is_cuda and torch.cuda.get_device_capability(x.device) in ((8, 6), (8, 9)):
        block_k = min(block_k, 64)  # 99 KiB of shared memory
    programs = triton.cdiv(n, block_n) * pieces
    widest = (
        128 if programs >= 100 else 64 if programs >= 64 else 32
    )  # columns do not mix: their number changes no bits
    block_t = block_t or min(widest, max(16, triton.next_power_of_2(tokens)))
    num_stages = num_stages or (3 if block_t == 128 or (wide and precision == "ieee") else 4)
    groups, blocks = triton.cdiv(tokens, block_t), triton.cdiv(n, block_n)
    parts, arrivals = None, None
    if pieces > 1:
        parts, arrivals = workspace or (
            torch.empty(pieces * tokens * n, dtype=torch.float32, device=x.device),
            torch.zeros(blocks * groups, dtype=torch.int32, device=x.device),
        )
    piece = triton.cdiv(triton.cdiv(k, pieces), block_k) * block_k
    _linear[(blocks * pieces, groups)](
        x, weight, bias, y, parts, arrivals, tokens, n, k, x.stride(0), weight.stride(0),
        PIECES=pieces, PIECE=piece, BLOCK_N=block_n, BLOCK_T=block_t, BLOCK_K=block_k, BIAS=bias is not None,
        UPCAST=x.device.type == "cpu", PRECISION=precision, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


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
