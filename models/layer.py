"""One layer's view of the indexer that serves it, in one forward pass: its own, or that of an earlier layer (IndexShare).

IndexShare (IndexCache, arXiv 2603.12201; GLM's `indexer_types`): a layer without an indexer attends to the set of the nearest earlier
layer that has one. The work of that indexer lies in the forward context, so nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.omission import omission
from winnow.kernels.selection import Selection, window_selection
from winnow.models.context import ForwardContext, LayerInputs, Served


class Layer:
    """`inputs` [T, ...]: what the layer's own indexer takes; None where it has none.

    In prefill and decode with the "dense" selector the indexer does not run, and no later token will miss its keys.
    """

    def __init__(self, module: Any, ctx: ForwardContext, inputs: tuple[Tensor, ...] | None):
        self.module, self.ctx, self.index = module, ctx, int(module.layer_idx)
        served: tuple[int, int] = getattr(module, "winnow_served", (self.index, self.index))
        self.leader, self.last = served  # whose indexer, and the last layer that it serves
        self.served: Served | None = None
        if ctx.selector == "dense" and ctx.mode != "train":
            return
        indexer = getattr(module, "indexer", None)
        if indexer is not None and inputs is not None:
            ctx.served[self.index] = Served(indexer=indexer, inputs=inputs)
        self.served = ctx.served.get(self.leader)
        if self.served is None and self.leader != self.index:
            raise RuntimeError(
                f"layer {self.index} shares the indexer of layer {self.leader}, which has not run in this pass"
            )

    @property
    def leads(self) -> bool:
        return self.served is not None and self.leader == self.index

    @property
    def top_k(self) -> int:
        assert self.served is not None
        return int(self.served.indexer.config.top_k)

    @property
    def sparse(self) -> bool:
        """Whether some set may be smaller than the context: at max_seq_len <= top_k every set is the identity."""
        if self.served is None or self.ctx.selector == "dense":
            return False
        if self.ctx.selection_in is not None or self.ctx.force_sparse:
            return True
        return self.ctx.max_seq_len > self.top_k

    def project(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's q [T, H_I, D_I], k [T, D_I] and w [T, H_I], computed once for all layers that it serves."""
        assert self.served is not None
        if self.served.projected is None:
            self.served.projected = self.served.indexer(*self.served.inputs)
        return self.served.projected

    def scored(self) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """q, k, w for the selection, without gradient; nothing for the floors."""
        if not self.ctx.scores:
            return None, None, None
        q, k, w = self.project()
        return q.detach(), k.detach(), w.detach()

    def select(self) -> Selection | None:
        """The sets of this layer's queries, replayed, shared or chosen now, and recorded; None: every s <= t. Call it once a pass."""
        selection = self._select() if self.sparse else None
        self._record(selection)
        return selection

    def _select(self) -> Selection:
        if self.ctx.selection_in is not None:
            return self._replayed()
        assert self.served is not None
        if self.leads:
            with torch.no_grad():
                self.served.selection = self._choose()
        assert self.served.selection is not None, f"layer {self.leader} left no selection for layer {self.index}"
        return self.served.selection

    def _replayed(self) -> Selection:
        assert self.ctx.selection_in is not None
        if self.index not in self.ctx.selection_in:
            raise ValueError(
                f"replay: no index sets for layer {self.index}, only for {sorted(self.ctx.selection_in)}; was the rollout recorded "
                "with another model? Set indexer.selection to own to select again"
            )
        return self.ctx.selection_in[self.index]

    def _choose(self) -> Selection:
        ctx, top_k = self.ctx, self.top_k
        q, k, w = self.scored()
        if ctx.mode == "train" or (ctx.mode == "prefill" and ctx.fresh):
            return ops.select_packed(q, k, w, ctx.cu_seqlens, ctx.positions, top_k, ctx.selector, ctx.faults)
        pages = ctx.cache.index[self.index] if ctx.scores else None
        if ctx.mode == "decode":
            waiting = (ctx.scratch, ctx.faults, ctx.side)
            return ops.select_paged(q, pages, w, ctx.block_table, ctx.seq_lens, top_k, ctx.selector, *waiting)
        return ops.select_prefill(
            q, pages, w, ctx.cu_seqlens, ctx.positions, ctx.block_table, ctx.seq_lens, top_k, ctx.selector, ctx.faults
        )

    def _record(self, selection: Selection | None) -> None:
        out = self.ctx.selection_out
        if out is None or self.served is None or self.ctx.selector == "dense":
            return
        out[self.index] = selection if selection is not None else window_selection(self.ctx.positions, self.top_k)

    def prepare_loss(self) -> None:
        """Train mode, before `select`: project with gradient where a loss will want it, for the selection and the loss at once."""
        if self.watched and self.ctx.selector in ("indexer", "dense") and torch.is_grad_enabled():
            self.project()

    @property
    def watched(self) -> bool:
        return self.ctx.indexer_loss is not None and self.served is not None

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, selection: Selection | None, scale: float
    ) -> None:
        """Train mode, after the attention: q [T, H, D], k and v [T, Hkv, D], out [T, H, D] and lse [T, H] over the sets, for the observer if
        there is one."""
        if not self.watched:
            return
        assert self.served is not None and self.ctx.indexer_loss is not None
        cost = None
        if self.served.indexer.config.target == "output":
            cost = omission(v, out, self.module.o_proj.weight)
        seen = LayerInputs(
            layer=self.index, leader=self.leader, indexer=self.served.indexer, inputs=self.served.inputs,
            cu_seqlens=self.ctx.cu_seqlens, selection=selection, q=q.detach(), k=k.detach(), lse=lse.detach(), scale=scale,
            cost=cost,
        )  # fmt: skip
        self.ctx.indexer_loss.observe(seen, self.served.projected)

    def finish(self) -> None:
        """Let go of the indexer's work behind the last layer that it serves; a recomputed layer may need that of another one again."""
        if self.index == self.last and (self.leads or not torch.is_grad_enabled()):
            self.ctx.served.pop(self.leader, None)

    def write_keys(self) -> None:
        """Prefill and decode: this layer's indexer keys into the cache; later tokens will need them even where this one does not."""
        if not self.leads or not self.ctx.scores:
            return
        assert self.served is not None
        keys = self.project()[1] if self.sparse else self.served.indexer.keys(*self.served.inputs)
        write_pages(self.ctx.cache.index[self.index], self.ctx.slot_mapping, keys)


def write_pages(pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """pages [pages, page, ...] <- rows [T, ...] at physical slots int64 [T]."""
    pages.view(-1, *pages.shape[2:])[slots] = rows.to(pages.dtype)
