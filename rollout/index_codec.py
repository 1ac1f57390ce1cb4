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
_CELLS = 1 << 23  # layers x rows x positions of one block: a byte each


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSets:
    """`shape` [layers, rows, k] of `dtype`, row 0 being the query at position `first`. `heads`: zlib of modes uint8 [layers * rows] and list
    lengths uint32 [layers * rows], bytes of like weight together; `unary`, `low`: bits, layer after layer. Or `raw`, zlib of the array."""

    shape: tuple[int, int, int]
    dtype: str
    first: int
    heads: bytes = b""
    unary: bytes = b""
    low: bytes = b""
    raw: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all streams; the few of the shape are not counted."""
        return sum(len(part) for part in (self.raw or b"", self.heads, self.unary, self.low))


def pack_sets(indices: np.ndarray, first: int) -> PackedSets:
    """`indices` unsigned or signed integers [layers, rows, k]: ascending positions, the dtype's maximum as the tail."""
    layers, rows, k = indices.shape
    empty = PackedSets(shape=(layers, rows, k), dtype=indices.dtype.name, first=first)
    if not indices.size or not _plain(indices, first):
        return replace(empty, raw=zlib.compress(np.ascontiguousarray(indices).tobytes(), 1))
    modes = np.zeros((layers, rows), dtype=np.uint8)
    lengths = np.zeros((layers, rows), dtype=np.int64)
    parts: list[list[np.ndarray]] = []  # of each block, of each layer: positions
    carried: np.ndarray | None = None  # the last row of the block before
    for begin, end in _blocks(layers, rows, first):
        bits = _matrix(indices[:, begin:end], first + end)
        listed, modes[:, begin:end], lengths[:, begin:end] = _shortest(bits, _rows(carried, bits))
        sizes = lengths[:, begin:end]
        flat = np.flatnonzero(listed)
        positions = flat - np.repeat(np.arange(sizes.size) * bits.shape[2], sizes.ravel())
        parts.append(np.split(positions, np.cumsum(sizes.sum(1))[:-1]))
        carried = bits[:, -1:]
    positions = np.concatenate([part for layer in zip(*parts, strict=True) for part in layer])
    columns = lengths.astype("<u4").ravel().view(np.uint8).reshape(-1, 4).T
    head = zlib.compress(np.concatenate([modes.ravel(), columns.ravel()]).tobytes(), 6)
    unary, low = _rice(positions, lengths.ravel(), np.tile(first + 1 + np.arange(rows), layers))
    return replace(empty, heads=head, unary=unary, low=low)


def _shortest(bits: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sets uint8 [layers, rows, positions] and the rows before them [layers, 1, positions] -> the shortest list of each row as a set of
    positions, its mode and its length [layers, rows]. Of equals the last mode: a shared layer's rows all get one."""
    by_row = bits ^ np.concatenate([before, bits[:, :-1]], axis=1)
    by_layer = bits[1:] ^ bits[:-1]
    sizes = np.full((3, *bits.shape[:2]), np.iinfo(np.int64).max)
    sizes[OWN], sizes[ROW], sizes[LAYER, 1:] = (x.sum(-1, dtype=np.int64) for x in (bits, by_row, by_layer))
    best = 2 - sizes[::-1].argmin(0)
    own, layer = best == OWN, best[1:] == LAYER
    by_row[own] = bits[own]
    by_row[1:][layer] = by_layer[layer]
    return by_row, best, np.take_along_axis(sizes, best[None], 0)[0]


def unpack_sets(packed: PackedSets, num_rows: int | None = None) -> np.ndarray:
    """The array that was packed, bit for bit; its first `num_rows` rows where a number is given."""
    layers, every, k = packed.shape
    dtype = np.dtype(packed.dtype)
    rows = every if num_rows is None else min(every, num_rows)
    if packed.raw is not None:
        return np.frombuffer(zlib.decompress(packed.raw), dtype=dtype).reshape(packed.shape)[:, :rows].copy()
    head = np.frombuffer(zlib.decompress(packed.heads), dtype=np.uint8).reshape(5, -1)
    modes = head[0].reshape(layers, every)
    lengths: np.ndarray = np.ascontiguousarray(head[1:].T).view("<u4").ravel().astype(np.int64)
    positions = _unrice(packed.unary, packed.low, lengths, np.tile(packed.first + 1 + np.arange(every), layers))
    starts = (np.cumsum(lengths) - lengths).reshape(layers, every)
    lengths = lengths.reshape(layers, every)
    result = np.full((layers, rows, k), np.iinfo(dtype).max, dtype=dtype)
    carried: np.ndarray | None = None
    for begin, end in _blocks(layers, rows, packed.first):
        sizes, width = lengths[:, begin:end], packed.first + end
        totals = sizes.sum(1)
        inside = np.arange(totals.sum()) - np.repeat(np.cumsum(totals) - totals, totals)
        entries = positions[np.repeat(starts[:, begin], totals) + inside]
        bits = np.zeros((layers, end - begin, width), dtype=np.uint8)
        bits.reshape(-1)[np.repeat(np.arange(sizes.size) * width, sizes.ravel()) + entries] = 1
        before = _rows(carried, bits)
        for layer in range(layers):
            mode = modes[layer, begin:end]
            if layer:
                bits[layer] ^= bits[layer - 1] & (mode == LAYER).astype(np.uint8)[:, None]
            bits[layer] = _resolve(bits[layer], mode == ROW, before[layer])
        counts = bits.sum(-1, dtype=np.int64).ravel()
        owner = np.repeat(np.arange(counts.size), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        block = np.full((counts.size, k), np.iinfo(dtype).max, dtype=dtype)
        block[owner, place] = np.flatnonzero(bits) - owner * width
        result[:, begin:end] = block.reshape(layers, -1, k)
        carried = bits[:, -1:]
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


def _blocks(layers: int, rows: int, first: int) -> list[tuple[int, int]]:
    step = max(1, _CELLS // (layers * (first + rows)))
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def _matrix(sets: np.ndarray, width: int) -> np.ndarray:
    """uint8 [layers, rows, width], 1 where a row's set has the position."""
    layers, rows, _ = sets.shape
    bits = np.zeros((layers * rows, width + 1), dtype=np.uint8)
    places = np.minimum(sets.reshape(layers * rows, -1), width).astype(np.int64)
    bits.reshape(-1)[(places + np.arange(layers * rows)[:, None] * (width + 1)).ravel()] = 1
    return bits[:, :width].reshape(layers, rows, width)


def _rows(last: np.ndarray | None, bits: np.ndarray) -> np.ndarray:
    """[layers, 1, positions of bits]: the last rows of an earlier, narrower block, or empty ones."""
    wide = np.zeros((len(bits), 1, bits.shape[2]), dtype=np.uint8)
    if last is not None:
        wide[:, :, : last.shape[2]] = last
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
