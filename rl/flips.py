"""Why learner and rollout attend to different positions, where they do. How much they overlap is `rollout.records.jaccard`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.selection import Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipReport:
    """How two selections of the same queries differ, measured in the scores of the first."""

    rows: int  # compared
    flipped_rows: int  # with any difference
    flipped_positions: int  # in `own` and not in `recorded`
    max_gap: float  # largest score of a position only in `own` minus the smallest of one only in `recorded`
    explained: float  # share of flipped rows whose gap is within the tolerance: rounding or a tie, not another indexer


def explain_flips(scores: Tensor, own: Selection, recorded: Selection, tolerance: float = 1e-4) -> FlipReport:
    """Whether the rows where two selections differ were close calls.

    scores fp32 [rows, S]: the scores `own` was chosen by. A flip between positions whose scores lie within `tolerance` times the
    row's largest magnitude is what rounding does; a larger gap means that the two sides computed different scores.
    """
    only_own = _scatter(own, scores.shape[1]) & ~_scatter(recorded, scores.shape[1])
    only_recorded = _scatter(recorded, scores.shape[1]) & ~_scatter(own, scores.shape[1])
    flipped = only_own.any(1) | only_recorded.any(1)
    if not flipped.any():
        return FlipReport(rows=len(scores), flipped_rows=0, flipped_positions=0, max_gap=0.0, explained=1.0)
    highest = scores.masked_fill(~only_own, -torch.inf).amax(1)[flipped]
    lowest = scores.masked_fill(~only_recorded, torch.inf).amin(1)[flipped]
    gaps = (highest - lowest).nan_to_num(neginf=torch.inf)  # one set merely lacks positions: never a close call
    seen = _scatter(own, scores.shape[1]) | _scatter(recorded, scores.shape[1])
    size = scores.masked_fill(~seen, 0).abs().amax(1)[flipped].clamp(min=1e-12)
    return FlipReport(
        rows=len(scores),
        flipped_rows=int(flipped.sum()),
        flipped_positions=int(only_own.sum()),
        max_gap=float(gaps.max()),
        explained=float((gaps <= tolerance * size).float().mean()),
    )


def _scatter(selection: Selection, width: int) -> Tensor:
    """The selection as a mask: bool [rows, width]."""
    mask = torch.zeros(len(selection.counts), width + 1, dtype=torch.bool, device=selection.indices.device)
    index = selection.indices.long()
    mask.scatter_(1, torch.where(index < 0, width, index), True)
    return mask[:, :width]
