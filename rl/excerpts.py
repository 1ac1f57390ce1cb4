"""What the index did, small enough to be kept: means over trajectories, and for single ones the positions that some tokens chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from winnow.rollout.schema import Trajectory


def attention_stats(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How sparse attention was over every query of the trajectories that carry an index record; empty where none does.

    `mean_selected` and `mean_available` positions per query, `sparse_rows`: the share of queries that see more than k positions.
    """
    selected = available = rows = sparse = 0.0
    for trajectory in trajectories:
        record, queries = trajectory.index_record, len(trajectory.tokens) - 1
        if record is None or queries < 1:
            continue
        seen = np.arange(1, queries + 1)  # the query at position t sees t + 1
        sets = record.indices
        chosen = (sets != np.iinfo(sets.dtype).max).sum() / max(1, len(record.layers))
        rows += queries
        available += float(seen.sum())
        selected += float(seen[: record.first].sum() + chosen)  # before `first` every query takes all it sees
        sparse += float((seen > record.k).sum())
    if not rows:
        return {}
    return {"mean_selected": selected / rows, "mean_available": available / rows, "sparse_rows": sparse / rows}


def index_excerpt(trajectory: Trajectory, tokenizer: Any = None, num_queries: int = 4) -> dict[str, Any] | None:
    """The positions chosen by the queries that drew the first generated tokens, in every layer; None where all of them see all.

    {"length", "k", "tokens": texts of all positions, or [], "queries": [{"position", "layers": {layer: [positions]}}]}
    """
    record = trajectory.index_record
    if record is None or not record.num_rows:
        return None
    drawn = np.flatnonzero(trajectory.loss_mask) - 1  # the query before a token drew it
    queries = [int(t) for t in drawn if t >= record.first][:num_queries]
    if not queries:
        return None
    sets = record.indices
    padding = np.iinfo(sets.dtype).max
    chosen = []
    for position in queries:
        rows = sets[:, position - record.first]  # [layers, k]
        layers = {
            str(layer): [int(s) for s in row if s != padding] for layer, row in zip(record.layers, rows, strict=True)
        }
        chosen.append({"position": position, "layers": layers})
    texts = [tokenizer.decode([int(token)]) for token in trajectory.tokens] if tokenizer is not None else []
    return {"length": len(trajectory.tokens), "k": record.k, "tokens": texts, "queries": chosen}
