"""Grouped-query sparse attention of packed queries on SM90: the forward of sparse_prefill.py, scheduled by hand (Gluon).

    step i      S = Q K(i)^T starts | O += P V(i-1) starts | softmax of S beside it | O is rescaled, P = the new weights

so the tensor cores always have a product to do while a softmax runs. A block's 128 rows (queries x heads of a kv head) are two
warpgroups of 64, which hold Q, S, P and O in registers and read K and V, 128 keys a step, from two rings in shared memory.

    split       (_split) each warpgroup goes at its own pace; a third one copies, and barriers say which slots of the rings are full and free
    joint       (_joint) both take a step together and copy between their products

Keys are walked in list order by either, so their bits are the same.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from winnow.kernels.mla_decode_sm90 import _barrier, _copy

STEP = gl.constexpr(128)  # keys
SLOTS = gl.constexpr(3)  # of each ring
CAUSAL, WHOLE, LISTED = (gl.constexpr(x) for x in range(3))  # how keys are found and chosen: see `launch`


@gluon.jit
def _start_copy(ring, i, source, keys, start, stop, origin, limit, kv, HKV: gl.constexpr, D: gl.constexpr, MODE: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Begin to copy the keys of step i to their slot; zeros where there are none."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    n = gl.arange(0, STEP, layout=gl.SliceLayout(1, COPY))
    cols = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, COPY)), 0)
    if MODE == LISTED:
        entry = start + i * STEP
        key = gl.load(keys + entry + n, mask=entry + n < stop, other=-1)
        at = gl.expand_dims(source + key.to(gl.int64) * (HKV * D) + kv * D, 1) + cols
        there = key >= 0
    else:
        key = origin + i * STEP
        at = source + key.to(gl.int64) * (HKV * D) + kv * D + (gl.expand_dims(n * (HKV * D), 1) + cols)
        there = n < limit - key
    _copy(ring.index(i % SLOTS), at, mask=gl.expand_dims(there, 1))


@gluon.jit
def _scores(query, ring, i, S: gl.constexpr):
    zero = gl.zeros([query.shape[0], STEP], gl.float32, layout=S)
    return warpgroup_mma(query, ring.index(i % SLOTS).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _words(bits, i, start, stop, member, SIZE: gl.constexpr):
    """The four words of a row in step i; none past the stop."""
    entry = start + i * STEP
    at = bits + (entry // 32).to(gl.int64) * SIZE + member
    first, second = entry < stop, entry + 64 < stop
    return (
        gl.load(at, mask=first, other=0), gl.load(at + SIZE, mask=first, other=0),
        gl.load(at + 2 * SIZE, mask=second, other=0), gl.load(at + 3 * SIZE, mask=second, other=0),
    )  # fmt: skip


@gluon.jit
def _soften(score, top, total, scale_log2, words, first, row, S: gl.constexpr, MODE: gl.constexpr, MASK: gl.constexpr):
    """Weights of a step, what earlier ones shrink by, and the new (top, total). first: the step's first key."""
    n = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, S)), 0)
    if MASK:
        if MODE == CAUSAL:
            TEST: gl.constexpr = "{.reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p;}"
            tested = [score, first + n, gl.expand_dims(row, 1)]
        else:
            TEST: gl.constexpr = "{.reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p;}"
            lower = gl.where(n < 32, gl.expand_dims(words[0], 1), gl.expand_dims(words[1], 1))
            upper = gl.where(n < 96, gl.expand_dims(words[2], 1), gl.expand_dims(words[3], 1))
            tested = [score, gl.where(n < 64, lower, upper), 1 << (n & 31)]
        # By hand, because LLVM packs the answers of a plain `where` into words and takes them apart again.
        score = gl.inline_asm_elementwise(TEST, "=f,f,r,r", tested, gl.float32, True, 1)
    new_top = gl.maximum(top, gl.max(score, 1))
    safe = gl.where(new_top == float("-inf"), 0.0, new_top) * scale_log2
    shrink = gl.exp2(top * scale_log2 - safe)
    weight = gl.exp2(score * scale_log2 - gl.expand_dims(safe, 1))
    return weight, shrink, new_top, total * shrink + gl.sum(weight, 1)


@gluon.jit
def _pack(weight, KIND: gl.constexpr):
    """fp32 [rows, 128] as pairs of 16 bits [rows, 64]: what goes around a loop unpacked takes a register a number."""
    even, odd = gl.split(gl.reshape(weight, [weight.shape[0], STEP // 2, 2]))
    CONVERT: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if KIND == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CONVERT, "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def _unpack(pairs, KIND: gl.constexpr, OUT: gl.constexpr):
    """As the left operand of a product of layout OUT."""
    even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], (gl.int16, gl.int16), True, 1)
    weights = gl.reshape(gl.join(even, odd), [pairs.shape[0], STEP]).to(KIND, bitcast=True)
    return gl.convert_layout(weights, gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def _rows(place, kv, half, ROWS: gl.constexpr, LAYOUT: gl.constexpr, HKV: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr):
    """Of a warpgroup's rows: the query in its block, the packed row of q and out, and whether there is one."""
    row0, num = place[0], place[1]
    m = half * ROWS + gl.arange(0, ROWS, layout=LAYOUT)
    query, member = m // PACK, m % PACK
    head = (row0 + query).to(gl.int64) * (HKV * GROUP) + kv * GROUP + member
    return query, head, (query < num) & (member < GROUP)


@gluon.jit
def _step(
    i, top, total, acc, weights, query, member, row, place, k, v, keys, bits, rings, bars, kv, scale_log2,
    S: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr, MODE: gl.constexpr, MASK: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """S(i) and its softmax beside the product of the weights of step i - 1 with their values."""
    _, _, origin, limit, start, stop = place
    k_ring, v_ring = rings
    k_full, v_full, k_free, v_free = bars
    now, before = i % SLOTS, (i - 1) % SLOTS
    if SPLIT:
        mbarrier.wait(k_full.index(now), (i // SLOTS) & 1)
        fence_async_shared()
        score = _scores(query, k_ring, i, S)
        mbarrier.wait(v_full.index(before), ((i - 1) // SLOTS) & 1)
        fence_async_shared()
    else:
        async_copy.wait_group(1)
        fence_async_shared()
        _barrier()  # K(i) and V(i - 1) are there, and all have done with K(i - 1) and V(i - 2)
        score = _scores(query, k_ring, i, S)
    OUT: gl.constexpr = acc.type.layout
    acc = warpgroup_mma(_unpack(weights, v.dtype.element_ty, OUT), v_ring.index(before), acc, is_async=True)
    if not SPLIT:
        _start_copy(k_ring, i + 2, k, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        _start_copy(v_ring, i + 1, v, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        async_copy.commit_group()
    words = (i, i, i, i)
    if MODE != CAUSAL:
        words = _words(bits, i, start, stop, member, SIZE)
    score = warpgroup_mma_wait(1, deps=[score])
    if SPLIT:
        mbarrier.arrive(k_free.index(now))
    weight, shrink, top, total = _soften(score, top, total, scale_log2, words, origin + i * STEP, row, S, MODE, MASK)
    # A wait that is over: ptxas would move the one for the product above the softmax, but moves nothing across a branch.
    if SPLIT:
        mbarrier.wait(v_full.index(before), ((i - 1) // SLOTS) & 1)
    else:
        mbarrier.wait(k_full.index(0), 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if SPLIT:
        mbarrier.arrive(v_free.index(before))
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return top, total, acc, _pack(weight, v.dtype.element_ty)


@gluon.jit
def _attend(
    half, q, k, v, keys, bits, out, lse, place, rings, bars, kv, scale_log2,
    HKV: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, MODE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The rows of one warpgroup (SPLIT) or both."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    SIZE: gl.constexpr = 128 // PACK
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, STEP, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    row0, _, origin, limit, start, stop = place
    k_ring, v_ring = rings
    k_full, v_full, k_free, v_free = bars

    _, head, inside = _rows(place, kv, half, ROWS, gl.SliceLayout(1, A), HKV, GROUP, PACK)
    at = gl.expand_dims(q + head * D, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, A)), 0)
    query = gl.load(at, mask=gl.expand_dims(inside, 1), other=0.0)
    member, head, inside = _rows(place, kv, half, ROWS, gl.SliceLayout(1, S), HKV, GROUP, PACK)
    own = limit - place[1]  # row of the first query's own key
    row = own + member

    steps = gl.maximum((stop - start + STEP - 1) // STEP, 1)
    if SPLIT:
        mbarrier.wait(k_full.index(0), 0)
    else:
        _start_copy(k_ring, 0, k, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        async_copy.commit_group()
        _start_copy(k_ring, 1, k, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        _start_copy(v_ring, 0, v, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        async_copy.commit_group()
        _start_copy(k_ring, 2, k, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        _start_copy(v_ring, 1, v, keys, start, stop, origin, limit, kv, HKV, D, MODE, 8)
        async_copy.commit_group()
        async_copy.wait_group(2)
        _barrier()
    fence_async_shared()
    score = _scores(query, k_ring, 0, S)
    words = (start, start, start, start)
    if MODE != CAUSAL:
        words = _words(bits, 0, start, stop, member, SIZE)
    score = warpgroup_mma_wait(0, deps=[score])
    if SPLIT:
        mbarrier.arrive(k_free.index(0))
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
    weight, _, top, total = _soften(score, top, total, scale_log2, words, origin, row, S, MODE, True)
    weights = _pack(weight, v.dtype.element_ty)
    acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
    middle = 1
    if MODE == CAUSAL:  # steps whose keys all rows see
        middle = gl.minimum(gl.maximum((own + half * ROWS // PACK + 1 - origin) // STEP, 1), steps)
        for i in range(1, middle):
            top, total, acc, weights = _step(
                i, top, total, acc, weights, query, member, row, place, k, v, keys, bits, rings, bars, kv, scale_log2,
                S, HKV, D, SIZE, MODE, False, SPLIT,
            )  # fmt: skip
    for i in range(middle, steps):
        top, total, acc, weights = _step(
            i, top, total, acc, weights, query, member, row, place, k, v, keys, bits, rings, bars, kv, scale_log2,
            S, HKV, D, SIZE, MODE, True, SPLIT,
        )  # fmt: skip
    last = steps - 1
    if SPLIT:
        mbarrier.wait(v_full.index(last % SLOTS), (last // SLOTS) & 1)
    else:
        async_copy.wait_group(0)
        _barrier()
    fence_async_shared()
    acc = warpgroup_mma(_unpack(weights, v.dtype.element_ty, OUT), v_ring.index(last % SLOTS), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    norm = gl.where(total > 0, total, 1.0)
    value = gl.where(total > 0, (top * scale_log2 + gl.log2(norm)) * 0.6931471805599453, float("-inf"))
    gl.store(lse + head, value, mask=inside)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / norm, gl.SliceLayout(1, OUT)), 1)
    _, head, inside = _rows(place, kv, half, ROWS, gl.SliceLayout(1, OUT), HKV, GROUP, PACK)
    at = gl.expand_dims(out + head * D, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, OUT)), 0)
    gl.store(at, acc.to(out.dtype.element_ty), mask=gl.expand_dims(inside, 1))


@gluon.jit
def _feed(k, v, keys, place, rings, bars, kv, HKV: gl.constexpr, D: gl.constexpr, MODE: gl.constexpr):
    """Copy the keys and values of every step as slots come free."""
    _, _, origin, limit, start, stop = place
    k_ring, v_ring = rings
    k_full, v_full, k_free, v_free = bars
    for i in range(0, gl.maximum((stop - start + STEP - 1) // STEP, 1)):
        slot, phase = i % SLOTS, ((i // SLOTS) & 1) ^ 1
        mbarrier.wait(k_free.index(slot), phase)
        _start_copy(k_ring, i, k, keys, start, stop, origin, limit, kv, HKV, D, MODE, 4)
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        mbarrier.wait(v_free.index(slot), phase)
        _start_copy(v_ring, i, v, keys, start, stop, origin, limit, kv, HKV, D, MODE, 4)
        async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)


@gluon.jit(do_not_specialize=["begin", "blocks"], do_not_specialize_on_alignment=["stops"])
def _gqa_prefill_sm90(
    q, k, v, out, lse, keys, bits, offsets, stops, first, rows, origin, shift, begin, blocks, scale_log2,
    HKV: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, MODE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    kv, block = gl.program_id(0) % HKV, blocks - 1 - gl.program_id(0) // HKV  # the longest lists first
    row0, num = gl.load(first + begin + block), gl.load(rows + begin + block)
    limit = row0 + num + gl.load(shift + begin + block)  # one past the last query's own key
    place = (row0, num, gl.load(origin + begin + block), limit, gl.load(offsets + block), gl.load(stops + block))
    rings = (
        gl.allocate_shared_memory(k.dtype.element_ty, [SLOTS, STEP, D], TILE),
        gl.allocate_shared_memory(v.dtype.element_ty, [SLOTS, STEP, D], TILE),
    )
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    bars = (
        gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER), gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER),
    )  # fmt: skip
    if SPLIT:
        for slot in gl.static_range(SLOTS):
            mbarrier.init(bars[0].index(slot), 128)  # every thread that copies
            mbarrier.init(bars[1].index(slot), 128)
            mbarrier.init(bars[2].index(slot), 2)  # the warpgroups that read
            mbarrier.init(bars[3].index(slot), 2)
        gl.warp_specialize(
            [
                (_attend, (0, q, k, v, keys, bits, out, lse, place, rings, bars, kv, scale_log2, HKV, GROUP, PACK, D, MODE, SPLIT)),
                (_attend, (1, q, k, v, keys, bits, out, lse, place, rings, bars, kv, scale_log2, HKV, GROUP, PACK, D, MODE, SPLIT)),
                (_feed, (k, v, keys, place, rings, bars, kv, HKV, D, MODE)),
            ],
            [4, 4], [232, 40],
        )  # fmt: skip
    else:
        mbarrier.init(bars[0].index(0), 1)
        mbarrier.arrive(bars[0].index(0))
        _attend(0, q, k, v, keys, bits, out, lse, place, rings, bars, kv, scale_log2, HKV, GROUP, PACK, D, MODE, SPLIT)


def launch(q, k, v, out, lse, lists, scale, split=True):
    """Fill out and lse for the queries of one piece of lists: all contiguous. Arguments as those of `sparse_prefill.forward_piece`."""
    kv_heads, dim = k.shape[1:]
    group, blocks, host = q.shape[1] // kv_heads, lists.end - lists.begin, lists.blocks
    mode = CAUSAL if lists.bits is None else WHOLE if lists.fixed else LISTED
    _gqa_prefill_sm90[(blocks * kv_heads,)](
        q, k, v, out, lse, lists.keys, lists.bits, lists.offsets, lists.stops, host.first, host.rows, host.origin, host.shift, lists.begin,
        blocks, scale * 1.4426950408889634,
        HKV=kv_heads, GROUP=group, PACK=triton.next_power_of_2(group), D=dim, MODE=mode, SPLIT=split,
        num_warps=4 if split else 8, enable_fp_fusion=True,
    )  # fmt: skip


def fits(q, k, size, scale):
    """Whether this kernel takes these tensors in blocks of `size` queries: SM90, 16 bits, 128 rows of 64 or 128 numbers, a positive scale."""
    return (
        q.is_cuda
        and q.dtype == k.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in (64, 128)
        and size * triton.next_power_of_2(q.shape[1] // k.shape[1]) == 128
        and scale > 0
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )
