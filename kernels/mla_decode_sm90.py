"""Sparse decode for absorbed MLA on SM90: the kernel of mla_decode.py with its copies and products scheduled by hand (Gluon).

    step i      S = Q K(i)^T starts | copy of K(i+1) starts | softmax | P over K(i)'s rotary part | O += P V(i)

What plain Triton cannot say is that the copy of the next tile starts at the top of a step, so that it runs beside both products and
not between two steps. One program takes 64 heads and one split: 8 warps, Q (72 KiB) and two tiles of 64 tokens (144 KiB) in shared
memory. Partial results are folded by `_mla_merge` of mla_decode.py's caller.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Names that changed between Triton 3.6 and 3.9.
_OLD = gl.constexpr(not hasattr(async_copy, "async_load"))
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

BLOCK = 64  # heads of a program, and tokens of a step


@gluon.jit
def _start_rope(rope, cache, place, WIDTH: gl.constexpr, FIRST: gl.constexpr, ROPE: gl.constexpr):
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, ROPE))
    at = gl.expand_dims(cache + place.to(gl.int64) * WIDTH + FIRST, 1) + gl.expand_dims(cols, 0)
    _copy(rope, at, mask=gl.expand_dims(place >= 0, 1))
    async_copy.commit_group()


@gluon.jit
def _load_bytes(cache, scales, place, BYTES: gl.constexpr):
    """fp8 rows `place` as bytes [64, 32, 16] and the scale of every 16 numbers [64, 32], in registers."""
    rows = gl.expand_dims(place, 1)  # [64, 1]
    part = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, BYTES))), 0)
    scale = gl.load(scales + rows.to(gl.int64) * 164 + 128 + part // 8, mask=rows >= 0, other=0.0)
    cols = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, BYTES)))
    at = gl.expand_dims(cache + rows.to(gl.int64) * 656 + part * 16, 2) + gl.expand_dims(gl.expand_dims(cols, 0), 0)
    return gl.load(at, mask=gl.expand_dims(rows >= 0, 2), other=0), scale


@gluon.jit
def _unpack(byte, scale):
    """[64, 32, 16] e4m3 bytes times [64, 32] scales -> bf16 [64, 512]."""
    value = byte.to(gl.float8e4nv, bitcast=True).to(gl.float32) * gl.expand_dims(scale, 2)
    return gl.reshape(value.to(gl.bfloat16), [64, 512])


@gluon.jit
def _start_copy(latent, rope, cache, place, place_rope, LATENT: gl.constexpr, ROPE: gl.constexpr):
    """Begin to copy one tile: rows `place` of the cache (invalid where negative: zeros) to latent [64, 512] and rope [64, 64]."""
    cols = gl.arange(0, 512, layout=gl.SliceLayout(0, LATENT))
    at = gl.expand_dims(cache + place.to(gl.int64) * 576, 1) + gl.expand_dims(cols, 0)
    _copy(latent, at, mask=gl.expand_dims(place >= 0, 1))
    _start_rope(rope, cache, place_rope, 576, 512, ROPE)


@gluon.jit
def _mla_decode_sm90(
    q, cache, scales, rope_cache, table, indices, counts, seq_lens, sink, part_out, part_lse, scale_log2, capacity, index_stride, table_stride,
    H: gl.constexpr, PAGE: gl.constexpr, SPLITS: gl.constexpr, CHUNK: gl.constexpr, STEPS: gl.constexpr,
    FP8: gl.constexpr, IDENTITY: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    LATENT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    ROPE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 32, 1], [8, 1, 1], [2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, BYTES))
    WIDE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    BLOCKS: gl.constexpr = (H + 63) // 64

    pid = gl.program_id(0)
    head0 = (pid % BLOCKS) * 64
    split = (pid // BLOCKS) % SPLITS
    b = (pid // (BLOCKS * SPLITS)).to(gl.int64)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [64, 512], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], TILE)
    latent = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 512], TILE)
    rope = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], TILE)
    places = gl.allocate_shared_memory(gl.int32, [STEPS, 64], FLAT)

    heads = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LATENT))
    heads = gl.where(heads < H, (b * H + heads).to(gl.int32), -1)
    heads_rope = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROPE))
    heads_rope = gl.where(heads_rope < H, (b * H + heads_rope).to(gl.int32), -1)
    _start_copy(q_latent, q_rope, q, heads, heads_rope, LATENT, ROPE)

    # Physical places of the whole split first: inside the loop no address waits for an index or a page.
    seq_len = gl.load(seq_lens + b)
    if IDENTITY:
        count = seq_len
    else:
        count = gl.load(counts + b)
    first = split * CHUNK
    last = gl.minimum(first + CHUNK, gl.minimum(count, capacity))
    slot = first + gl.arange(0, STEPS * 64, layout=WIDE)
    if IDENTITY:
        pos = slot
    else:
        pos = gl.load(indices + b * index_stride + slot, mask=slot < last, other=-1)
    inside = (pos >= 0) & (pos < seq_len) & (slot < last)
    page = gl.load(table + b * table_stride + pos // PAGE, mask=inside, other=0)
    if _OLD:
        flat = places._reinterpret(gl.int32, [STEPS * 64], FLAT)
    else:
        flat = places.reinterpret(gl.int32, [STEPS * 64], FLAT)
    flat.store(gl.where(inside, page * PAGE + pos % PAGE, -1))
    _barrier()
    steps = (last - first + 63) // 64
    tile = places.index(0)
    at_rope = tile.load(gl.SliceLayout(1, ROPE))
    if FP8:
        _start_rope(rope.index(0), rope_cache, at_rope, 328, 264, ROPE)
        byte, scale = _load_bytes(cache, scales, tile.load(ROWS), BYTES)
        latent.index(0).store(_unpack(byte, scale))
    else:
        _start_copy(latent.index(0), rope.index(0), cache, tile.load(gl.SliceLayout(1, LATENT)), at_rope, LATENT, ROPE)

    top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
    acc = gl.zeros([64, 512], gl.float32, layout=OUT)
    for i in range(0, steps):
        now = i % 2
        async_copy.wait_group(0)
        fence_async_shared()
        _barrier()  # the tile is there for all warps, and all have done with the other one
        keys, extra = latent.index(now), rope.index(now)
        score = warpgroup_mma(
            q_latent, keys.permute((1, 0)), gl.zeros([64, 64], gl.float32, layout=S), use_acc=False, is_async=True
        )
        score = warpgroup_mma(q_rope, extra.permute((1, 0)), score, is_async=True)
        tile = places.index(gl.minimum(i + 1, STEPS - 1))
        more = i + 1 < steps
        at_rope = gl.where(more, tile.load(gl.SliceLayout(1, ROPE)), -1)
        if FP8:
            byte, scale = _load_bytes(cache, scales, gl.where(more, tile.load(ROWS), -1), BYTES)
            _start_rope(rope.index(1 - now), rope_cache, at_rope, 328, 264, ROPE)
        else:
            at = gl.where(more, tile.load(gl.SliceLayout(1, LATENT)), -1)
            _start_copy(latent.index(1 - now), rope.index(1 - now), cache, at, at_rope, LATENT, ROPE)
        valid = places.index(i).load(gl.SliceLayout(0, S)) >= 0
        score = warpgroup_mma_wait(0, deps=[score])
        score = gl.where(gl.expand_dims(valid, 0), score * scale_log2, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, 1))
        safe = gl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = gl.exp2(top - safe)
        weight = gl.exp2(score - gl.expand_dims(safe, 1))
        total = total * shrink + gl.sum(weight, 1)
        top = new_top
        extra.store(weight.to(gl.bfloat16))  # the rotary keys have served, and a tile of weights is as large
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
        fence_async_shared()
        _barrier()
        acc = warpgroup_mma(extra, keys, acc, is_async=True)
        if FP8:
            latent.index(1 - now).store(_unpack(byte, scale))
        acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    norm = gl.where(total > 0, total, 1.0)
    value = gl.where(total > 0, top + gl.log2(norm), float("-inf"))
    inverse = 1.0 / norm
    own = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    if SPLITS == 1:  # nothing to merge: part_out and part_lse are the results
        value *= 0.6931471805599453
        if SINK:
            other = gl.load(sink + own, mask=own < H, other=0.0)
            inverse *= gl.where(total > 0, 1.0 / (1.0 + gl.exp(other - value)), 0.0)
    gl.store(part_lse + (b * H + own) * SPLITS + split, value, mask=own < H)
    own = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    cols = gl.arange(0, 512, layout=gl.SliceLayout(0, OUT))
    at = part_out + gl.expand_dims(((b * H + own) * SPLITS + split) * 512, 1) + gl.expand_dims(cols, 0)
    acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, OUT)), 1)
    gl.store(at, acc.to(part_out.dtype.element_ty), mask=gl.expand_dims(own < H, 1))


def launch(q, cache, table, indices, counts, seq_lens, sink, part_out, part_lse, scale_log2, capacity, splits):
    """One launch; part_out and part_lse are the results where splits is 1. capacity / splits must not exceed 2048 tokens."""
    batch, heads, _ = q.shape
    fp8 = cache.dtype == torch.uint8
    steps = -(-capacity // (splits * BLOCK))
    _mla_decode_sm90[(batch * splits * -(-heads // BLOCK),)](
        q, cache, cache.view(torch.float32) if fp8 else cache, cache.view(torch.bfloat16),
        table, indices, counts, seq_lens, sink, part_out, part_lse, scale_log2, capacity,
        0 if indices is None else indices.stride(0), table.stride(0),
        H=heads, PAGE=cache.shape[1], SPLITS=splits, CHUNK=steps * BLOCK, STEPS=1 << (steps - 1).bit_length(),
        FP8=fp8, IDENTITY=indices is None, SINK=sink is not None, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def fits(q, cache):
    """Whether this kernel takes these tensors: SM90, bf16 queries, and enough heads to fill its tile."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and cache.dtype in (torch.bfloat16, torch.uint8)
        and q.shape[1] > 32
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )
