"""The engine's forward passes over the paged cache: packed prefills, plain decode steps, logits, draws and scores.

    host arrays of one pass -> ForwardContext -> the learner's modules (or `models/inference.py` on a GPU) -> hidden [tokens, C]

Decode steps at fixed shapes are `decoding.py`'s; both leave the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.packing import known, round_up
from winnow.models import inference, joined
from winnow.models.context import ForwardContext
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rollout.cache import PagedCache
from winnow.rollout.records import compact, compact_experts
from winnow.rollout.sampler import Drawn, draw, sample
from winnow.rollout.scheduler import Slots
from winnow.rollout.sequence import Span

SCORED = 256  # rows of logits of one piece of an exact scoring


class Forward:
    """One model over one cache. `fused`: `models/inference.py` runs the layers, and kernels draw.

    context: the longest sequence; index_k: the indexers' k, or 0; records: index sets are wanted; expert_layers: whose experts are.
    """

    def __init__(
        self, model: Any, cache: PagedCache, *, selector: str, exact: bool, context: int, index_k: int, layers: tuple[int, ...], records: bool,
        expert_layers: tuple[int, ...] = (), num_experts: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.selector, self.exact = model, cache, selector, exact
        self.context, self.index_k, self.layers, self.records = context, index_k, layers, records
        self.expert_layers, self.num_experts = expert_layers, num_experts
        self.device = lm_head_weight(model).device
        self.fused = self.device.type == "cuda" and inference.takes(model)
        if exact and self.device.type == "cuda" and not self.fused:
            raise ValueError(
                f"rollout.exact is set, but a {model.config.model_type} model has no exact forward pass: it needs one of "
                f"{inference.FAMILIES}"
            )
        if self.fused:
            joined.join(model)

    def prefill(self, spans: list[Span], counts: list[int]) -> Tensor:
        """Runs the next counts[i] tokens of each span through the model; their pages exist. Returns hidden [sum(counts), C]."""
        starts = np.array([span.num_cached for span in spans])
        sizes = np.array(counts)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ids = np.concatenate([s.tokens[s.num_cached : s.num_cached + c] for s, c in zip(spans, counts, strict=True)])
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        table = np.zeros((len(spans), max(len(span.pages) for span in spans)), dtype=np.int32)
        for row, span in enumerate(spans):
            table[row, : len(span.pages)] = span.pages
        hidden, sets, routes = self.run(
            "prefill", ids, positions, np.repeat(np.arange(len(spans)), sizes), offsets, starts + sizes, table
        )
        for row, span in enumerate(spans):
            if sets is not None and span.order >= 0:  # only queries past the k-th position see more than k
                begin = offsets[row] + max(0, self.index_k - int(starts[row]))
                if begin < offsets[row + 1]:
                    span.records.append((sets, int(begin), int(offsets[row + 1])))
            if routes is not None and span.order >= 0:
                span.routes.append((routes, int(offsets[row]), int(offsets[row + 1])))
            span.num_cached += counts[row]
        return hidden

    def decode(self, rows: Slots, slots: np.ndarray) -> tuple[Tensor, np.ndarray | None, np.ndarray | None]:
        """The newest token of each slot: hidden [rows, C], sets and experts as in `run`."""
        lengths = rows.length[slots]
        table = rows.table[slots, : self.cache.pages_for(int(lengths.max()))]
        each = np.arange(len(slots) + 1)
        return self.run("decode", rows.last[slots], lengths - 1, each[:-1], each, lengths, table)

    def run(
        self, mode: str, ids: np.ndarray, positions: np.ndarray, row_of: np.ndarray, offsets: np.ndarray, lengths: np.ndarray,
        table: np.ndarray,
    ) -> tuple[Tensor, np.ndarray | None, np.ndarray | None]:  # fmt: skip
        """hidden [tokens, C]; the index sets [layers, tokens, k] where they are recorded and any query sees more than k; the experts
        [layers, tokens, k] where they are recorded."""
        size, num_tokens = self.cache.page_size, len(ids)
        # Whole blocks of rows, as packing.ROW_MULTIPLE explains: filled up with sequences of one token each, on the scratch page.
        extra = round_up(num_tokens) - num_tokens if self.device.type == "cpu" else 0
        if extra:
            more = np.arange(extra)
            ids, positions = np.append(ids, 0 * more), np.append(positions, 0 * more)
            row_of, offsets = np.append(row_of, len(lengths) + more), np.append(offsets, num_tokens + 1 + more)
            lengths = np.append(lengths, 1 + 0 * more)
            table = np.concatenate([table, np.full((extra, table.shape[1]), self.cache.scratch_page, table.dtype)])
        slots = table[row_of, positions // size].astype(np.int64) * size + positions % size

        def move(array: np.ndarray, dtype: type) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device)

        record = self.records and int(lengths.max()) > self.index_k
        out: dict[int, Any] | None = {} if record else None
        chosen: dict[int, Tensor] | None = {} if self.expert_layers else None
        context = ForwardContext(
            mode=mode,
            positions=move(positions, np.int64),
            cu_seqlens=known(move(offsets, np.int32), offsets.tolist()),
            seq_lens=known(move(lengths, np.int32), lengths.tolist()),
            block_table=move(table, np.int32),
            slot_mapping=move(slots, np.int64),
            cache=self.cache,
            selector=self.selector,
            selection_out=out,
            experts_out=chosen,
            max_seq_len=int(lengths.max()),
            fresh=mode == "prefill" and bool((np.diff(offsets) == lengths).all()),
            faults=torch.zeros(1, dtype=torch.int32, device=self.device) if mode == "prefill" and self.fused else None,
            fused=self.fused,
            exact=self.exact and self.fused,
        )
        hidden = hidden_states(self.model, move(ids, np.int64), context)
        hidden = hidden[:num_tokens]
        routes = None
        if chosen is not None:
            routes = compact_experts(chosen, self.expert_layers, self.num_experts, num_tokens)
        if out is None:
            return hidden, None, routes
        assert tuple(sorted(out)) == self.layers, (
            f"selections of layers {sorted(out)} were recorded, want {self.layers}"
        )
        stacked = torch.stack([out[layer].indices[:num_tokens] for layer in self.layers])
        return hidden, compact(stacked, self.context), routes

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, C] -> [rows, V]."""
        rows, weight = len(hidden), lm_head_weight(self.model)
        if self.device.type == "cpu":
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, round_up(rows) - rows))
        return ops.linear(hidden, weight, None, self.exact)[:rows]

    def sample(self, logits: Tensor, rows: Slots, slots: np.ndarray, keep_kept_sets: bool) -> Drawn:
        """A draw for each slot. Without filters on a GPU by the kernel that decode steps use, so that both sides have the same bits."""
        params = rows.params(slots)
        if self.fused and not params.filtered.any():
            return draw(logits, params)
        return sample(logits.float(), params, keep_kept_sets)

    def score(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Log-probabilities fp32 [T] of targets int64 [T]; in exact mode by the very kernel that drew them."""
        weight = lm_head_weight(self.model)
        if not (self.exact and self.fused):
            return ops.token_logprobs(hidden, weight, targets, temperature, None)[0]
        parts = []
        for some, wanted in zip(hidden.split(SCORED), targets.split(SCORED), strict=True):
            warm = torch.full((len(some),), temperature, dtype=torch.float32, device=self.device)
            logprobs, faults = torch.empty_like(warm), torch.zeros(1, dtype=torch.int32, device=self.device)
            ops.draw(ops.linear(some, weight, None, True), warm, warm.double(), wanted, logprobs, faults, given=True)
            parts.append(logprobs)
        return torch.cat(parts) if parts else torch.empty(0, device=self.device)
