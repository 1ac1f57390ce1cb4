"""IndexShare: which layers get an indexer, every n-th or those whose sets serve their neighbours best (IndexCache, arXiv 2603.12201).

Measured on dense attention, before any indexer is trained: R[i, j] is the share of layer j's attention mass that lies on layer i's own
best top-k. Layers fall into runs, each served by its first layer; a dynamic programme finds the runs that keep most mass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.packing import batches
from winnow.kernels.selection import Selection, exact_topk, window_selection
from winnow.kernels.torch_indexer import attention_target
from winnow.models.context import IndexerLoss, LayerInputs, train_context
from winnow.models.forward import hidden_states
from winnow.rl.convert_data import pack

ROWS = 128  # queries whose target is formed at once
REACH = 8  # layers that one indexer may serve


def every_nth(num_layers: int, n: int) -> tuple[int, ...]:
    """Leaders 0, n, 2n ...; none named when every layer leads."""
    return tuple(range(0, num_layers, n)) if n > 1 else ()


@dataclass
class OverlapMeter(IndexerLoss):
    """Observes a dense forward of a converted model; `mass[i, j]`: attention mass of layer j on layer i's best sets, i <= j, summed."""

    top_k: int = 1
    mass: dict[tuple[int, int], float] = field(default_factory=dict)
    sets: dict[int, Selection] = field(default_factory=dict)

    @torch.no_grad()
    def observe(self, inputs: LayerInputs, projected: tuple[Tensor, Tensor, Tensor] | None) -> None:
        x = inputs
        bounds = x.cu_seqlens.tolist()
        positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)]).to(x.q.device)
        counted = positions >= self.top_k
        if not bool(counted.any()):
            return
        self.sets[x.layer] = best_sets(x, positions, self.top_k)
        self.sets.pop(x.layer - REACH, None)
        for earlier, chosen in self.sets.items():
            lse = ops.sparse_attention(x.q, x.k, x.k, x.cu_seqlens, chosen, x.scale)[1]
            share = float((lse - x.lse).exp().mean(1)[counted].sum())
            self.mass[earlier, x.layer] = self.mass.get((earlier, x.layer), 0.0) + share


def best_sets(x: LayerInputs, positions: Tensor, top_k: int) -> Selection:
    """The top-k of what the indexer is to learn, the attention summed over heads for one: what a perfect indexer would choose."""
    selection = window_selection(positions, top_k)
    for batch in batches(x.cu_seqlens):
        q, k, lse = (batch.pad(t) for t in (x.q, x.k, x.lse))
        cost = x.cost and x.cost.padded(batch)
        for a in range(0, q.shape[1], ROWS):
            b = min(a + ROWS, q.shape[1])
            keys = batch.keys_until(b)
            where = batch.positions[:, a:b]
            keep = torch.arange(keys, device=where.device) <= where[..., None]
            target = attention_target(
                q[:, a:b], k[:, :keys], lse[:, a:b], keep, x.scale, cost and cost.tile(a, b, keys)
            )
            chosen = exact_topk(target.reshape(-1, keys), where.reshape(-1) + 1, top_k)
            rows, valid = batch.rows[:, a:b].reshape(-1), batch.valid[:, a:b].reshape(-1)
            selection.indices[rows[valid]] = chosen.indices[valid]
            selection.counts[rows[valid]] = chosen.counts[valid]
    return selection


def measure_overlap(model: Any, sequences: Sequence[Sequence[int]], top_k: int) -> dict[tuple[int, int], float]:
    """R of the module's docstring, for i <= j < i + REACH; empty where no sequence is longer than top_k. The model has indexers."""
    meter = OverlapMeter(top_k=top_k)
    device = next(model.parameters()).device
    rows = sum(max(0, len(s) - top_k) for s in sequences)
    for sequence in sequences:
        batch = pack([sequence])
        ctx = train_context(batch.lengths, device, selector="dense", indexer_loss=meter)
        with torch.no_grad():
            hidden_states(model, batch.tokens.to(device), ctx)
        meter.sets.clear()
    return {pair: total / max(1, rows) for pair, total in meter.mass.items()}


def choose_leaders(overlap: dict[tuple[int, int], float], num_layers: int, budget: int) -> tuple[int, ...]:
    """At most `budget` leaders, layer 0 among them, whose runs keep the most mass; no run is longer than REACH."""
    budget = max(budget, -(-num_layers // REACH))
    gain = {
        (i, j): sum(overlap.get((i, layer), 0.0) for layer in range(i, j)) for i in range(num_layers)
        for j in range(i + 1, min(num_layers, i + REACH) + 1)
    }  # fmt: skip
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
        (0, 0): (0.0, ())
    }  # (layers covered, leaders) -> mass, leaders
    for end in range(1, num_layers + 1):
        for used in range(1, budget + 1):
            options = [
                (best[start, used - 1][0] + gain[start, end], (*best[start, used - 1][1], start))
                for start in range(max(0, end - REACH), end)
                if (start, used - 1) in best
            ]
            if options:
                best[end, used] = max(options, key=lambda option: (option[0], option[1]))
    return max(
        (best[num_layers, used] for used in range(1, budget + 1) if (num_layers, used) in best), key=lambda o: o[0]
    )[1]
