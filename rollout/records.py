"""Index records: what the rollout attended to, compact enough to travel, and back into Selections for the learner's packed batch; and the
experts of its tokens, likewise.

Row i of a record is the query at position `first + i`, with `first == k`: every earlier query sees at most k positions, so its set is
the identity and costs nothing. 16 bits a position while positions stay below 65,535 (the padding value), 32 beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from winnow.kernels.selection import Selection, window_selection
from winnow.rollout.schema import ExpertRecord, IndexRecord

NARROW_LIMIT = int(np.iinfo(np.uint16).max)  # positions below this fit in 16 bits beside the padding value


def compact(indices: Tensor, num_positions: int) -> np.ndarray:
    """int32 [..., k] with a -1 tail -> uint16 or int32 with the dtype's maximum in the tail."""
    array = indices.detach().cpu().numpy()
    if num_positions <= NARROW_LIMIT:
        return array.astype(np.uint16)  # -1 wraps to 65535, the padding value
    return np.where(array < 0, np.iinfo(np.int32).max, array).astype(np.int32)


def encode(selections: Mapping[int, Selection], num_tokens: int) -> IndexRecord:
    """The record of one trajectory of `num_tokens` tokens from the selections of its queries, at least num_tokens - 1 rows a layer."""
    layers = tuple(sorted(selections))
    if not layers:
        raise ValueError("index record: no layer has a selection; only a model with indexers leaves any")
    k = selections[layers[0]].k
    rows = [selections[layer].indices[k : max(k, num_tokens - 1)] for layer in layers]
    return IndexRecord(first=k, k=k, layers=layers, indices=compact(torch.stack(rows), num_tokens))


def _checked(record: IndexRecord, which: int) -> np.ndarray:
    """The record's sets as int32 [layers, rows, k] with a -1 tail; ValueError names trajectory, layer and row of a bad set."""
    indices = record.indices
    padding = np.iinfo(indices.dtype).max
    wide = np.where(indices == padding, -1, indices.astype(np.int64)).astype(np.int32)
    positions = record.first + np.arange(wide.shape[1], dtype=np.int32)
    present = wide >= 0
    late = (wide > positions[None, :, None]).any(-1)
    gap = (present[..., 1:] & ~present[..., :-1]).any(-1)
    falling = (present[..., 1:] & present[..., :-1] & (wide[..., 1:] <= wide[..., :-1])).any(-1)
    empty = ~present.any(-1)
    for bad, why in (
        (late, "names a position after its own query"),
        (gap, "has padding before its end"),
        (falling, "is not ascending"),
        (empty, "is empty"),
    ):
        if bad.any():
            layer, row = np.argwhere(bad)[0]
            raise ValueError(
                f"index record of sequence {which}: the set of layer {record.layers[layer]}, position {record.first + row} {why}; "
                "the record does not belong to these tokens"
            )
    return wide


def decode(
    records: Sequence[IndexRecord | None], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> dict[int, Selection]:
    """Selections per layer for a packed batch: sequence i brings `lengths[i]` queries, from its position 0.

    Rows before `first`, all rows of a sequence without a record (None: it is no longer than k), and the last token's row, which the
    rollout never queried, get the last k positions (the identity while t < k). Raises ValueError when records disagree about k or
    layers, have a wrong number of rows, or hold a set that their positions cannot have.
    """
    if len(records) != len(lengths):
        raise ValueError(f"index records: {len(records)} records for {len(lengths)} sequences")
    given = [record for record in records if record is not None]
    if not given:
        raise ValueError(
            "index records: no sequence of this batch has one; set rollout to record index sets, or selection to own"
        )
    k, layers = given[0].k, given[0].layers
    positions = torch.cat([torch.arange(length) for length in lengths])
    base = window_selection(positions, k)
    indices = base.indices[None].repeat(len(layers), 1, 1).numpy()  # [layers, tokens, k]
    counts = base.counts[None].repeat(len(layers), 1).numpy()
    start = 0
    for which, (record, length) in enumerate(zip(records, lengths, strict=True)):
        rows = max(0, length - 1 - k)
        if record is None:
            if rows:
                raise ValueError(
                    f"index records: sequence {which} has {length} tokens, more than k = {k}, but no record"
                )
        elif (record.k, record.layers, record.first) != (k, layers, k):
            raise ValueError(
                f"index records: sequence {which} has k {record.k} from position {record.first}, layers {record.layers}; "
                f"the first of this batch has k {k}, layers {layers}: they come from different models"
            )
        elif record.num_rows != rows:
            raise ValueError(f"index records: sequence {which} has {record.num_rows} rows, {length} tokens need {rows}")
        elif rows:
            wide = _checked(record, which)
            indices[:, start + k : start + k + rows] = wide
            counts[:, start + k : start + k + rows] = (wide >= 0).sum(-1)
        start += length
    stacked, counted = torch.from_numpy(indices).to(device), torch.from_numpy(counts).to(device)
    return {layer: Selection(stacked[i], counted[i]) for i, layer in enumerate(layers)}


def compact_experts(
    chosen: Mapping[int, Tensor], layers: Sequence[int], num_experts: int, num_tokens: int
) -> np.ndarray:
    """int64 [tokens, k] per layer -> uint8 [layers, num_tokens, k], or uint16 with more than 256 experts."""
    assert tuple(sorted(chosen)) == tuple(layers), f"experts of layers {sorted(chosen)} were recorded, want {layers}"
    stacked = torch.stack([chosen[layer][:num_tokens] for layer in layers])
    if num_experts <= 256:
        return stacked.to(torch.uint8).cpu().numpy()
    return stacked.to(torch.int16).cpu().numpy().view(np.uint16)


def decode_experts(
    records: Sequence[ExpertRecord | None], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> dict[int, Tensor]:
    """Experts per layer, int64 [tokens, k], for a packed batch: sequence i brings `lengths[i]` inputs, from its position 0.

    Raises ValueError when a record is missing, disagrees with the first about layers or k, or has a wrong number of rows.
    """
    first = records[0]
    parts = []
    for which, (record, length) in enumerate(zip(records, lengths, strict=True)):
        if record is None or first is None:
            raise ValueError(f"expert records: sequence {which if record is None else 0} has none")
        if (record.layers, record.k) != (first.layers, first.k):
            raise ValueError(
                f"expert records: sequence {which} has {record.k} experts of layers {record.layers}; the first of this batch has {first.k} of "
                f"layers {first.layers}: they come from different models"
            )
        if record.num_rows != length:
            raise ValueError(f"expert records: sequence {which} has {record.num_rows} rows for {length} inputs")
        parts.append(record.experts)
    assert first is not None
    stacked = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int64)).to(device)
    return dict(zip(first.layers, stacked, strict=True))


def experts_differ(own: Mapping[int, Tensor], recorded: Mapping[int, Tensor]) -> tuple[int, int, int, int]:
    """Tokens with other experts in any layer, tokens; (token, layer) pairs with other experts, pairs. Both ascending [tokens, k]."""
    different = torch.stack([(own[layer] != recorded[layer]).any(-1) for layer in sorted(recorded)])  # [layers, tokens]
    return int(different.any(0).sum()), different.shape[1], int(different.sum()), different.numel()


def jaccard(a: Selection, b: Selection) -> Tensor:
    """|A ∩ B| / |A ∪ B| of each row, fp32 [tokens]; two empty sets agree. Rows may have different k."""
    far = torch.iinfo(torch.int32).max
    left = a.indices.masked_fill(a.indices < 0, far).contiguous()
    right = b.indices.masked_fill(b.indices < 0, far).contiguous()
    place = torch.searchsorted(right, left).clamp_(max=right.shape[1] - 1)
    common = ((right.gather(1, place) == left) & (left < far)).sum(1)
    union = a.counts + b.counts - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)
