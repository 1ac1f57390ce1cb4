"""fp8 caches: quantise and write in one kernel. e4m3 with one fp32 scale a row (indexer) or per 128 numbers (MLA latent).

The encoder is integer arithmetic, round to nearest even, so every chip and the interpreter give the bits torch gives.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _encode(x):
    """fp32, |x| <= 448 -> e4m3 byte, nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = (
        (size + 0x7FFFF + ((size >> 20) & 1)) >> 20
    ) - 960  # three mantissa bits; the exponent's bias 127 becomes 7
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF  # below 2^-6 one step is 2^-9, an ulp of 16384
    return (sign | tl.where(size < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def _quantise(x, LEAST: tl.constexpr):
    """Rows [R, N] -> (bytes, scale fp32 [R])."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), LEAST) / 448.0
    return _encode(tl.minimum(tl.maximum(x / scale[:, None], -448.0), 448.0)), scale


@triton.jit
def _write_index_keys(
    k, slots, cache, scales, tokens, page_stride, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    there = slot >= 0
    offs_d = tl.arange(0, D)
    x = tl.load(k + token[:, None] * D + offs_d[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    byte, scale = _quantise(x, 1e-10)
    page, at = slot // PAGE, slot % PAGE
    tl.store(cache + (page * page_stride + at * D)[:, None] + offs_d[None, :], byte, mask=there[:, None])
    tl.store(scales + page * (page_stride // 4) + PAGE * D // 4 + at, scale, mask=there)


@triton.jit
def _quantise_query(q, w, out, w_out, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, offs = row < rows, row[:, None] * D + tl.arange(0, D)[None, :]
    byte, scale = _quantise(tl.load(q + offs, mask=there[:, None], other=0.0).to(tl.float32), 1e-10)
    tl.store(out + offs, byte, mask=there[:, None])
    tl.store(w_out + row, tl.load(w + row, mask=there, other=0.0).to(tl.float32) * scale, mask=there)


@triton.jit
def _write_mla(latent, rope, slots, cache, scales, rope_cache, PAGE: tl.constexpr, page_stride):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    offs_g, offs_n, offs_r = tl.arange(0, 4), tl.arange(0, 128), tl.arange(0, 64)
    at = offs_g[:, None] * 128 + offs_n[None, :]
    byte, scale = _quantise(tl.load(latent + token * 512 + at).to(tl.float32), 1e-10)
    row = slot // PAGE * page_stride + slot % PAGE * 656
    tl.store(cache + row + at, byte)
    tl.store(scales + row // 4 + 128 + offs_g, scale)
    tl.store(rope_cache + row // 2 + 264 + offs_r, tl.load(rope + token * 64 + offs_r).to(rope_cache.dtype.element_ty))


def write_index_keys(k, slot_mapping, cache):
    """Quantise index keys k [T, D] into cache uint8 [pages, page * (D + 4)] at slots int64 [T] (page * size + place; < 0: skip)."""
    tokens, dim = k.shape
    page = cache.shape[1] // (dim + 4)
    if page * (dim + 4) != cache.shape[1] or cache.dtype != torch.uint8 or not cache.is_contiguous():
        raise ValueError(
            f"write_index_keys: cache {tuple(cache.shape)} {cache.dtype} does not hold keys of {dim} numbers"
        )
    if tokens:
        _write_index_keys[(triton.cdiv(tokens, 16),)](
            k.contiguous(),
            slot_mapping,
            cache,
            cache.view(torch.float32),
            tokens,
            cache.stride(0),
            D=dim,
            PAGE=page,
            BLOCK=16,
            enable_fp_fusion=True,
        )


def quantise_query(q, w):
    """q [T, H, D] -> e4m3 of the same shape, and w fp32 [T, H] multiplied by the scales."""
    rows, dim = q.shape[0] * q.shape[1], q.shape[2]
    out = torch.empty(q.shape, dtype=torch.uint8, device=q.device)
    scaled = torch.empty(w.shape, dtype=torch.float32, device=q.device)
    if rows:
        _quantise_query[(triton.cdiv(rows, 32),)](
            q.contiguous(), w.contiguous(), out, scaled, rows, D=dim, BLOCK=32, enable_fp_fusion=True
        )
    return out.view(torch.float8_e4m3fn), scaled


def write_mla(latent, rope, slot_mapping, cache):
    """Quantise latent [T, 512] and store rope [T, 64] as bf16 into cache uint8 [pages, page, 656] at slots int64 [T]."""
    if cache.shape[2] != 656 or cache.dtype != torch.uint8 or not cache.is_contiguous() or latent.shape[1] != 512:
        raise ValueError(
            f"write_mla: latent {tuple(latent.shape)} and cache {tuple(cache.shape)} {cache.dtype} do not fit 656 bytes"
        )
    if len(latent):
        _write_mla[(len(latent),)](
            latent.contiguous(), rope.contiguous(), slot_mapping, cache, cache.view(torch.float32), cache.view(torch.bfloat16),
            PAGE=cache.shape[1], page_stride=cache.stride(0), num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
