"""Exact top-k of many long rows, as in a prefill: topk.py's sets, from kernels that read the scores twice.

1. `_limits`: a row's bound, as in topk.py: the k-th largest of its group maxima, found once a row. A group's scores lie far apart, for
   neighbours are chosen together: maxima of neighbours, which the scores' own kernel could write, bound such rows worse.
2. `_flag`: of 32 neighbouring scores one word says which are above the bound, one which equal it.
3. `_pick`: one program a row goes through its words. With fewer than k above the bound, the bound is the k-th score and the words are
   the answer; otherwise the scores above it (about 1.4 k on random rows) are fetched, and the k-th is searched among them.
"""

import torch
import triton
import triton.language as tl

from winnow.kernels.topk import _bound, _guesses, _keys, _narrow, _ones, _thresholds, _write

ROWS, WIDTH = 64, 8192  # fewer or shorter rows leave a chip idle between three launches: topk.py
FLAGGED = 4096  # scores of a program of `_flag`
WORDS = 512  # words of a step of `_pick`
TILE = 4096  # candidates whose keys stay in registers
STEP = 1024  # candidates of a step where they do not
WARPS = 4  # of a program of `_pick`


@triton.jit
def _score_of(key):
    """The number whose key this is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(scores, offs, length, VECTOR: tl.constexpr):
    """Scores, -inf at length and past it. The mask is whole for VECTOR neighbours, or every number would be a load of its own."""
    score = tl.load(scores + offs, mask=offs // VECTOR * VECTOR < length, other=float("-inf"))
    return tl.where(offs < length, score, float("-inf"))


@triton.jit(do_not_specialize=["k"])
def _limits(
    scores, lengths, limits, bad, k, score_stride, FOLD: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """limits [row]: a key that at least k of the row's scores reach, and the largest one."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    best = tl.full([FOLD], float("-inf"), tl.float32)
    for base in range(0, length, 4 * FOLD):
        for j in tl.static_range(4):
            score = _load(scores + row * score_stride, base + j * FOLD + tl.arange(0, FOLD), length, VECTOR)
            best = tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
    low, high = _bound(_keys(best), k)
    tl.store(limits + 2 * row, low)
    tl.store(limits + 2 * row + 1, high)
    if high == 2147483647:
        tl.store(bad, 1)


@triton.jit(do_not_specialize=["k"])
def _flag(
    scores, lengths, limits, words, k, score_stride, word_stride, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """words [row]: first those of scores above the row's bound, then, word_stride / 2 on, those of scores equal to it."""
    row, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    length = tl.load(lengths + row)
    if (length <= k) | (chunk * CHUNK >= length):
        return
    low = _score_of(tl.load(limits + 2 * row))
    word, bit = chunk * (CHUNK // 32) + tl.arange(0, CHUNK // 32), tl.arange(0, 32)
    offs = word[:, None] * 32 + bit[None, :]
    score = _load(scores + row * score_stride, offs, length, VECTOR)
    above = tl.sum((score > low).to(tl.int32) << bit[None, :], 1)
    equal = tl.sum(((score == low) & (offs < length)).to(tl.int32) << bit[None, :], 1)
    to = words + row * word_stride + word
    tl.store(to, above)
    tl.store(to + word_stride // 2, equal)


@triton.jit
def _reach(key, one, two, three, SIZE: tl.constexpr):
    """As `topk._count`, with eight keys of a thread in one int32 first: int64 [SIZE / 8]."""
    reach = (key >= one).to(tl.int32) + ((key >= two).to(tl.int32) << 10) + ((key >= three).to(tl.int32) << 20)
    reach = tl.sum(tl.reshape(reach, [8, SIZE // 8]), 0)
    wide = (reach & 0x3FF).to(tl.int64)
    return wide + (((reach >> 10) & 0x3FF).to(tl.int64) << 21) + ((reach >> 20).to(tl.int64) << 42)


@triton.jit
def _some(numbers, base, total, other, SIZE: tl.constexpr):
    """numbers[base : base + SIZE], `other` from total on. The mask is whole for neighbours, as in `_load`."""
    slot = base + tl.arange(0, SIZE)
    number = tl.load(numbers + slot, mask=slot // 4 * 4 < total, other=0)
    return tl.where(slot < total, number, other)


@triton.jit
def _kth(keys, total, low, high, k, TILE: tl.constexpr, STEP: tl.constexpr):
    """The k-th largest of `total` > k keys in (low, high], and how many are larger."""
    key0 = _some(keys, 0, total, -2147483648, TILE)
    at_low, above_high, guess = total, 0, 1
    while low < high:  # as in `topk._select`
        one, two, three = _thresholds(low, high)
        if guess > 0:
            one, two, three = _guesses(low, high, at_low, above_high, k)
        guess = 1 - guess
        found = tl.sum(_reach(key0, one, two, three, TILE), 0)
        for base in range(TILE, total, STEP):
            found += tl.sum(_reach(_some(keys, base, total, -2147483648, STEP), one, two, three, STEP), 0)
        low, high, at_low, above_high = _narrow(found, low, high, at_low, above_high, one, two, three, k, k)
    bigger = tl.sum((key0 > low).to(tl.int32), 0)
    for base in range(TILE, total, STEP):
        bigger += tl.sum((_some(keys, base, total, -2147483648, STEP) > low).to(tl.int32), 0)
    return low, bigger


@triton.jit(do_not_specialize=["k"])
def _pick(
    scores, lengths, limits, words, places, keys, out, counts, k, score_stride, word_stride, place_stride, out_stride,
    BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, K_BLOCK: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    target = out + row * out_stride
    tl.store(counts + row, tl.maximum(tl.minimum(length, k), 0))
    if length <= k:  # nothing to choose
        for base in range(0, k, K_BLOCK):
            slot = base + tl.arange(0, K_BLOCK)
            tl.store(target + slot, tl.where(slot < length, slot, -1), mask=slot < k)
        return
    scores += row * score_stride
    words += row * word_stride
    places += row * place_stride
    keys += row * place_stride
    num, offs = (length + 31) // 32, tl.arange(0, BLOCK)
    ones = tl.zeros([BLOCK], tl.int32)
    for base in range(0, num, BLOCK):
        ones += _ones(tl.load(words + base + offs, mask=base + offs < num, other=0), SOFT)
    total = tl.sum(ones, 0)
    ties = tl.maximum(k - total, 0)  # so many of those equal to the bound
    to = target if total <= k else places
    done, same = 0, 0
    for base in range(0, num, BLOCK):  # bits become places; nothing is waited for here
        there = base + offs < num
        above = tl.load(words + base + offs, mask=there, other=0)
        equal = tl.load(
            words + word_stride // 2 + base + offs, mask=base + offs < tl.where(same < ties, num, 0), other=0
        )
        both = _ones(above, SOFT).to(tl.int64) | (_ones(equal, SOFT).to(tl.int64) << 32)
        ends = tl.cumsum(both, 0)
        rank, tie = done + ((ends - both) & 0xFFFFFFFF).to(tl.int32), same + ((ends - both) >> 32).to(tl.int32)
        left = above | equal
        for _ in range(tl.max(_ones(left, SOFT), 0)):  # the lowest bit of every word at once
            bit = left & -left
            live, tied = left != 0, (equal & bit) != 0
            pos = (base + offs) * 32 + _ones(bit - 1, SOFT)
            tl.store(to + rank + tl.minimum(tie, ties), pos, mask=live & ((tie < ties) | ~tied))
            rank += (live & ~tied).to(tl.int32)
            tie += tied.to(tl.int32)
            left = left & (left - 1)
        both = tl.sum(both, 0)
        done += (both & 0xFFFFFFFF).to(tl.int32)
        same += (both >> 32).to(tl.int32)
    if total <= k:
        # Scores that are NaN are neither above nor equal: no place goes unwritten.
        for base in range(done + tl.minimum(same, ties), k, K_BLOCK):
            slot = base + tl.arange(0, K_BLOCK)
            tl.store(target + slot, tl.full([K_BLOCK], -1, tl.int32), mask=slot < k)
        return
    tl.debug_barrier()
    for base in range(0, total, STEP):
        slot = base + tl.arange(0, STEP)
        key = _keys(tl.load(scores + _some(places, base, total, 0, STEP)))
        tl.store(keys + slot, key, mask=slot < total)
    tl.debug_barrier()
    low, high = tl.load(limits + 2 * row), tl.load(limits + 2 * row + 1)
    threshold, bigger = _kth(keys, total, low, high, k, TILE, STEP)
    ties, done = k - bigger, 0
    for base in range(0, total, STEP):
        key, place = _some(keys, base, total, -2147483648, STEP), _some(places, base, total, 0, STEP)
        ties, done = _write(target, key, place, threshold, ties, done, STEP, SOFT)


@triton.jit(do_not_specialize=["k"])
def _all(lengths, out, counts, k, out_stride, K_BLOCK: tl.constexpr):
    """Every position, for rows of at most k."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    if length > k:
        return
    for base in range(0, k, K_BLOCK):
        slot = base + tl.arange(0, K_BLOCK)
        tl.store(out + row * out_stride + slot, tl.where(slot < length, slot, -1), mask=slot < k)
    tl.store(counts + row, length)


def keep_all(lengths, k, out, counts):
    """Rows of at most k positions keep them all: out int32 [rows, k], -1 tail, counts int32 [rows]; other rows are left alone."""
    if len(lengths):
        _all[(len(lengths),)](
            lengths, out, counts, k, out.stride(0), K_BLOCK=min(2048, triton.next_power_of_2(k)), num_warps=4, enable_fp_fusion=True
        )  # fmt: skip


def suits(rows: int, width: int) -> bool:
    """Whether rows are many and long enough."""
    return rows >= ROWS and width > WIDTH


def topk_rows(scores, lengths, k, out, counts, bad):
    """As `topk.topk` without its checks: out int32 [rows, k] and counts int32 [rows] are filled, bad int32 [1] is 1 after a NaN.

    Scratch: 8 bytes a score, and a sixteenth of them.
    """
    rows, width = scores.shape
    device = scores.device
    chunks = triton.cdiv(width, FLAGGED)
    limits = torch.empty(rows, 2, dtype=torch.int32, device=device)
    words = torch.empty(rows, 2 * chunks * (FLAGGED // 32), dtype=torch.int32, device=device)
    stride = (width + 3) // 4 * 4
    found = torch.empty(2, rows, stride, dtype=torch.int32, device=device)  # places and keys of candidates
    vector = 4 if width % 4 == 0 and scores.stride(0) % 4 == 0 else 1
    soft = device.type == "cpu"
    _limits[(rows,)](
        scores, lengths, limits, bad, k, scores.stride(0),
        FOLD=max(1024, 2 * triton.next_power_of_2(k)), VECTOR=vector,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    _flag[(rows * chunks,)](
        scores, lengths, limits, words, k, scores.stride(0), words.stride(0), CHUNKS=chunks, CHUNK=FLAGGED, VECTOR=vector,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _pick[(rows,)](
        scores, lengths, limits, words, *found, out, counts, k, scores.stride(0), words.stride(0), stride, out.stride(0),
        BLOCK=WORDS, TILE=TILE, STEP=STEP, K_BLOCK=min(2048, triton.next_power_of_2(k)), SOFT=soft, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
