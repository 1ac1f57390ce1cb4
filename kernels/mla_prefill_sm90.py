"""Absorbed MLA over packed rows on SM90 (Gluon): mla_decode_sm90.py without pages, splits and fp8, and one product ahead of it.

    step i      S = Q K(i)^T starts | P V(i-1) ends, copy of K(i+1) starts | softmax | O += P V(i) starts and is not waited for

Operands, tiles and the order of every sum are those of mla_decode_sm90.py with one split, so the bits are the same.
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

from winnow.kernels.mla_decode_sm90 import _OLD, _barrier, _copy, _start_copy, _start_rope


@gluon.jit
def _copy_latent(latent, kv, place, LATENT: gl.constexpr):
    """Begin to copy rows `place` of kv (zeros where negative) to latent [64, 512]; committed with the next group."""
    cols = gl.arange(0, 512, layout=gl.SliceLayout(0, LATENT))
    at = gl.expand_dims(kv + place.to(gl.int64) * 576, 1) + gl.expand_dims(cols, 0)
    _copy(latent, at, mask=gl.expand_dims(place >= 0, 1))


@gluon.jit
def _mla_prefill_sm90(
    q, kv, rows, out, lse, scale_log2, K, H: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    LATENT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    ROPE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    BLOCKS: gl.constexpr = (H + 63) // 64

    head0 = (gl.program_id(0) % BLOCKS) * 64
    query = (gl.program_id(0) // BLOCKS).to(gl.int64)
    q_latent = gl.allocate_shared_memory(gl.bfloat16, [64, 512], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], TILE)
    latent = gl.allocate_shared_memory(gl.bfloat16, [128, 512], TILE)
    rope = gl.allocate_shared_memory(gl.bfloat16, [128, 64], TILE)
    places = gl.allocate_shared_memory(gl.int32, [2 * STEPS, 64], FLAT)

    heads = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LATENT))
    heads = gl.where(heads < H, (query * H + heads).to(gl.int32), -1)
    heads_rope = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROPE))
    heads_rope = gl.where(heads_rope < H, (query * H + heads_rope).to(gl.int32), -1)
    _start_copy(q_latent, q_rope, q, heads, heads_rope, LATENT, ROPE)
    slot = gl.arange(0, STEPS * 128, layout=WIDE)
    place = gl.load(rows + query * K + slot, mask=slot < K, other=-1)
    if _OLD:
        places._reinterpret(gl.int32, [STEPS * 128], FLAT).store(place)
        weights = rope._reinterpret(gl.bfloat16, [64, 128], TILE)
        pairs = places._reinterpret(gl.int32, [STEPS, 128], FLAT)
    else:
        places.reinterpret(gl.int32, [STEPS * 128], FLAT).store(place)
        weights = rope.reinterpret(gl.bfloat16, [64, 128], TILE)
        pairs = places.reinterpret(gl.int32, [STEPS, 128], FLAT)
    _barrier()
    steps = (K + 127) // 128
    lower, upper = latent.slice(0, 64), latent.slice(64, 64)
    for half in gl.static_range(2):
        tile = places.index(half)
        _start_copy(
            latent.slice(64 * half, 64), rope.slice(64 * half, 64), kv,
            tile.load(gl.SliceLayout(1, LATENT)), tile.load(gl.SliceLayout(1, ROPE)), LATENT, ROPE,
        )  # fmt: skip

    top = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    total = gl.zeros([64, 128], gl.float32, layout=S)
    acc = gl.zeros([64, 512], gl.float32, layout=OUT)
    for i in range(0, steps):
        async_copy.wait_group(0)
        fence_async_shared()
        _barrier()  # both halves are there for all warps
        score = warpgroup_mma(
            q_latent, latent.permute((1, 0)), gl.zeros([64, 128], gl.float32, layout=S), use_acc=False, is_async=True
        )
        score = warpgroup_mma(q_rope, rope.permute((1, 0)), score, is_async=True)
        more = i + 1 < steps
        ahead = gl.minimum(2 * i + 2, 2 * STEPS - 2)
        at_rope = gl.where(more, places.index(ahead).load(gl.SliceLayout(1, ROPE)), -1)
        at = gl.where(more, places.index(ahead).load(gl.SliceLayout(1, LATENT)), -1)
        at_rope_2 = gl.where(more, places.index(ahead + 1).load(gl.SliceLayout(1, ROPE)), -1)
        at_2 = gl.where(more, places.index(ahead + 1).load(gl.SliceLayout(1, LATENT)), -1)
        valid = pairs.index(i).load(gl.SliceLayout(0, S)) >= 0
        score = warpgroup_mma_wait(0, deps=[score])
        score = gl.where(gl.expand_dims(valid, 0), score * scale_log2, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, 1))  # its barrier: all have done with the rotary keys
        safe = gl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = gl.exp2(top - safe)
        weight = gl.exp2(score - gl.expand_dims(safe, 1))
        total = total * gl.expand_dims(shrink, 1) + weight  # added up once, at the end
        top = new_top
        weights.store(weight.to(gl.bfloat16))
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
        fence_async_shared()
        _barrier()
        acc = warpgroup_mma(weights.slice(0, 64, 1), lower, acc, is_async=True)
        acc = warpgroup_mma(weights.slice(64, 64, 1), upper, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        _barrier()
        _copy_latent(lower, kv, at, LATENT)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _barrier()
        _copy_latent(upper, kv, at_2, LATENT)
        _start_rope(rope.slice(0, 64), kv, at_rope, 576, 512, ROPE)
        _start_rope(rope.slice(64, 64), kv, at_rope_2, 576, 512, ROPE)
    async_copy.wait_group(0)

    sums = gl.sum(total, 1)
    norm = gl.where(sums > 0, sums, 1.0)
    value = gl.where(sums > 0, top + gl.log2(norm), float("-inf")) * 0.6931471805599453
    own = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    gl.store(lse + query * H + own, value, mask=own < H)
    own = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    cols = gl.arange(0, 512, layout=gl.SliceLayout(0, OUT))
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / norm, gl.SliceLayout(1, OUT)), 1)
    at_out = out + gl.expand_dims((query * H + own) * 512, 1) + gl.expand_dims(cols, 0)
    gl.store(at_out, acc.to(out.dtype.element_ty), mask=gl.expand_dims(own < H, 1))


def launch(q, kv, rows, out, lse, scale):
    """q [T, H, 576], kv [S, 576], rows int32 [T, k <= 2048], -1 for nothing -> out [T, H, 512], lse fp32 [T, H]. All contiguous bf16."""
    tokens, heads, _ = q.shape
    steps = -(-rows.shape[1] // 128)
    _mla_prefill_sm90[(tokens * -(-heads // 64),)](
        q, kv, rows, out, lse, scale * 1.4426950408889634, rows.shape[1],
        H=heads, STEPS=1 << max(0, steps - 1).bit_length(), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def fits(q, kv, rows):
    """Whether this kernel takes these tensors: SM90, bf16, more than 32 heads, sets of at most 2048."""
    return (
        q.is_cuda
        and q.dtype == kv.dtype == torch.bfloat16
        and q.shape[1] > 32
        and rows.shape[1] <= 2048
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )
