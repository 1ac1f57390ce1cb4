"""Which positions a query attends to: the type, and the exact top-k that makes it.

The rules, everywhere and on every device: the set is the k largest scores among the first `length` positions, the lowest position wins
a tie, -0 counts as +0, NaN raises. The same row gives the same set whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# random, recent: floors, what a set chosen without looking is worth. random_ties: the indexer with a top-k that is not deterministic
SELECTORS = ("indexer", "random", "recent", "random_ties")


@dataclass(frozen=True)
class Selection:
    """indices int32 [tokens, k]: logical positions in the query's own sequence, ascending, -1 tail; counts int32 [tokens]."""

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.counts.shape != self.indices.shape[:1]:
            raise ValueError(
                f"selection: indices {tuple(self.indices.shape)} and counts {tuple(self.counts.shape)} do not fit"
            )

    @property
    def k(self) -> int:
        return self.indices.shape[1]


def window_selection(positions: Tensor, k: int) -> Selection:
    """The last k positions of each query: the identity where position < k. positions int [tokens]."""
    counts = positions.clamp(max=k - 1) + 1  # [tokens]
    offsets = torch.arange(k, device=positions.device)
    indices = (positions - counts + 1)[:, None] + offsets
    indices = indices.masked_fill(offsets >= counts[:, None], -1)
    return Selection(indices.to(torch.int32), counts.to(torch.int32))


def hash_scores(positions: Tensor, num_keys: int) -> Tensor:
    """Scores of the "random" floor: fp32 [tokens, num_keys] in [0, 1), a fixed hash of (query position, key position)."""
    keys = torch.arange(num_keys, device=positions.device, dtype=torch.int64)
    x = positions.to(torch.int64)[:, None] * 2654435761 + keys * 40503 + 97
    for multiplier, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):  # xorshift-multiply rounds, kept inside 32 bits
        x = ((x ^ (x >> shift)) * multiplier) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) & 0xFFFFFF).to(torch.float32) / float(1 << 24)


def with_random_ties(scores: Tensor) -> Tensor:
    """Scores whose order is that of fp32 `scores` in bfloat16, equal ones in random order: every call breaks ties, and near-ties, another way.

    What a top-k in library order does to scores in 16 bits (ReLU makes many exact zeros): the cause of the collapse in GLM-5's report
    (arXiv 2602.15763). float64: integers in the order of the rounded numbers, the 16 bits that rounding freed drawn from torch's default
    generator, so that rollout and learner draw independently; NaN and infinities stay what they are.
    """
    rounded = scores.to(torch.bfloat16).float() + 0.0  # -0 and +0 are one plateau
    bits = rounded.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    noise = torch.randint(0, 1 << 16, ordered.shape, dtype=torch.int32, device=scores.device)
    drawn = (ordered & ~0xFFFF) | noise
    return torch.where(torch.isfinite(rounded), drawn.double(), rounded.double())


def exact_topk(scores: Tensor, lengths: Tensor, k: int) -> Selection:
    """The k largest scores of each row among its first `lengths[row]` positions.

    scores fp32 [rows, S]; lengths int [rows], at most S. Positions at or past a row's length may hold anything, NaN too. Raises
    ValueError when k < 1 or when a score inside a row's length is NaN. Memory: a few times the scores.
    """
    if k < 1:
        raise ValueError(f"top-k of {k}: a query must keep at least one position; set top_k >= 1")
    rows, width = scores.shape
    if rows == 0:
        return Selection(scores.new_empty((0, k), dtype=torch.int32), scores.new_empty(0, dtype=torch.int32))
    inside = torch.arange(width, device=scores.device) < lengths[:, None]  # [rows, S]
    scores = scores.detach().masked_fill(~inside, -torch.inf)
    if torch.isnan(scores).any():
        row, column = torch.isnan(scores).nonzero()[0].tolist()
        raise ValueError(
            f"top-k: the score of row {row}, position {column} is NaN; the indexer's inputs or weights are not finite"
        )
    if width <= k:
        keep = inside
    else:
        threshold = scores.topk(k, dim=1, sorted=True).values[
            :, -1:
        ]  # the k-th largest; comparisons below treat -0 as +0
        keep = (scores >= threshold) & inside
        crowded = (keep.sum(1) > k).nonzero()[:, 0]
        if len(crowded):  # more ties at the threshold than places: the lowest positions win
            tie = (scores[crowded] == threshold[crowded]) & inside[crowded]
            above = keep[crowded] & ~tie
            places = k - above.sum(1, keepdim=True)
            keep[crowded] = above | (tie & (tie.cumsum(1) <= places))
    return from_mask(keep, k)


def from_mask(keep: Tensor, k: int) -> Selection:
    """The Selection of a bool mask [rows, S] with at most k True entries in each row."""
    counts = keep.sum(1)
    row, column = keep.nonzero(as_tuple=True)  # row-major: ascending positions inside a row
    first = counts.cumsum(0) - counts
    place = torch.arange(len(row), device=keep.device) - first[row]
    indices = torch.full((keep.shape[0], k), -1, dtype=torch.int32, device=keep.device)
    indices[row, place] = column.to(torch.int32)
    return Selection(indices, counts.to(torch.int32))
