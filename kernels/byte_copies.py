"""Many tensors copied by one launch, and a checksum in one pass: what a transfer of weights over a fast link would otherwise wait for.

A model has hundreds of tensors. A launch for each of them takes longer than the device copies for, and torch's common launches cut them
into blocks too few to fill it. Here a table of pieces (from, to, how many) goes to the device, and each program copies one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1 << 18  # bytes of a program
WORD = 8
ALIGN = 16  # bytes: what is copied begins and ends at multiples of it
COLUMNS = 512  # 8-byte words of a row of the checksum's matrix
PROGRAMS = 1024  # of a checksum, at most


@triton.jit(do_not_specialize=["pieces"])  # or it is compiled anew for the next bucket
def _copy(table, pieces, BLOCK: tl.constexpr):
    piece = tl.program_id(0)
    source = tl.load(table + piece).to(tl.pointer_type(tl.int64))
    target = tl.load(table + pieces + piece).to(tl.pointer_type(tl.int64))
    words = tl.load(table + 2 * pieces + piece)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)


class Copies:
    """Copies between tensors of the same shapes and dtypes on one GPU, in one launch whenever `run` is called.

    What a launch of whole words cannot do (another dtype or layout, an odd length) is copied by torch, tensor by tensor. The tensors must
    stay where they are; they are held until `release`.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self.rest: list[tuple[Tensor, Tensor]] = []
        self.held: list[tuple[Tensor, Tensor]] = []
        rows: list[tuple[int, int, int]] = []
        for target, source in zip(targets, sources, strict=True):
            row = (source.data_ptr(), target.data_ptr(), target.nbytes)
            if _alike(target, source) and not any(value % ALIGN for value in row):
                rows.append(row)
                self.held.append((target, source))
            else:
                self.rest.append((target, source))
        long = np.array([row for row in rows if row[2]], dtype=np.int64)
        self.table = _pieces(long, targets[0].device) if len(long) else None

    def release(self) -> bool:
        """Holds no tensor any more, if that can be: whoever calls `run` answers for it that all are alive, where they were. False where torch
        copies some of them."""
        if not self.rest:
            self.held.clear()
        return not self.rest

    def run(self) -> None:
        """On the current stream."""
        if self.table is not None:
            pieces = self.table.shape[1]
            _copy[(pieces,)](self.table, pieces, BLOCK=2048, num_warps=4)
        with torch.no_grad():
            for target, source in self.rest:
                target.copy_(source)


def _alike(target: Tensor, source: Tensor) -> bool:
    same = target.dtype == source.dtype and target.shape == source.shape and target.device == source.device
    return same and target.is_contiguous() and source.is_contiguous()


def _pieces(rows: np.ndarray, device: torch.device) -> Tensor:
    """int64 [n, 3] (from, to, bytes) -> int64 [3, pieces] (from, to, words), none longer than PIECE."""
    counts = -(-rows[:, 2] // PIECE)
    owner = np.repeat(np.arange(len(rows)), counts)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * PIECE
    words = np.minimum(PIECE, rows[owner, 2] - offset) // WORD
    return torch.from_numpy(np.stack([rows[owner, 0] + offset, rows[owner, 1] + offset, words])).to(device)


@triton.jit
def _weight(numbers):
    return ((numbers * -0x61C8864680B583EB) ^ (numbers << 17)) | 1


@triton.jit(do_not_specialize=["rows", "per"])
def _sums(words, columns, total, rows, per, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * per
    across, down = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    down_sum = tl.zeros([WIDTH], tl.int64)
    row_sum = tl.zeros([ROWS], tl.int64)
    for start in range(0, per, ROWS):
        row = first + start + down
        inside = (start + down < per) & (row < rows)
        tile = tl.load(words + row[:, None] * WIDTH + across[None, :], mask=inside[:, None], other=0)
        down_sum += tl.sum(tile, 0)
        row_sum += tl.sum(tile, 1) * _weight(row)
    tl.atomic_add(columns + across, down_sum)
    tl.atomic_add(total, tl.sum(row_sum, 0))


def row_and_column_sums(words: Tensor) -> tuple[Tensor, Tensor]:
    """Of int64 words [rows, COLUMNS] on a GPU, modulo 2^64: their sum by columns, int64 [COLUMNS], and the sum of row sums, the one of row r
    times `_weight(r)`, int64 [1]. One read of the words; whole numbers add up the same in any order."""
    rows = words.shape[0]
    out = torch.zeros(COLUMNS + 1, dtype=torch.int64, device=words.device)
    if rows:
        per = triton.cdiv(rows, PROGRAMS)
        _sums[(triton.cdiv(rows, per),)](words, out, out[COLUMNS:], rows, per, WIDTH=COLUMNS, ROWS=8, num_warps=4)
    return out[:COLUMNS], out[COLUMNS:]
