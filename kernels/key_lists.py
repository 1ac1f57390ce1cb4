"""Which keys a block of neighbouring queries needs: the union of their sets, ascending, with one membership bit a query and key.

Neighbours select much the same keys, so a tile of (block of queries) x (64 keys of its list) is far fuller than a tile of
(block of queries) x (64 neighbouring keys), and what no query of the block selected is never read. Made in pieces of queries:
the bitmap behind a piece costs (its queries) x L / 8 bytes, its lists 4 bytes and one bit a query per listed key.

How long the lists are is known on the device. Where even the longest possible ones are small (`ROOMY`), each gets the room of the longest
and nobody waits: with a few thousand tokens a step is launches, and every wait for the device leaves it without work afterwards. Longer
lists are laid end to end, which waits once a piece. Contexts of at most `WHOLE` tokens are listed whole: their lists are those of every
layer, a set is only bits of them, and what sorts their keys is done once a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from winnow.kernels.list_kernels import _choose, _fill, _mark, _members, _union
from winnow.kernels.packing import on_host
from winnow.kernels.segments import key_order
from winnow.kernels.selection import Selection

UNIT = 64  # lists are padded to multiples of this, unless asked otherwise
BITMAP_BYTES = 9 << 25  # of one piece: 16K queries at 128K
WHOLE = 512  # tokens of a context whose keys are all listed: the tiles that this adds cost less than the launches that it saves
ROOMY = 3 << 20  # entries that a piece may have room for beyond what its lists need
BARE_ROOMY = 36 << 20  # the same where lists are not kept, 12 bytes an entry


@dataclass(frozen=True)
class Blocks:
    """Blocks of up to `size` neighbouring queries of one sequence, in packed order.

    first, rows, origin int32 [blocks]: first packed row, number of queries, first row of the sequence's keys; shift int32 [blocks]: from a
    query's row to that of its own key, 0 where queries and keys are packed alike; row_origin int32 [T]: a query's row less its position.
    host holds (first, rows, origin, shift) as Python lists; longest: the most keys of a sequence. layouts: where lists lie whose places
    depend on nothing but the blocks, by what they were asked for: every layer asks again.
    """

    size: int
    first: Tensor
    rows: Tensor
    origin: Tensor
    shift: Tensor
    row_origin: Tensor
    host: tuple[list[int], list[int], list[int], list[int]]
    longest: int
    layouts: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.host[0])


@dataclass(frozen=True)
class Lists:
    """Lists of blocks [begin, end) of `blocks`.

    keys int32 [entries]: packed rows of keys, ascending inside a block, -1 elsewhere; offsets int32 [end - begin + 1]: where each block's
    room begins; stops int32 [end - begin]: where its list ends, a multiple of the unit after its beginning; bits int32 [entries / 32,
    size]: bit j of word [e, i] says whether query i of the block selected entry 32 e + j, and means nothing at a stop or past it. bits is
    None where every query takes every listed key up to itself. ends: offsets on the host. shared: what is made of the layout for every layer
    that asks; None where the lists lie end to end, each piece its own way. fixed: keys too depend on nothing but the blocks; a list is
    every position from its sequence's first on. keys is empty then where they were not asked for.
    """

    blocks: Blocks
    begin: int
    end: int
    keys: Tensor
    offsets: Tensor
    stops: Tensor
    bits: Tensor | None
    ends: list[int]
    shared: dict[tuple[Any, ...], Any] | None
    fixed: bool = False

    @property
    def nbytes(self) -> int:
        return (0 if self.fixed else self.keys.nbytes) + (0 if self.bits is None else self.bits.nbytes)

    def owners(self, a: int, b: int, size: int) -> Tensor:
        """Which of blocks [a, b), counted from `begin` and from a, each tile of `size` entries belongs to: int32 [tiles]."""
        key = (a, b, size)
        if self.shared is not None and key in self.shared:
            return self.shared[key]
        tiles = [(y - x) // size for x, y in pairwise(self.ends[a : b + 1])]
        lengths = (self.offsets[a + 1 : b + 1] - self.offsets[a:b]) // size
        with torch.inference_mode(False):
            blocks = torch.arange(b - a, dtype=torch.int32, device=self.keys.device)
            found = blocks.repeat_interleave(lengths, output_size=sum(tiles))
        if self.shared is not None:
            self.shared[key] = found
        return found

    def order(self, begin: int, end: int, rows: int) -> tuple[Tensor, Tensor]:
        """Of entries [begin, end), the `segments.key_order` among `rows` keys."""
        if not self.fixed or self.shared is None:
            return key_order(self.keys[begin:end], rows)
        key = ("order", begin, end, rows)
        if key not in self.shared:
            with torch.inference_mode(False):
                self.shared[key] = key_order(self.keys[begin:end], rows)
        return self.shared[key]

    def slices(self, entries: int) -> Iterator[tuple[int, int]]:
        """Runs of blocks [a, b), counted from `begin`, of at most `entries` entries (or one block)."""
        a = 0
        while a < self.end - self.begin:
            b = a + 1
            while b < self.end - self.begin and self.ends[b + 1] - self.ends[a] <= entries:
                b += 1
            yield a, b
            a = b


def keep_small(kept: list[Lists], lists: Lists, limit: int) -> None:
    """Append a piece while all pieces so far are there and together at most `limit` bytes."""
    whole = (kept[-1].end if kept else 0) == lists.begin
    if whole and sum(x.nbytes for x in kept) + lists.nbytes <= limit:
        kept.append(lists)


def all_kept(kept: list[Lists]) -> list[Lists] | None:
    """The pieces if none is missing."""
    return kept if kept and kept[-1].end == len(kept[-1].blocks) else None


def query_blocks(cu_seqlens: Tensor, size: int, keys: tuple[tuple[int, int], ...] | None = None) -> Blocks:
    """Cut packed sequences into blocks of `size` queries. Waits for cu_seqlens when it is on a GPU and its values are not known.

    keys: of each sequence the first row of its keys and their number, of which its queries are the last; None: packed as the queries.
    """
    return _query_blocks(on_host(cu_seqlens), size, str(cu_seqlens.device), keys)


@lru_cache(maxsize=16)
def _query_blocks(bounds: tuple[int, ...], size: int, device: str, keys: tuple[tuple[int, int], ...] | None) -> Blocks:
    first: list[int] = []
    rows: list[int] = []
    origin: list[int] = []
    shift: list[int] = []
    keys = keys if keys is not None else tuple((a, b - a) for a, b in pairwise(bounds))
    for (a, b), (start, length) in zip(pairwise(bounds), keys, strict=True):
        for row in range(a, b, size):
            first.append(row)
            rows.append(min(size, b - row))
            origin.append(start)
            shift.append(start + length - b)
    lengths = torch.tensor([b - a for a, b in pairwise(bounds)], dtype=torch.int64)
    zero = [b - length for b, (_, length) in zip(bounds[1:], keys, strict=True)]
    row_origin = torch.tensor(zero, dtype=torch.int32).repeat_interleave(lengths)
    with torch.inference_mode(False):
        on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in (first, rows, origin, shift)]
        return Blocks(
            size=size, first=on_device[0], rows=on_device[1], origin=on_device[2], shift=on_device[3], row_origin=row_origin.to(device),
            host=(first, rows, origin, shift), longest=max((length for _, length in keys), default=0),
        )  # fmt: skip


def key_lists(
    blocks: Blocks, selection: Selection | None, begin: int = 0, end: int | None = None, bitmap_bytes: int = BITMAP_BYTES,
    unit: int = UNIT, bare: bool = False,
) -> Iterator[Lists]:  # fmt: skip
    """Lists of blocks [begin, end) in pieces; selection None lists every position up to the block's last query, without bits.

    bare: for who reads a list's keys up to its stop, and once: lists of every position come without their keys, which a reader can count
    for itself, and the others have more room. Waits for the device once a piece, to learn how long the lists are, where they may be longer than `ROOMY` entries.
    """
    end = len(blocks) if end is None else end
    if selection is not None and blocks.longest <= WHOLE and _entries(blocks, begin, end, unit) <= ROOMY:
        yield _whole_piece(blocks, selection, begin, end, unit, bare)
        return
    words = (blocks.longest + 31) // 32
    if words >= 256:
        words += 9  # or a block's rows fall on the same lines of the cache: at 4096 words a third of the speed
    step = max(1, bitmap_bytes // max(1, words * 4 * blocks.size))
    for a in range(begin, end, step):
        b = min(end, a + step)
        yield (
            _dense_piece(blocks, a, b, unit, bare)
            if selection is None
            else _sparse_piece(blocks, selection, a, b, words, unit, bare)
        )


def _kept(blocks: Blocks, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` returns, made once for these blocks."""
    if key not in blocks.layouts:
        with torch.inference_mode(False):  # or a later call could not save them for its backward
            blocks.layouts[key] = make()
    return blocks.layouts[key]


def _seen(blocks: Blocks, a: int, b: int) -> list[int]:
    """How many keys each block's last query sees."""
    host = zip(*(x[a:b] for x in blocks.host), strict=True)
    return [first + rows + shift - origin for first, rows, origin, shift in host]


def _places(counts: Sequence[int], unit: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Where lists of these lengths lie end to end, on the device and on the host."""
    ends = [0, *accumulate(-(-count // unit) * unit for count in counts)]
    return torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True), ends


def _packed(counts: Tensor, unit: int) -> tuple[Tensor, Tensor, list[int]]:
    """(offsets, stops, offsets on the host) of lists end to end: waits for their lengths."""
    padded = (counts + unit - 1) // unit * unit
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(padded, 0, out=offsets[1:])
    ends = offsets.tolist()
    if ends[-1] < 0 or any(x > y for x, y in pairwise(ends)):
        raise ValueError("key lists: more than 2^31 entries in one piece; lower bitmap_bytes")
    return offsets, offsets[1:], ends


def _dense_piece(blocks: Blocks, a: int, b: int, unit: int, bare: bool) -> Lists:
    device = blocks.first.device

    def make() -> Lists:
        offsets, ends = _places(_seen(blocks, a, b), unit, device)
        if bare:
            return Lists(
                blocks, a, b, torch.empty(0, dtype=torch.int32, device=device), offsets, offsets[1:], None, ends, {}
            )
        block = torch.arange(b - a, device=device).repeat_interleave(offsets[1:] - offsets[:-1], output_size=ends[-1])
        keys = torch.arange(ends[-1], dtype=torch.int32, device=device) + (blocks.origin[a:b] - offsets[:-1])[block]
        last = (blocks.first[a:b] + blocks.rows[a:b] + blocks.shift[a:b])[block]
        return Lists(blocks, a, b, keys.masked_fill_(keys >= last, -1), offsets, offsets[1:], None, ends, {})

    small = bare or _entries(blocks, a, b, unit) <= ROOMY
    return _kept(blocks, (a, b, unit, bare), make) if small else make()


def _entries(blocks: Blocks, a: int, b: int, unit: int) -> int:
    """Of lists that hold every position up to each block's last query."""
    entries: int = _kept(
        blocks, ("entries", a, b, unit), lambda: sum(-(-count // unit) * unit for count in _seen(blocks, a, b))
    )
    return entries


def _whole_piece(blocks: Blocks, selection: Selection, a: int, b: int, unit: int, bare: bool) -> Lists:
    every = _dense_piece(blocks, a, b, unit, bare)
    indices, words = selection.indices, -(-blocks.longest // unit) * unit // 32
    bits = torch.empty(every.ends[-1] // 32, blocks.size, dtype=torch.int32, device=indices.device)
    k = indices.shape[1]
    _choose[((b - a) * blocks.size,)](
        indices, blocks.first, blocks.rows, blocks.row_origin, every.offsets, every.stops, bits, a, indices.stride(0),
        K=k, SIZE=blocks.size, BLOCK_K=min(64, triton.next_power_of_2(k)), BLOCK_W=triton.next_power_of_2(max(1, min(16, words))), num_warps=1,
    )  # fmt: skip
    return replace(every, bits=bits, fixed=True)


def _sparse_piece(blocks: Blocks, selection: Selection, a: int, b: int, words: int, unit: int, bare: bool) -> Lists:
    device, indices = blocks.first.device, selection.indices
    first_row = blocks.host[0][a]
    num_rows = blocks.host[0][b - 1] + blocks.host[1][b - 1] - first_row
    bitmap = torch.zeros(num_rows, words, dtype=torch.int32, device=device)
    k = indices.shape[1]
    block_k = min(1024, triton.next_power_of_2(k))
    _mark[(num_rows, triton.cdiv(k, block_k))](
        indices, blocks.row_origin, bitmap, first_row, indices.stride(0), words, K=k, BLOCK=block_k
    )
    union = torch.empty(b - a, words, dtype=torch.int32, device=device)
    counts = torch.empty(b - a, dtype=torch.int32, device=device)
    block_w = min(128, triton.next_power_of_2(words))
    shape = {"SIZE": blocks.size, "BLOCK_W": block_w}
    _union[(b - a,)](bitmap, blocks.first, blocks.rows, union, counts, a, first_row, words, **shape)

    def longest() -> tuple[Tensor, list[int], dict[tuple[int, ...], Tensor]]:
        seen = zip(_seen(blocks, a, b), blocks.host[1][a:b], strict=True)
        return *_places([min(count, rows * k) for count, rows in seen], unit, device), {}

    offsets, ends, shared = _kept(blocks, (a, b, unit, k), longest)
    if ends[-1] <= (BARE_ROOMY if bare else ROOMY):
        stops = offsets[:-1] + (counts + unit - 1) // unit * unit
        keys = torch.empty(ends[-1], dtype=torch.int32, device=device)
        if not bare:
            keys.fill_(-1)
    else:
        (offsets, stops, ends), shared = _packed(counts, unit), None
        keys = torch.empty(ends[-1], dtype=torch.int32, device=device)
    bits = torch.empty(ends[-1] // 32, blocks.size, dtype=torch.int32, device=device)
    _fill[(b - a,)](
        union, blocks.origin, offsets, stops, keys, a, words, BLOCK_W=min(128, block_w), UNIT=unit, num_warps=8
    )
    most, chunk = max(1, *(y - x for x, y in pairwise(ends))), max(unit, 512)
    _members[(b - a, triton.cdiv(most, chunk))](
        bitmap,
        blocks.first,
        blocks.rows,
        blocks.origin,
        offsets,
        stops,
        keys,
        bits,
        a,
        first_row,
        words,
        SIZE=blocks.size,
        CHUNK=chunk,
    )
    return Lists(blocks, a, b, keys, offsets, stops, bits, ends, shared)
