"""Exact top-k of score rows: deterministic, the lowest index wins a tie, ascending output, the same for a row in any batch.

Two kernels, one row over many programs (one kernel when a program holds a whole row):
 1. `_maxima`: the largest key of every group of (strided) scores.
 2. `_select`: the k-th largest of the folded group maxima is a lower bound of the k-th largest score, so each program keeps
    only the positions at or above it, in order (about 1.4 k of them on random rows; of those equal to the bound never more
    than k); the last program of a row to arrive finds the exact k-th key among them and writes the chosen positions.
The decode selection computes scores and group maxima in one kernel (indexer_logits.py) and needs only the second.
Keys: fp32 bits turned into int32 that compare like the numbers, -0 made +0 first. How a row is cut changes no result.
"""

import torch
import triton
import triton.language as tl

BLOCK = 8192  # scores per step of a program
TILE = 4096  # candidates per step of the last program of a row
LEAST = tl.constexpr(-(2**63))  # the pair of no candidate: the least key there is


@triton.jit
def _keys(score):
    """fp32 -> int32 of the same order, -0 equal to +0, NaN above everything."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score != score, 2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _pair(key, place):
    """A candidate as one number: key in the upper half, place in the lower."""
    return (key.to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def _key_of(pair):
    return (pair >> 32).to(tl.int32)


@triton.jit
def _maxima(
    scores, lengths, maxima, score_stride, maxima_stride, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr
):
    row, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    length = tl.load(lengths + row)
    if chunk * CHUNK >= length:
        return
    GROUPS: tl.constexpr = CHUNK // GROUP
    offs = chunk * CHUNK + tl.arange(0, GROUP)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    score = tl.load(scores + row * score_stride + offs, mask=offs < length, other=float("-inf"))
    best = tl.max(tl.where(offs < length, _keys(score), -2147483648), 0)
    tl.store(maxima + row * maxima_stride + chunk * GROUPS + tl.arange(0, GROUPS), best)


@triton.jit
def _thresholds(low, high):
    """Three keys that quarter (low, high]; the distance is unsigned, for it may exceed int32."""
    width = (high - low).to(tl.uint32, bitcast=True)
    quarter, rest = width >> 2, width & 3
    one, two = quarter + (rest + 3) // 4, 2 * quarter + (2 * rest + 3) // 4
    three = 3 * quarter + (3 * rest + 3) // 4
    return (
        low + one.to(tl.int32, bitcast=True),
        low + two.to(tl.int32, bitcast=True),
        low + three.to(tl.int32, bitcast=True),
    )


@triton.jit
def _guesses(low, high, at_low, above_high, k):
    """Three keys of (low, high] around the place where a straight line through the two counts reaches k."""
    width = (high - low).to(tl.uint32, bitcast=True)
    share = (at_low - k).to(tl.float32) / tl.maximum(at_low - above_high, 1).to(tl.float32)
    middle = tl.minimum((share * width.to(tl.float32)).to(tl.uint32), width)
    around = (width >> 5) + 1
    one = tl.maximum(middle, around + 1) - around
    two, three = tl.maximum(middle, 1), tl.where(width - middle > around, middle + around, width)
    one = tl.minimum(one, two)
    return (
        low + one.to(tl.int32, bitcast=True),
        low + two.to(tl.int32, bitcast=True),
        low + three.to(tl.int32, bitcast=True),
    )


@triton.jit
def _count(key, one, two, three):
    """Per key, which of three thresholds it reaches: three counters of 21 bits in one int64."""
    reach = (key >= one).to(tl.int64)
    return reach + ((key >= two).to(tl.int64) << 21) + ((key >= three).to(tl.int64) << 42)


@triton.jit
def _narrow(total, low, high, at_low, above_high, one, two, three, k, enough):
    """The part of [low, high] that holds the k-th largest key, with the counts at its ends. Done when `enough` keys suffice."""
    reach1, reach2, reach3 = (
        (total & 0x1FFFFF).to(tl.int32),
        ((total >> 21) & 0x1FFFFF).to(tl.int32),
        (total >> 42).to(tl.int32),
    )
    reach = tl.where(reach3 >= k, reach3, tl.where(reach2 >= k, reach2, reach1))
    new_low = tl.where(reach3 >= k, three, tl.where(reach2 >= k, two, tl.where(reach1 >= k, one, low)))
    new_high = tl.where(reach3 >= k, high, tl.where(reach2 >= k, three - 1, tl.where(reach1 >= k, two - 1, one - 1)))
    new_high = tl.where((reach1 >= k) & (reach <= enough), new_low, new_high)
    above_high = tl.where(reach3 >= k, above_high, tl.where(reach2 >= k, reach3, tl.where(reach1 >= k, reach2, reach1)))
    return new_low, tl.maximum(new_high, new_low), tl.where(reach1 >= k, reach, at_low), above_high


@triton.jit
def _bound(best, k):
    """A key that at least k of these group maxima reach (their minimum if they are fewer), and the largest one."""
    low, top = tl.min(best, 0), tl.max(best, 0)
    high = top
    while low < high:
        one, two, three = _thresholds(low, high)
        low, high, _, _ = _narrow(
            tl.sum(_count(best, one, two, three), 0), low, high, 0, 0, one, two, three, k, k + (k >> 3)
        )
    return low, top


@triton.jit
def _ones(word, SOFT: tl.constexpr):
    """How many bits of an int32 are set."""
    if SOFT:
        word = word - ((word >> 1) & 0x55555555)
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        return (word + (word >> 8) + (word >> 16) + (word >> 24)) & 0x3F
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _ranks(first, second, SIZE: tl.constexpr, SOFT: tl.constexpr):
    """For two sets of flags: how many stand before each place, and in all. 32 neighbours become a word; only words are scanned."""
    bit = tl.arange(0, 32)[None, :]
    below = (1 << bit) - 1
    word1 = tl.sum(tl.reshape(first, [SIZE // 32, 32]).to(tl.int32) << bit, 1)
    word2 = tl.sum(tl.reshape(second, [SIZE // 32, 32]).to(tl.int32) << bit, 1)
    both = _ones(word1, SOFT) + (_ones(word2, SOFT) << 16)
    before = tl.cumsum(both, 0) - both
    rank1 = (before & 0xFFFF)[:, None] + _ones(word1[:, None] & below, SOFT)
    rank2 = (before >> 16)[:, None] + _ones(word2[:, None] & below, SOFT)
    total = tl.sum(both, 0)
    return tl.reshape(rank1, [SIZE]), tl.reshape(rank2, [SIZE]), total & 0xFFFF, total >> 16


@triton.jit
def _source(slot, found, chunks, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Where candidate number `slot` of a row lies when the chunks' lists are read end to end; and how many there are."""
    source, start = slot, 0
    if CHUNKS <= 32:
        for c in tl.static_range(CHUNKS):
            source = tl.where(slot >= start, slot - start + c * CHUNK, source)
            start += tl.load(found + c, mask=c < chunks, other=0, cache_modifier=".cg")
    else:
        for c in range(chunks):
            source = tl.where(slot >= start, slot - start + c * CHUNK, source)
            start += tl.load(found + c, cache_modifier=".cg")
    return source, start


@triton.jit
def _place_of(pair):
    return (pair & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _write(target, key, place, threshold, ties, done, TILE: tl.constexpr, SOFT: tl.constexpr):
    """Append the chosen of one tile to the row's result; returns the ties still wanted and the places written."""
    bigger, equal = key > threshold, key == threshold
    rank, same, num_bigger, num_equal = _ranks(bigger, equal, TILE, SOFT)
    tl.store(target + done + rank + tl.minimum(same, ties), place, mask=bigger | (equal & (same < ties)))
    taken = tl.minimum(num_equal, ties)
    return ties - taken, done + num_bigger + taken


# Two strides are kept unspecialised (wide_stride is score_stride): loads of one number a lane leave the layout that words of 32 and scattered stores want.
@triton.jit(do_not_specialize=["k", "score_stride", "list_stride"])
def _select(
    scores, lengths, maxima, found, pairs, listed, arrivals, bad, out, counts,
    k, score_stride, wide_stride, maxima_stride, list_stride, out_stride,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr,
    TILE: tl.constexpr, K_BLOCK: tl.constexpr, LOCAL: tl.constexpr, SKIPPED: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    length = tl.load(lengths + row)
    target = out + row * out_stride
    if (length <= k) & (chunk == 0):  # nothing to choose
        for base in range(0, k, K_BLOCK):
            slot = base + tl.arange(0, K_BLOCK)
            tl.store(target + slot, tl.where(slot < length, slot, -1), mask=slot < k)
        tl.store(counts + row, tl.maximum(length, 0))
    chunks = (length + CHUNK - 1) // CHUNK
    if (chunk >= chunks) | ((length <= k) & SKIPPED):
        return
    offs_f = tl.arange(0, FOLD)
    best = tl.full([FOLD], -2147483648, tl.int32)
    if LOCAL:
        for base in range(0, length, 4 * FOLD):
            for j in tl.static_range(4):
                offs = base + j * FOLD + offs_f
                score = tl.load(scores + row * wide_stride + offs, mask=offs < length, other=float("-inf"))
                best = tl.maximum(best, tl.where(offs < length, _keys(score), -2147483648))
    else:
        groups = (length + SPAN - 1) // SPAN * (SPAN // GROUP)
        for base in range(0, groups, FOLD):
            best = tl.maximum(
                best,
                tl.load(maxima + row * maxima_stride + base + offs_f, mask=base + offs_f < groups, other=-2147483648),
            )
    low, high = _bound(best, k)
    if (high == 2147483647) & (chunk == 0):
        tl.store(bad, 1)
    if length <= k:
        return

    # Keep what lies above the bound and the first k equal to it: two ranks from one scan.
    above, equals = 0, 0
    mine = row * list_stride + chunk * CHUNK
    for base in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), BLOCK):
        offs = base + tl.arange(0, BLOCK)
        every = _keys(tl.load(scores + row * score_stride + offs, mask=offs < length, other=float("-inf")))
        bigger, equal = (every > low) & (offs < length), (every == low) & (offs < length)
        rank, same, num_bigger, num_equal = _ranks(bigger, equal, BLOCK, SOFT)
        spot = above + rank + tl.minimum(equals + same, k)
        tl.store(pairs + mine + spot, _pair(every, offs), mask=bigger | (equal & (equals + same < k)))
        above += num_bigger
        equals += num_equal
    tl.store(found + row * CHUNKS + chunk, above + tl.minimum(equals, k))
    tl.debug_barrier()
    if CHUNKS > 1:
        arrived = tl.atomic_add(arrivals + row, 1, sem="acq_rel")
        if arrived != chunks - 1:
            return
        tl.store(arrivals + row, 0)

    # The last program: the first TILE candidates stay in registers, any others are laid end to end in memory.
    pairs += row * list_stride
    listed += row * list_stride
    slot = tl.arange(0, TILE)
    source, total = _source(slot, found + row * CHUNKS, chunks, CHUNKS, CHUNK)
    pair0 = tl.load(pairs + source, mask=slot < total, other=LEAST, cache_modifier=".cg")
    key0 = _key_of(pair0)
    bigger = (key0 > low).to(tl.int32)
    for base in range(TILE, total, TILE):
        source, _ = _source(base + slot, found + row * CHUNKS, chunks, CHUNKS, CHUNK)
        there = base + slot < total
        pair = tl.load(pairs + source, mask=there, other=LEAST, cache_modifier=".cg")
        tl.store(listed + base + slot, pair, mask=there)
        key = _key_of(pair)
        bigger += (key > low).to(tl.int32)
    tl.debug_barrier()
    high = tl.where(tl.sum(bigger, 0) < k, low, high)  # fewer than k above the bound: the bound is the k-th key
    at_low, above_high, guess = total, 0, 1
    while low < high:  # by turns a guess, which converges fast on smooth scores, and a quartering, which always does
        one, two, three = _thresholds(low, high)
        if guess > 0:
            one, two, three = _guesses(low, high, at_low, above_high, k)
        guess = 1 - guess
        reach = _count(key0, one, two, three)
        for base in range(TILE, total, TILE):
            reach += _count(
                _key_of(tl.load(listed + base + slot, mask=base + slot < total, other=LEAST)), one, two, three
            )
        low, high, at_low, above_high = _narrow(tl.sum(reach, 0), low, high, at_low, above_high, one, two, three, k, k)
    threshold = low
    bigger = (key0 > threshold).to(tl.int32)
    for base in range(TILE, total, TILE):
        bigger += (_key_of(tl.load(listed + base + slot, mask=base + slot < total, other=LEAST)) > threshold).to(
            tl.int32
        )
    ties, done = _write(target, key0, _place_of(pair0), threshold, k - tl.sum(bigger, 0), 0, TILE, SOFT)
    for base in range(TILE, total, TILE):
        pair = tl.load(listed + base + slot, mask=base + slot < total, other=LEAST)
        ties, done = _write(target, _key_of(pair), _place_of(pair), threshold, ties, done, TILE, SOFT)
    tl.store(counts + row, k)


def plan(rows, width, k):
    """(scores per program, scores per group): enough programs to fill a chip, about 2 k group maxima a row."""
    fold = max(1024, 2 * triton.next_power_of_2(k))
    group = max(4, min(32, triton.next_power_of_2(width // fold + 1) // 2))
    if rows >= 64:
        return max(1, triton.cdiv(width, BLOCK)) * BLOCK, group
    chunk = BLOCK
    while rows * triton.cdiv(width, chunk) > 132 and chunk < width:
        chunk *= 2
    return chunk, group


def topk_workspace(rows, width, k, device):
    """Scratch of `topk` for up to `rows` rows of up to `width` scores. `arrivals` is zero, and every launch leaves it zero."""
    chunk, group = plan(rows, width, k)
    chunks = max(1, triton.cdiv(width, chunk))

    def ints(*shape):
        return torch.empty(shape, dtype=torch.int32, device=device)

    return {
        "maxima": ints(rows, chunks * chunk // group), "found": ints(rows, chunks),
        "pairs": torch.empty(rows, chunks * chunk, dtype=torch.int64, device=device),
        "listed": torch.empty(rows, chunks * chunk, dtype=torch.int64, device=device),
        "arrivals": torch.zeros(rows, dtype=torch.int32, device=device), "bad": torch.zeros(1, dtype=torch.int32, device=device),
        "chunk": chunk, "group": group,
    }  # fmt: skip


def select_from_maxima(scores, lengths, k, work, out, counts, span=None, skipped=False, num_warps=None):
    """The second kernel alone: group maxima `work["maxima"]` were written by another, span // group for every span scores.

    span None: a program holds a whole row and finds the maxima itself. skipped: rows no longer than k have no scores.
    """
    rows, width = scores.shape
    chunk, group = work["chunk"], work["group"]
    chunks = max(1, triton.cdiv(width, chunk))
    _select[(rows * chunks,)](
        scores, lengths, work["maxima"], work["found"], work["pairs"], work["listed"],
        work["arrivals"], work["bad"], out, counts, k, scores.stride(0), scores.stride(0), work["maxima"].stride(0), work["pairs"].stride(0), out.stride(0),
        CHUNKS=chunks, CHUNK=chunk, BLOCK=BLOCK, SPAN=span or chunk, GROUP=group, FOLD=max(1024, 2 * triton.next_power_of_2(k)), TILE=TILE,
        K_BLOCK=min(2048, triton.next_power_of_2(k)), LOCAL=span is None, SKIPPED=skipped, SOFT=scores.device.type == "cpu",
        num_warps=num_warps or (32 if chunk > 65536 else 16), enable_fp_fusion=True,
    )  # fmt: skip
    return out, counts


def topk(scores, lengths, k, out=None, counts=None, workspace=None, check=True, num_warps=None):
    """The k largest of scores[r, :lengths[r]] for every row.

    scores fp32 [rows, width] (last dimension contiguous), lengths int32 [rows] <= width, k >= 1.
    Returns indices int32 [rows, k], ascending with a -1 tail, and counts int32 [rows] = min(k, length). Of equal scores
    (-0 equals +0) the lowest index is taken. A NaN below a row's length raises ValueError; that check waits for the device,
    `check=False` leaves it to the caller, who finds it in workspace["bad"].
    """
    if scores.dtype != torch.float32 or scores.dim() != 2 or scores.stride(1) != 1 or k < 1:
        raise ValueError(
            f"topk: scores must be fp32 [rows, width] with k >= 1, got {scores.dtype} {tuple(scores.shape)}, k={k}"
        )
    rows, width = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device) if out is None else out
    counts = torch.empty(rows, dtype=torch.int32, device=scores.device) if counts is None else counts
    if rows == 0:
        return out, counts
    work = workspace or topk_workspace(rows, width, k, scores.device)
    group, chunks = work["group"], max(1, triton.cdiv(width, work["chunk"]))
    if chunks > 1:
        _maxima[(rows * triton.cdiv(width, BLOCK),)](
            scores, lengths, work["maxima"], scores.stride(0), work["maxima"].stride(0),
            CHUNKS=triton.cdiv(width, BLOCK), CHUNK=BLOCK, GROUP=group, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    select_from_maxima(scores, lengths, k, work, out, counts, BLOCK if chunks > 1 else None, False, num_warps)
    if check and int(work["bad"]):
        work["bad"].zero_()
        raise ValueError("topk: a score is NaN; the indexer's input or weights are broken")
    return out, counts
