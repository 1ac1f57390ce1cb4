"""The attention implementation "winnow" of transformers: DSA where a layer has an indexer, dense attention elsewhere.

A pre-hook on `self_attn` hands the layer's input to this function through keyword arguments; the context comes the same way, or from
`forward_context`. The indexer never sees a gradient of the model, nor the model one of the indexer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.kernels.selection import Selection, window_selection
from winnow.models.context import ForwardContext, LayerInputs, current_context

NAME = "winnow"


def register() -> None:
    """Make `attn_implementation="winnow"` known to transformers, with a mask function: one without gets no say over masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, winnow_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def give_indexer_its_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of `self_attn`: adds the detached hidden states and RoPE angles to what reaches `winnow_attention`."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cos, sin = kwargs["position_embeddings"]
    return args, kwargs | {"indexer_input": (hidden.detach()[0], cos[0], sin[0])}


def winnow_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, winnow: ForwardContext | None = None, indexer_input: tuple[Tensor, ...] | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, H, T, D], key and value [1, Hkv, T, D] of packed tokens -> ([1, T, H, D], None)."""
    ctx = winnow if winnow is not None else current_context()
    if attention_mask is not None or dropout or query.shape[0] != 1:
        raise ValueError(
            "winnow attention takes packed sequences [1, tokens]: no attention mask, no dropout, no batch axis"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    layer = _Layer(module, ctx, indexer_input if ctx.selector != "dense" or ctx.mode == "train" else None)
    if ctx.mode == "train":
        out = _train(layer, q, k, v, scale)
    else:
        out = _cached(layer, q, k, v, scale)
    return out[None], None


class _Layer:
    """One layer's indexer in one forward pass; computes its projections at most once."""

    def __init__(self, module: Any, ctx: ForwardContext, inputs: tuple[Tensor, ...] | None):
        self.ctx, self.index = ctx, int(module.layer_idx)
        self.indexer: Any = getattr(module, "indexer", None) if inputs is not None else None
        self.inputs = inputs or ()  # hidden [T, C], cos and sin [T, D]
        self.projected: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def sparse(self) -> bool:
        """Whether some set may be smaller than the context: at max_seq_len <= top_k every set is the identity."""
        if self.indexer is None or self.ctx.selector == "dense":
            return False
        if self.ctx.selection_in is not None or self.ctx.force_sparse:
            return True
        return self.ctx.max_seq_len > self.indexer.config.top_k

    def project(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.projected is None:
            self.projected = self.indexer(*self.inputs)
        return self.projected

    def scored(self) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """q, k, w for the selection, without gradient; nothing for the floors."""
        if self.ctx.selector != "indexer":
            return None, None, None
        q, k, w = self.project()
        return q.detach(), k.detach(), w.detach()

    def replayed(self) -> Selection | None:
        if self.ctx.selection_in is None:
            return None
        if self.index not in self.ctx.selection_in:
            raise ValueError(
                f"replay: no index sets for layer {self.index}, only for {sorted(self.ctx.selection_in)}; was the rollout recorded "
                "with another model? Set indexer.selection to own to select again"
            )
        return self.ctx.selection_in[self.index]

    def record(self, selection: Selection | None) -> None:
        out = self.ctx.selection_out
        if out is None or self.indexer is None or self.ctx.selector == "dense":
            return
        out[self.index] = (
            selection if selection is not None else window_selection(self.ctx.positions, self.indexer.config.top_k)
        )


def _train(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    ctx = layer.ctx
    watch = ctx.indexer_loss if layer.indexer is not None else None
    if watch is not None and ctx.selector in ("indexer", "dense") and torch.is_grad_enabled():
        layer.project()  # with gradient: shared by the selection and the loss
    selection = None
    if layer.sparse:
        selection = layer.replayed()
        if selection is None:
            with torch.no_grad():
                qi, ki, wi = layer.scored()
                top_k = layer.indexer.config.top_k
                selection = ops.select_packed(qi, ki, wi, ctx.cu_seqlens, ctx.positions, top_k, ctx.selector)
    layer.record(selection)
    out, lse = ops.sparse_attention(q, k, v, ctx.cu_seqlens, selection, scale)
    if watch is not None:
        hidden, cos, sin = layer.inputs
        seen = LayerInputs(
            layer=layer.index, indexer=layer.indexer, hidden=hidden, cos=cos, sin=sin, cu_seqlens=ctx.cu_seqlens,
            selection=selection, q=q.detach(), k=k.detach(), lse=lse.detach(), scale=scale,
        )  # fmt: skip
        watch.observe(seen, layer.projected)
    return out


@torch.no_grad()
def _cached(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    ctx, cache = layer.ctx, layer.ctx.cache
    _write(cache.k[layer.index], ctx.slot_mapping, k)
    _write(cache.v[layer.index], ctx.slot_mapping, v)
    if layer.indexer is not None and ctx.selector == "indexer":
        keys = layer.project()[1] if layer.sparse else layer.indexer.keys(*layer.inputs)  # later tokens will need them
        _write(cache.index[layer.index], ctx.slot_mapping, keys)
    selection = None
    if layer.sparse:
        selection = layer.replayed()
        selection = selection if selection is not None else _select_cached(layer)
    layer.record(selection)
    if ctx.mode == "decode":
        return ops.sparse_decode(
            q, cache.k[layer.index], cache.v[layer.index], ctx.block_table, ctx.seq_lens, selection, scale
        )[0]
    if ctx.fresh:
        return ops.sparse_attention(q, k, v, ctx.cu_seqlens, selection, scale)[0]
    pages = (cache.k[layer.index], cache.v[layer.index])
    return ops.sparse_prefill(q, *pages, ctx.cu_seqlens, ctx.block_table, ctx.seq_lens, selection, scale)[0]


def _select_cached(layer: _Layer) -> Selection:
    ctx, top_k = layer.ctx, layer.indexer.config.top_k
    q, k, w = layer.scored()
    if ctx.mode == "prefill" and ctx.fresh:
        return ops.select_packed(q, k, w, ctx.cu_seqlens, ctx.positions, top_k, ctx.selector)
    pages = ctx.cache.index[layer.index] if ctx.selector == "indexer" else None
    if ctx.mode == "decode":
        return ops.select_paged(q, pages, w, ctx.block_table, ctx.seq_lens, top_k, ctx.selector)
    return ops.select_prefill(
        q, pages, w, ctx.cu_seqlens, ctx.positions, ctx.block_table, ctx.seq_lens, top_k, ctx.selector
    )


def _write(pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """pages [pages, page, ...] <- rows [T, ...] at physical slots int64 [T]."""
    pages.view(-1, *pages.shape[2:])[slots] = rows.to(pages.dtype)
