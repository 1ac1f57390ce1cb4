"""The kernels of key_lists.py: bitmaps of sets, their union over a block of queries, and the lists and bits that come of them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_row"])
def _mark(
    indices, row_origin, bitmap, first_row, index_stride, words,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One bit a selected position: bitmap int32 [rows, words]. The order of arrival does not matter to an OR."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pos = tl.load(indices + (first_row + row) * index_stride + slot, mask=slot < K, other=-1)
    own = first_row + row - tl.load(row_origin + first_row + row)
    inside = (pos >= 0) & (pos <= own)
    tl.atomic_or(bitmap + row * words + (pos >> 5), 1 << (pos & 31), mask=inside, sem="relaxed")


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["stops"])
def _choose(
    indices, first, rows, row_origin, offsets, stops, bits, begin, index_stride,
    K: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The bits of one query of a block whose list holds every position from its sequence's first on."""
    block, query = tl.program_id(0) // SIZE, tl.program_id(0) % SIZE
    row = (tl.load(first + begin + block) + query).to(tl.int64)
    limit = tl.where(query < tl.load(rows + begin + block), K, 0)  # nobody's bits are none
    own = row - tl.load(row_origin + row, mask=limit > 0, other=0)
    start, stop = tl.load(offsets + block), tl.load(stops + block)
    offs_k, offs_w = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W)
    for w in range(0, (stop - start) // 32, BLOCK_W):
        word = tl.zeros([BLOCK_W], tl.int32)
        for slot in range(0, K, BLOCK_K):
            pos = tl.load(indices + row * index_stride + slot + offs_k, mask=slot + offs_k < limit, other=-1)
            inside = (pos >= 0) & (pos <= own)
            here = inside[:, None] & ((pos >> 5)[:, None] == (w + offs_w)[None, :])
            word |= tl.reduce(tl.where(here, 1 << (pos & 31)[:, None], 0), 0, _either)
        at = bits + (start // 32 + w + offs_w) * SIZE + query
        tl.store(at, word, mask=w + offs_w < (stop - start) // 32)


@triton.jit
def _count_bits(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit(do_not_specialize=["begin", "first_row"])
def _union(bitmap, first, rows, union, counts, begin, first_row, words, SIZE: tl.constexpr, BLOCK_W: tl.constexpr):
    """OR of the block's rows: union int32 [blocks, words]; counts int32 [blocks]: bits in it."""
    block = tl.program_id(0)
    row = tl.load(first + begin + block) - first_row
    num = tl.load(rows + begin + block)
    offs_w, offs_q = tl.arange(0, BLOCK_W), tl.arange(0, SIZE)
    total = tl.zeros([BLOCK_W], tl.int32)
    base = bitmap + (row + offs_q).to(tl.int64)[:, None] * words
    for w in range(0, words, BLOCK_W):
        mask = (offs_q < num)[:, None] & ((w + offs_w) < words)[None, :]
        word = tl.reduce(tl.load(base + (w + offs_w)[None, :], mask=mask, other=0), 0, _either)
        tl.store(union + block.to(tl.int64) * words + w + offs_w, word, mask=(w + offs_w) < words)
        total += _count_bits(word)
    tl.store(counts + block, tl.sum(total, 0))


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["stops"])
def _fill(
    union, origin, offsets, stops, keys, begin, words,
    BLOCK_W: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The rows of the union's bits, one program a block, and -1 up to the list's end."""
    block = tl.program_id(0)
    base_key = tl.load(origin + begin + block)
    at, stop = tl.load(offsets + block), tl.load(stops + block)
    offs_w, bit = tl.arange(0, BLOCK_W), tl.arange(0, 32)
    for w in range(0, words, BLOCK_W):
        word = tl.load(union + block.to(tl.int64) * words + w + offs_w, mask=(w + offs_w) < words, other=0)
        there = (word[:, None] >> bit[None, :]) & 1
        inner = tl.cumsum(there, 1)
        sums = _count_bits(word)
        place = at + (tl.cumsum(sums, 0) - sums)[:, None] + inner - 1
        tl.store(keys + place, base_key + (w + offs_w)[:, None] * 32 + bit[None, :], mask=there != 0)
        at += tl.sum(sums, 0)
    tail = at + tl.arange(0, UNIT)
    tl.store(keys + tail, tl.full([UNIT], -1, tl.int32), mask=tail < stop)


@triton.jit(do_not_specialize=["begin", "first_row"], do_not_specialize_on_alignment=["stops"])
def _members(
    bitmap, first, rows, origin, offsets, stops, keys, bits, begin, first_row, words,
    SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each query's bit at the listed keys of CHUNK entries of a block."""
    block = tl.program_id(0)
    row = tl.load(first + begin + block) - first_row
    num, base_key = tl.load(rows + begin + block), tl.load(origin + begin + block)
    start, stop = tl.load(offsets + block) + tl.program_id(1) * CHUNK, tl.load(stops + block)
    offs_q, bit = tl.arange(0, SIZE), tl.arange(0, 32)
    base = (row + offs_q)[:, None] * words  # below 2^31: a piece's bitmap is small
    for e in range(start, tl.minimum(start + CHUNK, stop), 32):
        key = tl.load(keys + e + bit)
        pos = tl.where(key >= 0, key - base_key, 0)
        mask = (offs_q < num)[:, None] & (key >= 0)[None, :]
        word = tl.load(bitmap + (base + (pos >> 5)[None, :]), mask=mask, other=0)
        mine = ((word >> (pos & 31)[None, :]) & 1) << bit[None, :]
        tl.store(bits + e // 32 * SIZE + offs_q, tl.sum(mine, 1))
