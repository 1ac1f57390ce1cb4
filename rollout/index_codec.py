"""Sets of positions as bits: what an index record looks like while it travels and waits.

    sets [layers, rows, k] -> each row's list, or its difference to the row before or to the layer before -> gaps -> Rice code -> bytes

A row is stored as the shortest of three sorted lists: its own positions, the symmetric difference with the set of the query before it in
the same layer (neighbours choose alike), or with the set that the layer before chose for the same query (empty where layers share an
indexer). The gaps between a list's entries are Rice-coded (R. F. Rice, JPL 79-22): g >> b in unary, then b bits. b follows from the
list's length and the row's number of positions, so it is not stored; b = 0 is a bitmap of the positions, so dense rows need no code of
their own. Unary parts and low bits lie in streams of their own, which lets both directions run on whole arrays: no row is a Python loop.

A record that this code cannot express (a set not ascending, padding inside it: a mistake that `records.decode` names) is kept as it is. Rows are worked on in blocks, so that the bit matrices stay small whatever the context's length.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

OWN, ROW, LAYER = 0, 1, 2  # what a row's list is a difference to: nothing, the row before, the layer before
_CELLS = 1 << 23  # rows x positions of one block: a byte each


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSets:
    """`shape` [layers, rows, k] of `dtype`, row 0 being the query at position `first`. `heads` per layer: zlib of modes uint8 [rows] and
    list lengths uint32 [rows], bytes of like weight together; `unary`, `low`: bits per layer. Or `raw`, zlib of the array itself."""

    shape: tuple[int, int, int]
    dtype: str
    first: int
    heads: tuple[bytes, ...] = ()
    unary: tuple[bytes, ...] = ()
    low: tuple[bytes, ...] = ()
    raw: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all streams; the few of the shape are not counted."""
        return len(self.raw or b"") + sum(len(part) for parts in (self.heads, self.unary, self.low) for part in parts)


def pack_sets(indices: np.ndarray, first: int) -> PackedSets:
    """`indices` unsigned or signed integers [layers, rows, k]: ascending positions, the dtype's maximum as the tail."""
    layers, rows, k = indices.shape
    empty = PackedSets(shape=(layers, rows, k), dtype=indices.dtype.name, first=first)
    if not indices.size or not _plain(indices, first):
        return replace(empty, raw=zlib.compress(np.ascontiguousarray(indices).tobytes(), 1))
    modes = np.zeros((layers, rows), dtype=np.uint8)
    lists: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(layers)]  # per block: (lengths, positions)
    carried: list[np.ndarray | None] = [None] * layers  # the last row of the block before
    for begin, end in _blocks(rows, first):
        above: np.ndarray | None = None
        for layer in range(layers):
            bits = _matrix(indices[layer, begin:end], first + end)
            before = np.concatenate([_row(carried[layer], bits.shape[1]), bits[:-1]])
            choices = [bits, bits ^ before] + ([bits ^ above] if above is not None else [])
            sizes = np.stack([choice.sum(1, dtype=np.int64) for choice in choices])
            best = (
                len(choices) - 1 - sizes[::-1].argmin(0)
            )  # the last of equals: a shared layer's rows all get one mode
            chosen = np.where((best == OWN)[:, None], bits, choices[ROW])
            if above is not None:
                chosen = np.where((best == LAYER)[:, None], choices[LAYER], chosen)
            modes[layer, begin:end] = best
            lists[layer].append((sizes[best, np.arange(end - begin)], np.nonzero(chosen)[1]))
            carried[layer], above = bits[-1:], bits
    heads, unary, low = [], [], []
    seen = first + 1 + np.arange(rows)
    for layer in range(layers):
        lengths = np.concatenate([part for part, _ in lists[layer]])
        positions = np.concatenate([part for _, part in lists[layer]])
        head = np.concatenate([modes[layer], lengths.astype("<u4").view(np.uint8).reshape(-1, 4).T.ravel()])
        heads.append(zlib.compress(head.tobytes(), 6))
        ones, rest = _rice(positions, lengths, seen)
        unary.append(ones)
        low.append(rest)
    return replace(empty, heads=tuple(heads), unary=tuple(unary), low=tuple(low))


def unpack_sets(packed: PackedSets, num_rows: int | None = None) -> np.ndarray:
    """The array that was packed, bit for bit; its first `num_rows` rows where a number is given."""
    layers, rows, k = packed.shape
    dtype = np.dtype(packed.dtype)
    rows = rows if num_rows is None else min(rows, num_rows)
    if packed.raw is not None:
        return np.frombuffer(zlib.decompress(packed.raw), dtype=dtype).reshape(packed.shape)[:, :rows].copy()
    result = np.full((layers, rows, k), np.iinfo(dtype).max, dtype=dtype)
    seen = packed.first + 1 + np.arange(packed.shape[1])
    modes, starts, positions = [], [], []
    for layer in range(layers):
        head = np.frombuffer(zlib.decompress(packed.heads[layer]), dtype=np.uint8).reshape(5, -1)
        lengths = np.ascontiguousarray(head[1:].T).view("<u4").ravel().astype(np.int64)
        modes.append(head[0])
        starts.append(np.concatenate([[0], np.cumsum(lengths)]))
        positions.append(_unrice(packed.unary[layer], packed.low[layer], lengths, seen))
    carried: list[np.ndarray | None] = [None] * layers
    for begin, end in _blocks(rows, packed.first):
        width, above = packed.first + end, None
        for layer in range(layers):
            begins = starts[layer][begin : end + 1]
            bits = np.zeros((end - begin, width), dtype=np.uint8)
            bits[np.repeat(np.arange(end - begin), np.diff(begins)), positions[layer][begins[0] : begins[-1]]] = 1
            mode = modes[layer][begin:end]
            if above is not None:
                bits ^= above & (mode == LAYER).astype(np.uint8)[:, None]
            bits = _resolve(bits, mode == ROW, _row(carried[layer], width))
            row, position = np.nonzero(bits)
            counts = np.bincount(row, minlength=end - begin)
            place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            result[layer, begin + row, place] = position
            carried[layer], above = bits[-1:], bits
    return result


def pack_experts(experts: np.ndarray) -> bytes:
    """Unsigned integers [layers, rows, k], each row ascending, as the Huffman code of the gaps in a row. Chosen at random that is about
    6.4 bits for one of 256 experts, eight at a time; the least that is possible is 6.06. Neighbouring tokens share too few to gain more.
    """
    gaps = np.diff(experts, axis=-1, prepend=experts.dtype.type(0))
    coder = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(np.ascontiguousarray(gaps).tobytes()) + coder.flush()


def unpack_experts(packed: bytes, dtype: np.dtype | str, shape: tuple[int, int, int]) -> np.ndarray:
    """What `pack_experts` was given, bit for bit."""
    gaps = np.frombuffer(zlib.decompress(packed), dtype=dtype)
    if gaps.size != np.prod(shape):
        raise ValueError(
            f"expert record: {gaps.size} entries arrived, its rows name {np.prod(shape)}: it was damaged on the way"
        )
    return np.cumsum(gaps.reshape(shape), axis=-1, dtype=dtype)


def _resolve(bits: np.ndarray, chained: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Rows uint8 [rows, positions] where a chained one is a difference to the row above it (row 0: to `before`): the sets themselves.

    With P the running XOR of all rows, row t is P[t] ^ P[a - 1], a being the last row up to t that stands alone.
    """
    running = np.bitwise_xor.accumulate(np.concatenate([before, bits]), axis=0)
    alone = np.maximum.accumulate(np.where(chained, -1, np.arange(len(bits))))
    fixed = running[1:]
    behind = np.where(alone[:, None] > 0, running[np.maximum(alone, 0)], before * (alone == 0)[:, None])
    return fixed ^ behind


def _plain(indices: np.ndarray, first: int) -> bool:
    """Whether every row is ascending, its padding at the end, and no position after its query."""
    padding = np.iinfo(indices.dtype).max
    left, right = indices[..., :-1], indices[..., 1:]
    last = first + np.arange(indices.shape[1])[None, :, None]
    fine = bool(((left < right) | (right == padding)).all()) and bool(((indices <= last) | (indices == padding)).all())
    return fine and bool((indices >= 0).all())


def _blocks(rows: int, first: int) -> list[tuple[int, int]]:
    step = max(1, _CELLS // (first + rows))
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def _matrix(sets: np.ndarray, width: int) -> np.ndarray:
    """uint8 [rows, width], 1 where the row's set has the position."""
    bits = np.zeros((len(sets), width + 1), dtype=np.uint8)
    np.put_along_axis(bits, np.minimum(sets, width).astype(np.int64), 1, axis=1)
    return bits[:, :width]


def _row(last: np.ndarray | None, width: int) -> np.ndarray:
    """[1, width]: a row of an earlier, narrower block, or an empty one."""
    wide = np.zeros((1, width), dtype=np.uint8)
    if last is not None:
        wide[:, : last.shape[1]] = last
    return wide


def _widths(lengths: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """b for each row: about log2(ln 2 * mean gap), the best for gaps that are geometric."""
    mean = np.maximum(seen * 0.69 / np.maximum(lengths, 1), 1.0)
    return np.floor(np.log2(mean)).astype(np.int64)


def _rice(positions: np.ndarray, lengths: np.ndarray, seen: np.ndarray) -> tuple[bytes, bytes]:
    width = np.repeat(_widths(lengths, seen), lengths)
    gaps = np.diff(positions, prepend=-1) - 1
    begins = (np.cumsum(lengths) - lengths)[lengths > 0]
    gaps[begins] = positions[begins]  # a row's first gap counts from position 0
    unary = np.zeros(int((gaps >> width).sum()) + len(gaps), dtype=np.uint8)
    unary[np.cumsum((gaps >> width) + 1) - 1] = 1
    ends = np.cumsum(width)
    low = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for bit in range(int(width.max()) if len(width) else 0):
        has = width > bit
        low[ends[has] - 1 - bit] = (gaps[has] >> bit) & 1
    return np.packbits(unary).tobytes(), np.packbits(low).tobytes()


def _unrice(unary: bytes, low: bytes, lengths: np.ndarray, seen: np.ndarray) -> np.ndarray:
    width = np.repeat(_widths(lengths, seen), lengths)
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(unary, dtype=np.uint8)))
    bits = np.unpackbits(np.frombuffer(low, dtype=np.uint8)).astype(np.int64)
    if len(ones) != len(width) or len(bits) < width.sum():
        raise ValueError(
            f"index record: {len(ones)} entries arrived, its rows name {len(width)}: it was damaged on the way"
        )
    gaps = (np.diff(ones, prepend=-1) - 1) << width
    ends = np.cumsum(width)
    for bit in range(int(width.max()) if len(width) else 0):
        has = width > bit
        gaps[has] |= bits[ends[has] - 1 - bit] << bit
    total = np.cumsum(gaps + 1)
    begins = np.cumsum(lengths) - lengths
    base = np.concatenate([[0], total])[begins]  # what earlier rows add up to
    return total - np.repeat(base, lengths) - 1
