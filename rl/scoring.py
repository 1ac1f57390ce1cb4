"""Log-probabilities of a packed micro-batch under a model: the one forward path of training, reference, evaluation and parity checks.

MicroBatch -> ForwardContext(train, own or replayed index sets and experts) -> hidden states [T, C] -> log-probabilities at trained rows [N]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.kernels.packing import known
from winnow.kernels.selection import Selection
from winnow.models.context import ForwardContext, IndexerLoss, current_context, faults_of, forward_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.batching import MicroBatch
from winnow.rollout import records

States = Callable[[Any, Tensor, ForwardContext], Tensor]  # as `hidden_states`


@dataclass(kw_only=True, slots=True)
class Scored:
    """One forward pass. `selections` and `experts` [T, k] by layer are what the model chose itself, where it was asked for."""

    logprobs: Tensor  # fp32 [N]
    entropy: Tensor  # fp32 [N]
    selections: Mapping[int, Selection] = field(default_factory=dict)
    experts: Mapping[int, Tensor] = field(default_factory=dict)


@contextmanager
def scored(
    model: nn.Module,
    micro: MicroBatch,
    *,
    replay: Mapping[int, Selection] | None = None,
    record: bool = False,
    experts: Mapping[int, Tensor] | None = None,
    record_experts: bool = False,
    indexer_loss: IndexerLoss | None = None,
    selector: str = "indexer",
    states: States = hidden_states,
) -> Iterator[Scored]:
    """Scores a micro-batch. The context stays open inside the `with`, so that a backward pass may recompute activations in it.

    `replay`: index sets to attend to instead of the model's own. `record`: return the model's own sets. `selector`: what chooses them.
    `experts`: where to send the tokens instead of what the routers choose. `record_experts`: return what they chose. `states`: what runs
    the layers of a model that is not split over ranks.
    """
    device = next(model.parameters()).device
    bounds = known(torch.as_tensor(micro.cu_seqlens, device=device), micro.cu_seqlens.tolist())
    lengths = np.diff(micro.cu_seqlens).tolist()
    context = ForwardContext(
        mode="train",
        positions=torch.as_tensor(micro.positions, device=device),
        cu_seqlens=bounds,
        seq_lens=known(bounds.diff(), lengths),
        max_seq_len=max(lengths, default=0),
        fresh=True,
        faults=faults_of(bounds),
        selector=selector,
        selection_in=replay,
        selection_out={} if record else None,
        experts_in=experts,
        experts_out={} if record_experts else None,
        indexer_loss=indexer_loss,
    )
    with forward_context(context):
        run = getattr(model, "score_rows", None) or partial(
            score_rows, model, states=states
        )  # over ranks it has its own
        logprobs, entropy = run(micro)
        yield Scored(
            logprobs=logprobs,
            entropy=entropy,
            selections=context.selection_out or {},
            experts=context.experts_out or {},
        )


def score_rows(model: nn.Module, micro: MicroBatch, states: States = hidden_states) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at the trained rows, in the open context: fp32 [N] both."""
    context = current_context()
    device = context.positions.device
    hidden = states(model, torch.as_tensor(micro.tokens, device=device).long(), context)  # [T, C]
    trained = hidden[torch.as_tensor(micro.rows, device=device)]  # [N, C]
    targets = torch.as_tensor(micro.targets, device=device)
    return ops.token_logprobs(trained, lm_head_weight(model), targets, micro.temperature, micro.kept_sets)


def recorded_selections(micro: MicroBatch, device: torch.device | str = "cpu") -> dict[int, Selection] | None:
    """The rollout's index sets of every layer for the packed inputs; None where no sequence carries any.

    A short sequence needs no record: its sets are the identity. Raises ValueError for records that do not fit the sequences.
    """
    if all(record is None for record in micro.index_records):
        return None
    lengths = np.diff(micro.cu_seqlens) + 1  # decode counts the token that was never a query; the inputs end before it
    sets = records.decode(micro.index_records, lengths.tolist(), device)
    queries = torch.ones(int(lengths.sum()), dtype=torch.bool, device=device)
    queries[torch.as_tensor(lengths.cumsum() - 1, device=device)] = False
    return {layer: Selection(s.indices[queries], s.counts[queries]) for layer, s in sets.items()}


def recorded_experts(micro: MicroBatch, device: torch.device | str = "cpu") -> dict[int, Tensor] | None:
    """The rollout's experts of every layer that has any, for the packed inputs; None where a sequence carries none."""
    if not micro.expert_records or any(record is None for record in micro.expert_records):
        return None
    return records.decode_experts(micro.expert_records, np.diff(micro.cu_seqlens).tolist(), device)


def overlap_by_layer(
    own: Mapping[int, Selection], recorded: Mapping[int, Selection], positions: Tensor, top_k: int
) -> dict[int, tuple[float, int]]:
    """Sum of Jaccard over the rows where the sets can differ (position >= top_k), and the number of those rows, by layer."""
    rows = (positions >= top_k).nonzero()[:, 0]
    sums = {}
    for layer in sorted(set(own) & set(recorded)):
        pair = (Selection(s.indices[rows], s.counts[rows]) for s in (own[layer], recorded[layer]))
        sums[layer] = (float(records.jaccard(*pair).sum()), len(rows))
    return sums


def sparsity(micro: MicroBatch, top_k: int | None) -> tuple[float, int, int]:
    """Over trained rows: the sum of selected/available, how many have position >= top_k, how many there are."""
    positions = micro.positions[micro.rows]
    if top_k is None:
        return float(len(positions)), 0, len(positions)
    available = positions + 1
    return float((np.minimum(available, top_k) / available).sum()), int((positions >= top_k).sum()), len(positions)
