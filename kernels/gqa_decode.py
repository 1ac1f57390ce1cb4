"""Sparse decode for grouped-query attention: one query per sequence gathers its selected keys from a paged cache.

One program per (sequence, split, kv head). A split is a piece of the selection list; with a given size a row's bits do not
depend on the batch. Each program writes its partial sum; the last one of a (sequence, kv head) to arrive folds the partials in
split order, whoever that was, so the result does not depend on the order of arrival either.
"""

import torch
import triton
import triton.language as tl

SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227}  # KiB of shared memory a program may take, by compute capability


@triton.jit
def _gqa_decode(
    q, k_cache, v_cache, table, indices, counts, seq_lens, sink, out, lse, part_out, part_lse, arrivals,
    scale_log2, capacity, index_stride, table_stride, token_stride, head_stride,
    HKV: tl.constexpr, GROUP: tl.constexpr, JOIN: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr, IDENTITY: tl.constexpr, SINK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # A program takes JOIN neighbouring kv heads as one of dimension JOIN * D: a query is zero outside its own head's part.
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = HKV // JOIN
    kv, split, b = pid % BLOCKS, (pid // BLOCKS) % SPLITS, pid // (BLOCKS * SPLITS)
    offs_h, offs_d, offs_n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask_h, mask_d = offs_h < GROUP * JOIN, offs_d < D * JOIN
    heads = (b * BLOCKS + kv).to(tl.int64) * (GROUP * JOIN) + offs_h  # row of [B * H]
    mask_hd = (offs_h // GROUP)[:, None] == (offs_d // D)[None, :]
    mask_hd = mask_hd & mask_h[:, None] & mask_d[None, :]
    query = tl.load(q + heads[:, None] * D + (offs_d % D)[None, :], mask=mask_hd, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    seq_len = tl.load(seq_lens + b)
    count = seq_len if IDENTITY else tl.load(counts + b)
    first = split * CHUNK
    last = tl.minimum(first + CHUNK, tl.minimum(count, capacity))

    # Physical places of the whole split first: inside the loop no address waits for an index or a page.
    b64, step = b.to(tl.int64), tl.arange(0, STEPS)[:, None]
    slot = first + step * BLOCK_N + offs_n[None, :]  # [STEPS, N]
    pos = slot if IDENTITY else tl.load(indices + b64 * index_stride + slot, mask=slot < last, other=-1)
    inside = (pos >= 0) & (pos < seq_len) & (slot < last)
    page = tl.load(table + b64 * table_stride + pos // PAGE, mask=inside, other=0)
    places = tl.where(inside, page * PAGE + pos % PAGE, -1)

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for i in range(0, (last - first + BLOCK_N - 1) // BLOCK_N):
        place = tl.sum(tl.where(step == i, places, 0), 0)
        valid = place >= 0
        row = place.to(tl.int64) * token_stride + kv * JOIN * head_stride
        where = row[:, None] + offs_d[None, :]
        mask = valid[:, None] & mask_d[None, :]
        key = tl.load(k_cache + where, mask=mask, other=0.0)  # [N, D]
        value = tl.load(v_cache + where, mask=mask, other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2  # [H, N]
        score = tl.where(valid[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    part = heads * SPLITS  # row of [B * H, SPLITS]
    if SPLITS > 1:
        norm = tl.where(total > 0, total, 1.0)
        tl.store(part_out + (part + split)[:, None] * D + (offs_d % D)[None, :], acc / norm[:, None], mask=mask_hd)
        tl.store(part_lse + part + split, tl.where(total > 0, top + tl.log2(norm), float("-inf")), mask=mask_h)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + b * BLOCKS + kv, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        tl.store(arrivals + b * BLOCKS + kv, 0)  # ready for the next launch
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for base in range(0, SPLITS, UNROLL):
            for j in tl.static_range(UNROLL):
                s = base + j
                here = mask_h & (offs_h * 0 + s < SPLITS)
                one_lse = tl.load(part_lse + part + s, mask=here, other=float("-inf"), cache_modifier=".cg")
                one_row = part_out + (part + s)[:, None] * D + (offs_d % D)[None, :]
                one = tl.load(one_row, mask=here[:, None] & mask_hd, other=0.0, cache_modifier=".cg")
                new_top = tl.maximum(top, one_lse)
                safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                shrink, grow = tl.exp2(top - safe), tl.exp2(one_lse - safe)
                total = total * shrink + grow
                acc = acc * shrink[:, None] + one * grow[:, None]
                top = new_top
    norm = tl.where(total > 0, total, 1.0)
    row_lse = tl.where(total > 0, (top + tl.log2(norm)) * 0.6931471805599453, float("-inf"))
    result = acc / norm[:, None]
    if SINK:
        extra = tl.load(sink + kv * GROUP * JOIN + offs_h, mask=mask_h, other=0.0)
        result = result * tl.where(total > 0, 1.0 / (1.0 + tl.exp(extra - row_lse)), 0.0)[:, None]
    tl.store(out + heads[:, None] * D + (offs_d % D)[None, :], result.to(out.dtype.element_ty), mask=mask_hd)
    tl.store(lse + heads, row_lse, mask=mask_h)


def plan(batch, kv_heads, row_bytes=256, shared=SHARED[90]):
    """(positions per program, per step, stages) that an H200 ran fastest: short splits only while they are needed to fill it.

    row_bytes: one key of one head. shared: KiB that a program may take; chips with less get fewer stages, then shorter steps.
    """
    programs = batch * kv_heads
    split, block_n, stages = (256, 64, 3) if programs <= 16 else (512, 64, 3) if programs < 256 else (2048, 64, 3)
    if programs >= 512:
        block_n, stages = 128, 2
    while 2 * block_n * row_bytes * stages > 0.9 * 1024 * shared and block_n > 16:
        block_n, stages = (block_n, stages - 1) if stages > 2 else (block_n // 2, stages)
    return split, block_n, stages


def stages_of(block_n, row_bytes, shared):
    """Stages of steps whose size is given: three, or two where they do not fit."""
    return 3 if 2 * block_n * row_bytes * 3 <= 0.9 * 1024 * shared else 2


def _shared(device):
    """KiB of shared memory a program may take on this device."""
    if device.type == "cpu":
        return SHARED[90]
    major, minor = torch.cuda.get_device_capability(device)
    return SHARED.get(10 * major + minor, 99)


def splits_of(q, k_cache, block_table, indices=None, split=None):
    """How many pieces `gqa_decode` cuts these contexts or sets into: what its workspace has to hold."""
    capacity = block_table.shape[1] * k_cache.shape[1] if indices is None else indices.shape[1]
    row_bytes = q.shape[2] * q.element_size()
    return max(1, triton.cdiv(capacity, split or plan(len(q), k_cache.shape[2], row_bytes, _shared(q.device))[0]))


def gqa_decode_workspace(batch, heads, kv_heads, dim, splits, device):
    """Scratch of `gqa_decode`: arrivals int32 (zero; every launch leaves it zero), partial outputs and lse. One per stream."""
    arrivals = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)
    part_out = torch.empty(batch * heads * splits * dim, dtype=torch.float32, device=device)
    return arrivals, part_out, torch.empty(batch * heads * splits, dtype=torch.float32, device=device)


def gqa_decode(
    q, k_cache, v_cache, block_table, seq_lens, indices=None, counts=None, scale=None, sink=None,
    out=None, lse=None, workspace=None, split=None, block_n=None, join=1, num_warps=4, num_stages=None,
):  # fmt: skip
    """Attention of one query per sequence over its selected positions.

    q [B, H, D]; k_cache, v_cache [pages, page, H_kv, D] (equal strides, pages back to back); block_table int32
    [B, max_pages]; seq_lens int32 [B]; indices int32 [B, k] logical positions, counts int32 [B] how many of them to read
    (None: every position below seq_lens). An index outside [0, seq_len) adds nothing; a repeated one counts as often as it
    stands. sink fp32 [H]: a logit that joins the denominator of `out` only.
    Returns out [B, H, D] in q's dtype and lse fp32 [B, H] (natural logarithm, without the sink; -inf and out 0 where the set
    is empty). split, block_n: positions per program and per step; they define the last bits. None picks them for speed from
    the size of the batch (`plan`); give constants (512, 64) for bits that do not depend on it.
    Graph-safe when out, lse and workspace are given: no synchronisation, no allocation.
    """
    batch, heads, dim = q.shape
    kv_heads, page = k_cache.shape[2], k_cache.shape[1]
    if heads % kv_heads or k_cache.shape != v_cache.shape or k_cache.shape[3] != dim:
        raise ValueError(
            f"gqa_decode: q {tuple(q.shape)}, k {tuple(k_cache.shape)} and v {tuple(v_cache.shape)} do not fit"
        )
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1 or k_cache.stride(0) != page * k_cache.stride(1):
        raise ValueError(
            "gqa_decode: k_cache and v_cache need equal strides, pages back to back and a contiguous last dimension"
        )
    if (indices is None) != (counts is None):
        raise ValueError("gqa_decode: indices and counts come together")
    if join > 1 and (kv_heads % join or k_cache.stride(2) != dim):
        raise ValueError(f"gqa_decode: join={join} needs a multiple of {join} kv heads, back to back")
    q = q.contiguous()
    group = heads // kv_heads
    capacity = block_table.shape[1] * page if indices is None else indices.shape[1]
    row_bytes, shared = dim * join * q.element_size(), _shared(q.device)
    chosen = plan(batch, kv_heads, row_bytes, shared)
    num_stages = num_stages or (stages_of(block_n, row_bytes, shared) if split and block_n else chosen[2])
    split, room = split or chosen[0], max(16, triton.next_power_of_2(capacity))
    splits = max(1, triton.cdiv(capacity, split))
    block_n = block_n or min(chosen[1], room)
    split = min(split, max(block_n, room))  # no more places are looked up than there are; the bits stay
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device) if lse is None else lse
    if batch == 0:
        return out, lse
    arrivals, part_out, part_lse = workspace or gqa_decode_workspace(batch, heads, kv_heads, dim, splits, q.device)
    _gqa_decode[(batch * splits * kv_heads // join,)](
        q, k_cache, v_cache, block_table, indices, counts, seq_lens, sink, out, lse, part_out, part_lse, arrivals,
        (dim**-0.5 if scale is None else scale) * 1.4426950408889634, capacity,
        0 if indices is None else indices.stride(0), block_table.stride(0), *k_cache.stride()[1:3],
        HKV=kv_heads, GROUP=group, JOIN=join, D=dim, PAGE=page, SPLITS=splits, CHUNK=split, STEPS=triton.next_power_of_2(triton.cdiv(split, block_n)),
        BLOCK_H=max(16, triton.next_power_of_2(group * join)), BLOCK_N=block_n, BLOCK_D=max(16, triton.next_power_of_2(dim * join)),
        UNROLL=min(4, splits), IDENTITY=indices is None, SINK=sink is not None, UPCAST=q.device.type == "cpu",
        num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse
