"""What a conversion kept: perplexity by position, the share of attention mass that the chosen sets hold, needles, cost.

"random" and "recent" are floors: what a set of the same size is worth when nobody looked at the keys. Cost and needles live in files of
their own; `retention_report` puts everything together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.kernels.selection import Selection
from winnow.models.attach import indexer_config
from winnow.models.context import ForwardContext, IndexerLoss, LayerInputs, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.convert_data import Packed, pack

RECALL_SELECTORS = ("indexer", "random", "recent")
SELECTORS = {
    "dense": "dense",
    "sparse": "indexer",
    "random": "random",
    "recent": "recent",
}  # name in the report -> selector
WORST_LAYERS = 3


@dataclass
class RecallMeter(IndexerLoss):
    """Observes a dense forward: recall of S_t = mean over heads of exp(lse over S_t - lse over all), for queries at t >= top_k."""

    selectors: Sequence[str] = RECALL_SELECTORS
    floors: dict[tuple[str, int], Selection] = field(default_factory=dict)  # of the batch that is passing
    sums: dict[tuple[str, int], float] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)

    @torch.no_grad()
    def observe(self, inputs: LayerInputs, projected: tuple[Tensor, Tensor, Tensor] | None) -> None:
        x = inputs
        bounds = x.cu_seqlens.tolist()
        positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)]).to(x.q.device)
        top_k = x.indexer.config.top_k
        counted = positions >= top_k
        if not bool(counted.any()):
            return
        q, k, w = projected if projected is not None else x.indexer(*x.inputs)
        for selector in self.selectors:
            chosen = self.chosen(selector, (q, k, w), x, positions, top_k)
            lse = ops.sparse_attention(x.q, x.k, x.k, x.cu_seqlens, chosen, x.scale)[1]
            recall = (lse - x.lse).exp().mean(1)[counted]
            key = (selector, x.layer)
            self.sums[key] = self.sums.get(key, 0.0) + float(recall.sum())
            self.counts[key] = self.counts.get(key, 0) + int(counted.sum())

    def chosen(
        self, selector: str, projected: tuple[Tensor, Tensor, Tensor], x: LayerInputs, positions: Tensor, top_k: int
    ) -> Selection:
        """Floors look at positions only: made once a batch, at its first layer."""
        if selector == "indexer":
            return ops.select_packed(*projected, x.cu_seqlens, positions, top_k, selector)
        if x.layer == 0:
            self.floors.pop((selector, top_k), None)
        if (selector, top_k) not in self.floors:
            self.floors[selector, top_k] = floor_selection(x.cu_seqlens, positions, top_k, selector)
        return self.floors[selector, top_k]

    def by_layer(self, selector: str) -> list[float]:
        layers = sorted(layer for name, layer in self.sums if name == selector)
        return [self.sums[selector, layer] / self.counts[selector, layer] for layer in layers]


def floor_selection(cu_seqlens: Tensor, positions: Tensor, top_k: int, selector: str) -> Selection:
    return ops.select_packed(None, None, None, cu_seqlens, positions, top_k, selector)


def reading_context(model: Any, lengths: list[int], selector: str, **options: Any) -> ForwardContext:
    """A train context that attends as `selector` says. A floor's sets look at positions only: made once, given to every layer."""
    device = lm_head_weight(model).device
    shape = indexer_config(model)
    ctx = train_context(lengths, device, selector=selector, **options)
    if selector not in ("random", "recent") or shape is None or ctx.max_seq_len <= shape.top_k:
        return ctx
    sets = floor_selection(ctx.cu_seqlens, ctx.positions, shape.top_k, selector)
    layers = range(model.config.num_hidden_layers)
    return train_context(lengths, device, selector=selector, selection_in=dict.fromkeys(layers, sets), **options)


def batched(sequences: Sequence[Sequence[int]], tokens: int) -> list[Packed]:
    parts: list[list[Sequence[int]]] = [[]]
    for sequence in sequences:
        if parts[-1] and sum(map(len, parts[-1])) + len(sequence) > tokens:
            parts.append([])
        parts[-1].append(sequence)
    return [pack(part) for part in parts if part]


def token_losses(model: Any, batch: Packed, **context: Any) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood fp32 [N] of the next tokens of a packed batch, with gradient where enabled, and the positions int64 [N]
    that they were predicted at."""
    weight = lm_head_weight(model)
    ctx = reading_context(model, batch.lengths, **{"selector": "indexer", **context})
    hidden = hidden_states(model, batch.tokens.to(weight.device), ctx)
    rows = batch.next_token_rows.to(weight.device)
    targets = batch.tokens.to(weight.device)[rows + 1]
    return -ops.token_logprobs(hidden[rows], weight, targets)[0], ctx.positions[rows]


def language_loss(model: Any, batch: Packed, **context: Any) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the next tokens of a packed batch, and their number. Carries gradient where enabled."""
    losses, _ = token_losses(model, batch, **context)
    return losses.sum(), len(losses)


def bucket_edges(longest: int, top_k: int) -> list[int]:
    """0, k, 2k, 4k ... up to `longest`: below k every set is the whole context."""
    edges = [0]
    step = top_k
    while edges[-1] < longest:
        edges.append(min(step, longest))
        step *= 2
    return edges


@torch.no_grad()
def perplexities(
    model: nn.Module, sequences: Sequence[Sequence[int]], selector: str, edges: Sequence[int], tokens: int = 4096
) -> tuple[float, list[float | None]]:
    """Perplexity of all predictions, and of those made at positions edges[i] .. edges[i + 1] - 1; None where there are none."""
    sums, counts = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for batch in batched(sequences, tokens):
        losses, positions = token_losses(model, batch, selector=selector)
        for i, (a, b) in enumerate(itertools.pairwise(edges)):
            inside = (positions >= a) & (positions < b)
            sums[i] += float(losses[inside].sum())
            counts[i] += int(inside.sum())
    each = [math.exp(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
    return math.exp(sum(sums) / max(1, sum(counts))), each


def perplexity(model: nn.Module, sequences: Sequence[Sequence[int]], selector: str, tokens: int = 4096) -> float:
    return perplexities(model, sequences, selector, [0, max(map(len, sequences), default=1)], tokens)[0]


@torch.no_grad()
def recall(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    tokens: int = 4096,
    selectors: Sequence[str] = RECALL_SELECTORS,
) -> dict[str, list[float]]:
    """selector -> recall of the dense attention's mass, one figure a layer; empty lists when nothing is longer than top_k."""
    meter = RecallMeter(selectors=selectors)
    for batch in batched(sequences, tokens):
        ctx = train_context(batch.lengths, next(model.parameters()).device, selector="dense", indexer_loss=meter)
        hidden_states(model, batch.tokens.to(ctx.positions.device), ctx)
    return {selector: meter.by_layer(selector) for selector in selectors}


def retention_report(
    model: Any, sequences: Sequence[Sequence[int]], selectors: Sequence[str] = ("dense", "indexer", "random", "recent")
) -> dict[str, Any]:
    """Perplexity of the model under `selectors`, whole and by position, and recall by layer with its mean.

    The figures of "indexer" are called "sparse".
    """
    shape = indexer_config(model)
    assert shape is not None, "a retention report needs a converted model"
    edges = bucket_edges(max(map(len, sequences), default=1), shape.top_k)
    wanted = {name: selector for name, selector in SELECTORS.items() if selector in selectors}
    figures = {name: perplexities(model, sequences, selector, edges) for name, selector in wanted.items()}
    by_layer = recall(model, sequences, selectors=[s for s in RECALL_SELECTORS if s in selectors])
    kept = by_layer["indexer"]
    worst = sorted(range(len(kept)), key=lambda layer: kept[layer])[:WORST_LAYERS]
    return {
        "tokens": sum(map(len, sequences)),
        "top_k": shape.top_k,
        "perplexity": {name: whole for name, (whole, _) in figures.items()},
        "positions": [
            {"from": a, "to": b} | {name: each[i] for name, (_, each) in figures.items()}
            for i, (a, b) in enumerate(itertools.pairwise(edges))
        ],
        "recall": {name: {"mean": sum(r) / len(r) if r else None, "layers": r} for name, r in by_layer.items()},
        "worst_layers": [{"layer": layer, "recall": kept[layer]} for layer in worst],
    }
