"""What a conversion kept: perplexity per selector and the share of attention mass that the chosen sets hold, layer by layer.

"random" and "recent" are floors: what a set of the same size is worth when nobody looked at the keys.
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
from winnow.models.context import IndexerLoss, LayerInputs, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.convert_data import Packed, pack

RECALL_SELECTORS = ("indexer", "random", "recent")


@dataclass
class RecallMeter(IndexerLoss):
    """Observes a dense forward: recall of S_t = mean over heads of exp(lse over S_t - lse over all), for queries at t >= top_k."""

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
        q, k, w = projected if projected is not None else x.indexer(x.hidden, x.cos, x.sin)
        for selector in RECALL_SELECTORS:
            chosen = ops.select_packed(q, k, w, x.cu_seqlens, positions, top_k, selector)
            lse = ops.sparse_attention(x.q, x.k, x.k, x.cu_seqlens, chosen, x.scale)[1]
            recall = (lse - x.lse).exp().mean(1)[counted]
            key = (selector, x.layer)
            self.sums[key] = self.sums.get(key, 0.0) + float(recall.sum())
            self.counts[key] = self.counts.get(key, 0) + int(counted.sum())

    def by_layer(self, selector: str) -> list[float]:
        layers = sorted(layer for name, layer in self.sums if name == selector)
        return [self.sums[selector, layer] / self.counts[selector, layer] for layer in layers]


def batched(sequences: Sequence[Sequence[int]], tokens: int) -> list[Packed]:
    parts: list[list[Sequence[int]]] = [[]]
    for sequence in sequences:
        if parts[-1] and sum(map(len, parts[-1])) + len(sequence) > tokens:
            parts.append([])
        parts[-1].append(sequence)
    return [pack(part) for part in parts if part]


def language_loss(model: nn.Module, batch: Packed, **context: Any) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the next tokens of a packed batch, and their number. Carries gradient where enabled."""
    weight = lm_head_weight(model)
    ctx = train_context(batch.lengths, weight.device, **context)
    hidden = hidden_states(model, batch.tokens.to(weight.device), ctx)
    rows = batch.next_token_rows.to(weight.device)
    targets = batch.tokens.to(weight.device)[rows + 1]
    return -ops.token_logprobs(hidden[rows], weight, targets)[0].sum(), len(rows)


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Sequence[Sequence[int]], selector: str, tokens: int = 4096) -> float:
    total, count = 0.0, 0
    for batch in batched(sequences, tokens):
        loss, rows = language_loss(model, batch, selector=selector)
        total, count = total + float(loss), count + rows
    return math.exp(total / max(1, count))


@torch.no_grad()
def recall(model: nn.Module, sequences: Sequence[Sequence[int]], tokens: int = 4096) -> dict[str, list[float]]:
    """selector -> recall of the dense attention's mass, one figure a layer; empty lists when nothing is longer than top_k."""
    meter = RecallMeter()
    for batch in batched(sequences, tokens):
        ctx = train_context(batch.lengths, next(model.parameters()).device, selector="dense", indexer_loss=meter)
        hidden_states(model, batch.tokens.to(ctx.positions.device), ctx)
    return {selector: meter.by_layer(selector) for selector in RECALL_SELECTORS}


def retention_report(model: nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Perplexity of the model dense, sparse and on the floors, and recall by layer with its mean."""
    names = {"dense": "dense", "sparse": "indexer", "random": "random", "recent": "recent"}
    by_layer = recall(model, sequences)
    return {
        "tokens": sum(map(len, sequences)),
        "perplexity": {name: perplexity(model, sequences, selector) for name, selector in names.items()},
        "recall": {name: {"mean": sum(r) / len(r) if r else None, "layers": r} for name, r in by_layer.items()},
    }
