"""Sparse decode for absorbed multi-head latent attention: 576 = 512 latent + 64 rotary numbers a token, one kv head.

The latent part is key and value at once. One program per (sequence, split, block of heads) gathers its tokens once and
writes a partial sum; a second kernel folds the partials in split order. Two caches: bf16 (1152 bytes a token) and fp8
(656 bytes: 512 e4m3, four fp32 scales of 128 numbers each, 64 bf16). The fp8 scales are applied to scores and weights,
so the stored values enter the products exactly.
"""

import torch
import triton
import triton.language as tl

LATENT, ROPE, FP8_BYTES = 512, 64, 656
HOPPER_ROWS = 512  # batch * heads from which the SM90 kernel, with its 64 heads a program, is the faster one


@triton.jit
def _e4m3(byte, SOFT: tl.constexpr, UPCAST: tl.constexpr):
    """e4m3 bytes as numbers, exactly: bf16 (fp32 under the interpreter). SOFT for chips without the type."""
    if SOFT:
        bits = byte.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 256.0
    else:
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return value if UPCAST else value.to(tl.bfloat16)


@triton.jit
def _mla_decode(
    q, cache, scales, rope_cache, table, indices, counts, seq_lens, sink, part_out, part_lse,
    scale_log2, capacity, index_stride, table_stride,
    H: tl.constexpr, PAGE: tl.constexpr, TOKEN: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr, SOFT: tl.constexpr,
    IDENTITY: tl.constexpr, SINK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    head0, split, b = (pid % BLOCKS) * BLOCK_H, (pid // BLOCKS) % SPLITS, (pid // (BLOCKS * SPLITS)).to(tl.int64)
    offs_h, offs_n, offs_r = head0 + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N), tl.arange(0, 64)
    offs_c, offs_128 = tl.arange(0, 512), tl.arange(0, 128)
    mask_h = offs_h < H
    q_row = q + (b * H + offs_h)[:, None] * 576
    q_rope = tl.load(q_row + 512 + offs_r[None, :], mask=mask_h[:, None], other=0.0)
    if FP8:
        q0 = tl.load(q_row + offs_128[None, :], mask=mask_h[:, None], other=0.0)
        q1 = tl.load(q_row + 128 + offs_128[None, :], mask=mask_h[:, None], other=0.0)
        q2 = tl.load(q_row + 256 + offs_128[None, :], mask=mask_h[:, None], other=0.0)
        q3 = tl.load(q_row + 384 + offs_128[None, :], mask=mask_h[:, None], other=0.0)
        if UPCAST:
            q0, q1, q2, q3 = q0.to(tl.float32), q1.to(tl.float32), q2.to(tl.float32), q3.to(tl.float32)
        acc0 = tl.zeros([BLOCK_H, 128], tl.float32)
        acc1, acc2, acc3 = acc0, acc0, acc0
    else:
        q_latent = tl.load(q_row + offs_c[None, :], mask=mask_h[:, None], other=0.0)
        if UPCAST:
            q_latent = q_latent.to(tl.float32)
        acc = tl.zeros([BLOCK_H, 512], tl.float32)
    if UPCAST:
        q_rope = q_rope.to(tl.float32)
    seq_len = tl.load(seq_lens + b)
    count = seq_len if IDENTITY else tl.load(counts + b)
    first = split * CHUNK
    last = tl.minimum(first + CHUNK, tl.minimum(count, capacity))
    # Physical places of the whole split first: inside the loop no address waits for an index or a page.
    step = tl.arange(0, STEPS)[:, None]
    slot = first + step * BLOCK_N + offs_n[None, :]  # [STEPS, N]
    pos = slot if IDENTITY else tl.load(indices + b * index_stride + slot, mask=slot < last, other=-1)
    inside = (pos >= 0) & (pos < seq_len) & (slot < last)
    page = tl.load(table + b * table_stride + pos // PAGE, mask=inside, other=0)
    places = tl.where(inside, page * PAGE + pos % PAGE, -1)

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for i in range(0, (last - first + BLOCK_N - 1) // BLOCK_N):
        place = tl.sum(tl.where(step == i, places, 0), 0)
        valid = place >= 0
        row = place.to(tl.int64) * TOKEN  # in elements of `cache`
        mask = valid[:, None]
        if FP8:
            byte = cache + row[:, None] + offs_128[None, :]
            k0 = _e4m3(tl.load(byte, mask=mask, other=0), SOFT, UPCAST)
            k1 = _e4m3(tl.load(byte + 128, mask=mask, other=0), SOFT, UPCAST)
            k2 = _e4m3(tl.load(byte + 256, mask=mask, other=0), SOFT, UPCAST)
            k3 = _e4m3(tl.load(byte + 384, mask=mask, other=0), SOFT, UPCAST)
            at = scales + row // 4 + 128  # the same row in units of four bytes
            c0, c1 = tl.load(at, mask=valid, other=0.0), tl.load(at + 1, mask=valid, other=0.0)
            c2, c3 = tl.load(at + 2, mask=valid, other=0.0), tl.load(at + 3, mask=valid, other=0.0)
            k_rope = tl.load(rope_cache + (row // 2 + 264)[:, None] + offs_r[None, :], mask=mask, other=0.0)
            if UPCAST:
                k_rope = k_rope.to(tl.float32)
            score = tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
            score += tl.dot(q0, tl.trans(k0), input_precision="ieee") * c0[None, :]
            score += tl.dot(q1, tl.trans(k1), input_precision="ieee") * c1[None, :]
            score += tl.dot(q2, tl.trans(k2), input_precision="ieee") * c2[None, :]
            score += tl.dot(q3, tl.trans(k3), input_precision="ieee") * c3[None, :]
        else:
            at = cache + row[:, None]
            latent = tl.load(at + offs_c[None, :], mask=mask, other=0.0)
            k_rope = tl.load(at + 512 + offs_r[None, :], mask=mask, other=0.0)
            if UPCAST:
                latent, k_rope = latent.to(tl.float32), k_rope.to(tl.float32)
            score = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
            score = tl.dot(q_rope, tl.trans(k_rope), score, input_precision="ieee")
        score = tl.where(valid[None, :], score * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        if FP8:
            acc0 = tl.dot((weight * c0[None, :]).to(k0.dtype), k0, acc0 * shrink[:, None], input_precision="ieee")
            acc1 = tl.dot((weight * c1[None, :]).to(k1.dtype), k1, acc1 * shrink[:, None], input_precision="ieee")
            acc2 = tl.dot((weight * c2[None, :]).to(k2.dtype), k2, acc2 * shrink[:, None], input_precision="ieee")
            acc3 = tl.dot((weight * c3[None, :]).to(k3.dtype), k3, acc3 * shrink[:, None], input_precision="ieee")
        else:
            acc = tl.dot(weight.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    norm = tl.where(total > 0, total, 1.0)
    part = (b * H + offs_h) * SPLITS + split
    part_value = tl.where(total > 0, top + tl.log2(norm), float("-inf"))
    inverse = 1.0 / norm
    if SPLITS == 1:  # nothing to merge: part_out and part_lse are the results
        part_value *= 0.6931471805599453
        if SINK:
            extra = tl.load(sink + offs_h, mask=mask_h, other=0.0)
            inverse *= tl.where(total > 0, 1.0 / (1.0 + tl.exp(extra - part_value)), 0.0)
    tl.store(part_lse + part, part_value, mask=mask_h)
    at = part_out + part[:, None] * 512
    inverse = inverse[:, None]
    if FP8:
        at += offs_128[None, :]
        tl.store(at, (acc0 * inverse).to(part_out.dtype.element_ty), mask=mask_h[:, None])
        tl.store(at + 128, (acc1 * inverse).to(part_out.dtype.element_ty), mask=mask_h[:, None])
        tl.store(at + 256, (acc2 * inverse).to(part_out.dtype.element_ty), mask=mask_h[:, None])
        tl.store(at + 384, (acc3 * inverse).to(part_out.dtype.element_ty), mask=mask_h[:, None])
    else:
        tl.store(at + offs_c[None, :], (acc * inverse).to(part_out.dtype.element_ty), mask=mask_h[:, None])


@triton.jit
def _mla_merge(
    part_out, part_lse, sink, out, lse,
    H: tl.constexpr, SPLITS: tl.constexpr, UNROLL: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of [B * H]
    offs_c, offs_s = tl.arange(0, 512), tl.arange(0, triton.next_power_of_2(SPLITS))
    every = tl.load(part_lse + row * SPLITS + offs_s, mask=offs_s < SPLITS, other=float("-inf"))
    top = tl.max(every, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([512], tl.float32)
    for base in range(0, SPLITS, UNROLL):
        for step in tl.static_range(UNROLL):
            s = base + step
            grow = tl.exp2(tl.max(tl.where(offs_s == s, every, float("-inf")), 0) - safe)
            one = tl.load(part_out + (row * SPLITS + s) * 512 + offs_c, mask=offs_c * 0 + s < SPLITS, other=0.0)
            total += grow
            acc += one.to(tl.float32) * grow
    norm = tl.where(total > 0, total, 1.0)
    row_lse = tl.where(total > 0, (top + tl.log2(norm)) * 0.6931471805599453, float("-inf"))
    acc = acc / norm
    if SINK:
        acc *= tl.where(total > 0, 1.0 / (1.0 + tl.exp(tl.load(sink + row % H) - row_lse)), 0.0)
    tl.store(out + row * 512 + offs_c, acc.to(out.dtype.element_ty))
    tl.store(lse + row, row_lse)


def mla_decode_workspace(batch, heads, splits, device):
    """Scratch of `mla_decode`: partial outputs and lse, fp32."""
    part_out = torch.empty(batch * heads * splits * LATENT, dtype=torch.float32, device=device)
    return part_out, torch.empty(batch * heads * splits, dtype=torch.float32, device=device)


def mla_decode(
    q, cache, block_table, seq_lens, indices=None, counts=None, scale=None, sink=None,
    out=None, lse=None, workspace=None, splits=None, block_h=None, block_n=None, num_warps=None, num_stages=None,
):  # fmt: skip
    """Absorbed MLA attention of one query per sequence over its selected positions.

    q [B, H, 576]; cache [pages, page, 576] bf16 (or fp32 on a CPU), or [pages, page, 656] uint8; block_table int32
    [B, max_pages]; seq_lens int32 [B]; indices int32 [B, k] and counts int32 [B] as in `gqa_decode` (None: every position).
    scale defaults to 576^-1/2; models pass their own (192^-1/2 before absorption). sink fp32 [H].
    Returns out [B, H, 512] in q's dtype and lse fp32 [B, H] (natural logarithm, without the sink; -inf where empty).
    splits: None picks by batch and device for speed; give a constant for results that do not depend on the batch. On SM90 the
    kernel of mla_decode_sm90.py runs where it is the faster one, unless block_h names the shape of the plain one.
    """
    batch, heads, width = q.shape
    fp8 = cache.dtype == torch.uint8
    if width != LATENT + ROPE or cache.shape[2] != (FP8_BYTES if fp8 else LATENT + ROPE):
        raise ValueError(
            f"mla_decode: q {tuple(q.shape)} and cache {tuple(cache.shape)} {cache.dtype} do not fit 512 + 64"
        )
    if (indices is None) != (counts is None):
        raise ValueError("mla_decode: indices and counts come together")
    if not cache.is_contiguous():
        raise ValueError("mla_decode: the cache must be contiguous")
    q = q.contiguous()
    page = cache.shape[1]
    capacity = block_table.shape[1] * page if indices is None else indices.shape[1]
    hopper = block_h is None and _hopper(q, cache, splits is None)
    config = _config(batch, heads, capacity, q.device, hopper)
    splits, block_h, block_n = splits or config[0], block_h or config[1], block_n or config[2]
    num_warps, num_stages = num_warps or config[3], num_stages or config[4]
    splits = max(splits, triton.cdiv(capacity, 2048))  # a program keeps the places of its whole split in registers
    steps = triton.cdiv(triton.cdiv(capacity, splits), block_n)
    out = q.new_empty(batch, heads, LATENT) if out is None else out
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device) if lse is None else lse
    if batch == 0:
        return out, lse
    direct = splits == 1
    part_out, part_lse = (out, lse) if direct else workspace or mla_decode_workspace(batch, heads, splits, q.device)
    cpu = q.device.type == "cpu"
    scale_log2 = ((LATENT + ROPE) ** -0.5 if scale is None else scale) * 1.4426950408889634
    if hopper:
        from winnow.kernels import mla_decode_sm90

        mla_decode_sm90.launch(
            q, cache, block_table, indices, counts, seq_lens, sink, part_out, part_lse, scale_log2, capacity, splits
        )
    else:
        _mla_decode[(batch * splits * triton.cdiv(heads, block_h),)](
            q, cache, cache.view(torch.float32) if fp8 else cache, cache.view(torch.bfloat16) if fp8 else cache,
            block_table, indices, counts, seq_lens, sink, part_out, part_lse,
            scale_log2, capacity,
            0 if indices is None else indices.stride(0), block_table.stride(0),
            H=heads, PAGE=page, TOKEN=cache.shape[2], SPLITS=splits, CHUNK=steps * block_n, STEPS=triton.next_power_of_2(steps),
            BLOCK_H=block_h, BLOCK_N=block_n, FP8=fp8, SOFT=cpu or torch.cuda.get_device_capability(q.device) < (8, 9),
            IDENTITY=indices is None, SINK=sink is not None, UPCAST=cpu,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    if direct:
        return out, lse
    _mla_merge[(batch * heads,)](
        part_out, part_lse, sink, out, lse,
        H=heads, SPLITS=splits, UNROLL=min(8, splits), SINK=sink is not None, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def plan_for(sm, rows):
    """(heads per program, tokens per step, warps, stages) for compute capability `sm` and rows = batch * heads."""
    if sm >= 90:
        return (64, 64, 8, 2) if rows > 512 else (16, 64, 4, 2)
    return (32, 32, 8, 2) if sm == 80 else (16, 32, 4, 1)


def _hopper(q, cache, by_batch):
    """Whether mla_decode_sm90.py takes this call. by_batch: the caller left the plan to us, and a small batch is faster without."""
    if q.device.type == "cpu" or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    from winnow.kernels import mla_decode_sm90

    return mla_decode_sm90.fits(q, cache) and not (by_batch and q.shape[0] * q.shape[1] < HOPPER_ROWS)


def _config(batch, heads, capacity, device, hopper=False):
    """(splits, *plan_for): splits, a power of two, fill the device's multiprocessors once, or twice with small programs."""
    if device.type == "cpu":
        return 2, 16, 16, 4, 1
    if hopper:
        slots = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, slots // (batch * triton.cdiv(heads, 64)))
        return min(wanted, max(1, triton.cdiv(capacity, 128)), 16), 64, 64, 8, 2
    major, minor = torch.cuda.get_device_capability(device)
    block_h, block_n, warps, stages = plan_for(10 * major + minor, batch * heads)
    slots = torch.cuda.get_device_properties(device).multi_processor_count * (2 if block_h == 16 else 1)
    wanted = max(1, slots // (batch * triton.cdiv(heads, block_h)))
    splits = min(wanted, max(1, triton.cdiv(capacity, 2 * block_n)), 16)
    return 1 << (splits.bit_length() - 1), block_h, block_n, warps, stages
