"""Grouped-query sparse attention of packed queries on SM90: the forward of sparse_prefill.py, scheduled by hand (Gluon).

    step i      S = Q K(i)^T starts | O += P V(i-1) starts | softmax of S | O is rescaled, P = the new weights

so the tensor cores always have a product to do while a softmax runs. A block's 128 rows (queries x heads of a kv head) are those of two
warpgroups, which hold Q, S, P and O in registers and read K and V, 128 keys a step, from two rings in shared memory. Each goes at its own
pace; a third warpgroup copies, and barriers say which slots of the rings are full and which are free. Neighbouring keys are copied by the
TMA, but for a context's last ones, past which nothing is read; listed ones by threads.

Either way a row meets its keys in the same order, and its bits are the same. One step for both warpgroups, copied by themselves, took 1.3
times as long (480 TF for 645 of dense tiles on an H200).
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from winnow.kernels.mla_decode_sm90 import _barrier, _copy

STEP = gl.constexpr(128)  # keys
SLOTS = gl.constexpr(3)  # of a ring
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_bulk_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # Triton 3.9, 3.6


@gluon.constexpr_function
def _line(dim):
    """Which of 128 rows a thread of four warps holds: one of the 32 that its warp copies in `_start_copy`, where dim / 8 threads share a row."""
    share, rows = dim // 8, 256 // dim
    lanes = [[4 * rows << n] for n in range(share.bit_length() - 1)] + [[1 << n] for n in range(rows.bit_length() - 1)]
    return gl.DistributedLinearLayout([], lanes, [[rows], [2 * rows]], [], [128])


@gluon.jit
def _listed(keys, i, place, D: gl.constexpr):
    """The keys of step i, -1 past the stop: one a thread, of the 32 rows that its warp will copy. Read a step before they are needed."""
    LINE: gl.constexpr = _line(D)
    entry = place[4] + i * STEP
    n = gl.arange(0, STEP, layout=LINE)
    return gl.load(keys + entry + n, mask=n < place[5] - entry, other=-1)


@gluon.jit
def _start_copy(ring, i, source, keys, place, kv, HKV: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """Begin to copy the keys of step i to their slot; zeros where there are none. keys: `_listed` of the step, where they are."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    _, _, origin, limit, _, _ = place
    n = gl.arange(0, STEP, layout=gl.SliceLayout(1, COPY))
    cols = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, COPY)), 0)
    if LISTED:
        key = gl.convert_layout(keys, gl.SliceLayout(1, COPY))  # within a warp
        at = gl.expand_dims(source + key.to(gl.int64) * (HKV * D) + kv * D, 1) + cols
        there = key >= 0
    else:
        key = origin + i * STEP
        at = source + key.to(gl.int64) * (HKV * D) + kv * D + (gl.expand_dims(n * (HKV * D), 1) + cols)
        there = n < limit - key
    _copy(ring.index(i % SLOTS), at, mask=gl.expand_dims(there, 1))


@gluon.jit
def _wait_full(full, i, LISTED: gl.constexpr):
    mbarrier.wait(full.index(i % SLOTS), (i // SLOTS) & 1)
    if LISTED:
        fence_async_shared()  # copies write as threads do, products read as the TMA does


@gluon.jit
def _scores(query, ring, i, S: gl.constexpr):
    zero = gl.zeros([query.shape[0], STEP], gl.float32, layout=S)
    return warpgroup_mma(query, ring.index(i % SLOTS).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _words(bits, i, place, member, PACK: gl.constexpr, LISTED: gl.constexpr):
    """The four words of each row in step i, 0 past the stop. Nothing where keys are chosen by their places."""
    _, _, _, _, start, stop = place
    if not LISTED:
        return member, member, member, member
    SIZE: gl.constexpr = 128 // PACK
    entry = start + i * STEP
    at = bits + (entry // 32).to(gl.int64) * SIZE + member
    lower, upper = entry < stop, entry + 64 < stop
    return (
        gl.load(at, mask=lower, other=0), gl.load(at + SIZE, mask=lower, other=0),
        gl.load(at + 2 * SIZE, mask=upper, other=0), gl.load(at + 3 * SIZE, mask=upper, other=0),
    )  # fmt: skip


@gluon.jit
def _if(ASK: gl.constexpr, score, x, y):
    """score where ASK of (x, y), in PTX, sets p; -inf elsewhere."""
    CODE: gl.constexpr = "{.reg .pred p; .reg .b32 t; " + ASK + " selp.f32 $0, $1, 0fFF800000, p;}"
    return gl.inline_asm_elementwise(CODE, "=f,f,r,r", [score, x, y], gl.float32, True, 1)


@gluon.jit
def _soften(score, top, total, scale_log2, words, first, row, LISTED: gl.constexpr, MASK: gl.constexpr):
    """(weights, what earlier ones shrink by, top, total) of a step whose first key is `first`. top: of the scores times scale_log2."""
    if MASK:
        n = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, score.type.layout)), 0)
        # By hand, because LLVM gathers the answers of a plain `where` in words and takes them apart again.
        if not LISTED:
            score = _if("setp.le.s32 p, $2, $3;", score, first + n, gl.expand_dims(row, 1))
        else:
            lower = gl.where(n < 32, gl.expand_dims(words[0], 1), gl.expand_dims(words[1], 1))
            upper = gl.where(n < 96, gl.expand_dims(words[2], 1), gl.expand_dims(words[3], 1))
            word = gl.where(n < 64, lower, upper)
            score = _if("and.b32 t, $2, $3; setp.ne.b32 p, t, 0;", score, word, 1 << (n & 31))
    # In eight chains, which are short; sums stay in their threads until the end.
    highest = gl.max(gl.max(gl.reshape(score, [score.shape[0], STEP // 8, 8]), 1), 1)
    new_top = gl.maximum(top, gl.convert_layout(highest, top.type.layout) * scale_log2)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = gl.exp2(top - safe)
    weight = gl.exp2(score * scale_log2 - gl.expand_dims(safe, 1))
    part = gl.sum(gl.reshape(weight, [score.shape[0], STEP // 8, 8]), 1)
    total = total * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, part.type.layout)), 1) + part
    return weight, shrink, new_top, total


@gluon.jit
def _pack(weight, KIND: gl.constexpr):
    """fp32 [rows, 128] as pairs of 16 bits, int32 [rows, 64]: what goes around a loop unpacked takes a register a number."""
    even, odd = gl.split(gl.reshape(weight, [weight.shape[0], STEP // 2, 2]))
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if KIND.is_bf16() else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ROUND, "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def _add_values(acc, pairs, ring, i, KIND: gl.constexpr):
    """Begin acc += weights [rows, 128] times the values of step i."""
    even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], (gl.int16, gl.int16), True, 1)
    weights = gl.reshape(gl.join(even, odd), [pairs.shape[0], STEP]).to(KIND, bitcast=True)
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(weights, ring.index(i % SLOTS), acc, is_async=True)


@gluon.jit
def _step(
    i, top, total, acc, pairs, query, member, row, tensors, place, rings, bars, kv, scale_log2,
    HKV: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """S(i) and its softmax beside the product of the weights of step i - 1 and their values."""
    _, _, v, _, bits = tensors
    k_ring, v_ring = rings
    k_full, v_full, k_free, v_free = bars
    S: gl.constexpr = row.type.layout.parent
    _wait_full(k_full, i, LISTED)
    score = _scores(query, k_ring, i, S)
    _wait_full(v_full, i - 1, LISTED)
    acc = _add_values(acc, pairs, v_ring, i - 1, v.dtype.element_ty)
    words = _words(bits, i, place, member, PACK, LISTED)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(k_free.index(i % SLOTS))
    weight, shrink, top, total = _soften(score, top, total, scale_log2, words, place[2] + i * STEP, row, LISTED, MASK)
    # Waits for what is there: ptxas would move the wait for the product above the softmax, but moves nothing across a branch.
    mbarrier.wait(v_full.index((i - 1) % SLOTS), ((i - 1) // SLOTS) & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index((i - 1) % SLOTS))
    OUT: gl.constexpr = acc.type.layout
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return top, total, acc, _pack(weight, v.dtype.element_ty)


@gluon.jit
def _rows(place, kv, half, ROWS: gl.constexpr, LAYOUT: gl.constexpr, HKV: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr):  # fmt: skip
    """Of each row: its query in the block, its place among [T * H], and whether there is one."""
    m = half * ROWS + gl.arange(0, ROWS, layout=LAYOUT)
    query, head = m // PACK, m % PACK
    at = (place[0] + query).to(gl.int64) * (HKV * GROUP) + kv * GROUP + head
    return query, at, (query < place[1]) & (head < GROUP)


@gluon.jit
def _attend(
    half, tensors, out, lse, place, rings, bars, kv, scale_log2,
    HKV: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """The rows of one warpgroup, the first or the second half."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, STEP, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, D, 16])
    Q: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    q, _, v, _, bits = tensors
    _, num, origin, limit, start, stop = place
    k_ring, v_ring = rings
    k_full, v_full, k_free, _ = bars

    _, at, inside = _rows(place, kv, half, ROWS, gl.SliceLayout(1, Q), HKV, GROUP, PACK)
    at = gl.expand_dims(q + at * D, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, Q)), 0)
    query = gl.load(at, mask=gl.expand_dims(inside, 1), other=0.0)
    member, at, inside = _rows(place, kv, half, ROWS, gl.SliceLayout(1, S), HKV, GROUP, PACK)
    row = limit - num + member  # of the query's own key
    steps = gl.maximum((stop - start + STEP - 1) // STEP, 1)
    _wait_full(k_full, 0, LISTED)
    score = _scores(query, k_ring, 0, S)
    words = _words(bits, 0, place, member, PACK, LISTED)
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(k_free.index(0))
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    weight, _, top, total = _soften(score, top, 0.0, scale_log2, words, origin, row, LISTED, True)
    pairs = _pack(weight, v.dtype.element_ty)
    acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
    masked = 1
    if not LISTED:  # the steps whose keys all rows see come first
        masked = gl.minimum(gl.maximum((limit - num + half * ROWS // PACK + 1 - origin) // STEP, 1), steps)
        for i in range(1, masked):
            top, total, acc, pairs = _step(
                i, top, total, acc, pairs, query, member, row, tensors, place, rings, bars, kv, scale_log2,
                HKV, PACK, D, LISTED, False,
            )  # fmt: skip
    for i in range(masked, steps):
        top, total, acc, pairs = _step(
            i, top, total, acc, pairs, query, member, row, tensors, place, rings, bars, kv, scale_log2,
            HKV, PACK, D, LISTED, True,
        )  # fmt: skip
    _wait_full(v_full, steps - 1, LISTED)
    acc = _add_values(acc, pairs, v_ring, steps - 1, v.dtype.element_ty)
    acc = warpgroup_mma_wait(0, deps=[acc])

    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S))
    norm = gl.where(total > 0, total, 1.0)
    value = gl.where(total > 0, (top + gl.log2(norm)) * 0.6931471805599453, float("-inf"))
    gl.store(lse + at, value, mask=inside)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / norm, gl.SliceLayout(1, OUT)), 1)
    _, at, inside = _rows(place, kv, half, ROWS, gl.SliceLayout(1, OUT), HKV, GROUP, PACK)
    at = gl.expand_dims(out + at * D, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, OUT)), 0)
    gl.store(at, acc.to(out.dtype.element_ty), mask=gl.expand_dims(inside, 1))


@gluon.jit
def _fill_slot(ring, full, free, i, source, rows, keys, place, kv, HKV: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """Copy the keys (or values) of step i, once their slot is free. rows: of a descriptor, where there is one."""
    slot = i % SLOTS
    mbarrier.wait(free.index(slot), ((i // SLOTS) & 1) ^ 1)  # its first use waits for nothing
    if LISTED:
        _start_copy(ring, i, source, keys, place, kv, HKV, D, LISTED)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
    else:
        key = place[2] + i * STEP
        if place[3] - key >= STEP:
            mbarrier.expect(full.index(slot), 2 * STEP * D)
            _bulk_copy(rows, [key, kv * D], full.index(slot), ring.index(slot))
        else:
            _start_copy(ring, i, source, keys, place, kv, HKV, D, LISTED)
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            _barrier()
            mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _feed(tensors, k_rows, v_rows, place, rings, bars, kv, HKV: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """Copy what every step reads."""
    _, k, v, keys, _ = tensors
    k_full, v_full, k_free, v_free = bars
    if LISTED:
        now = _listed(keys, 0, place, D)
    else:
        now = keys
    for i in range(0, gl.maximum((place[5] - place[4] + STEP - 1) // STEP, 1)):
        if LISTED:
            ahead = _listed(keys, i + 1, place, D)
        else:
            ahead = now
        _fill_slot(rings[0], k_full, k_free, i, k, k_rows, now, place, kv, HKV, D, LISTED)
        _fill_slot(rings[1], v_full, v_free, i, v, v_rows, now, place, kv, HKV, D, LISTED)
        now = ahead


@gluon.jit(do_not_specialize=["begin", "blocks"], do_not_specialize_on_alignment=["stops"])
def _gqa_prefill_sm90(
    q, k, v, k_rows, v_rows, out, lse, keys, bits, offsets, stops, first, rows, origin, shift, begin, blocks, scale_log2,
    HKV: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv, block = gl.program_id(0) % HKV, blocks - 1 - gl.program_id(0) // HKV  # the longest lists first
    row0, num = gl.load(first + begin + block), gl.load(rows + begin + block)
    limit = row0 + num + gl.load(shift + begin + block)  # the row after the last query's own key
    # First query's row, number of queries, first key's row, limit, where the list begins and ends.
    place = (row0, num, gl.load(origin + begin + block), limit, gl.load(offsets + block), gl.load(stops + block))
    tensors = (q, k, v, keys, bits)
    k_ring = gl.allocate_shared_memory(k.dtype.element_ty, [SLOTS, STEP, D], TILE)
    v_ring = gl.allocate_shared_memory(v.dtype.element_ty, [SLOTS, STEP, D], TILE)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    rings, bars = (k_ring, v_ring), (k_full, v_full, k_free, v_free)
    for slot in gl.static_range(SLOTS):
        # Full when the TMA has copied, or all threads have; free when both warpgroups have read.
        mbarrier.init(k_full.index(slot), 128 if LISTED else 1)
        mbarrier.init(v_full.index(slot), 128 if LISTED else 1)
        mbarrier.init(k_free.index(slot), 2)
        mbarrier.init(v_free.index(slot), 2)
    gl.warp_specialize(
        [
            (_attend, (0, tensors, out, lse, place, rings, bars, kv, scale_log2, HKV, GROUP, PACK, D, LISTED)),
            (_attend, (1, tensors, out, lse, place, rings, bars, kv, scale_log2, HKV, GROUP, PACK, D, LISTED)),
            (_feed, (tensors, k_rows, v_rows, place, rings, bars, kv, HKV, D, LISTED)),
        ],
        [4, 4],
        [232, 40] if LISTED else [240, 24],
    )


def launch(q, k, v, out, lse, lists, scale):
    """Fill out and lse for the queries of one piece, all contiguous: the arguments of `sparse_prefill.forward_piece`.

    Lists without bits hold every key up to the query; they are not read.
    """
    kv_heads, dim = k.shape[1:]
    group, blocks, host = q.shape[1] // kv_heads, lists.end - lists.begin, lists.blocks
    if not blocks:
        return
    listed, rows = lists.bits is not None, [None, None]
    if not listed:
        rows = [TensorDescriptor.from_tensor(x.view(len(x), -1), [STEP.value, dim], TILE.value) for x in (k, v)]
    _gqa_prefill_sm90[(blocks * kv_heads,)](
        q, k, v, *rows, out, lse, lists.keys, lists.bits if listed else lists.keys, lists.offsets, lists.stops, host.first, host.rows,
        host.origin, host.shift, lists.begin, blocks, scale * 1.4426950408889634,
        HKV=kv_heads, GROUP=group, PACK=triton.next_power_of_2(group), D=dim, LISTED=listed, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def fits(q, k, size, scale):
    """Whether this kernel takes these tensors in blocks of `size` queries: SM90, 16 bits, 128 rows of 64 or 128 numbers, scale above 0."""
    return (
        q.is_cuda
        and q.dtype == k.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in (64, 128)
        and size * triton.next_power_of_2(q.shape[1] // k.shape[1]) == 128
        and scale > 0
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )
