"""The attention implementation "winnow" of transformers: DSA where a layer has an indexer, dense attention elsewhere.

A pre-hook on `self_attn` hands the layer's input to this function through keyword arguments; the context comes the same way, or from
`forward_context`. The indexer never sees a gradient of the model, nor the model one of the indexer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.kernels.selection import Selection
from winnow.models.context import ForwardContext, current_context, open_context
from winnow.models.layer import Layer, write_pages

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
    ctx = kwargs.get("winnow") or open_context()
    if ctx is None or not ctx.coupled:
        hidden = hidden.detach()
    cos, sin = kwargs["position_embeddings"]
    return args, kwargs | {"indexer_input": (hidden[0], cos[0], sin[0])}


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
    ctx.check_tokens(query.shape[2])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    layer = Layer(module, ctx, indexer_input)
    if ctx.mode == "train":
        out = attend_packed(layer, q, k, v, scale)
    else:
        out = _cached(layer, q, k, v, scale)
    layer.finish()
    return out[None], None


def attend_packed(layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Train mode: q [T, H, D], k, v [T, Hkv, D] of packed sequences -> [T, H, D], over sets chosen on the way."""
    layer.prepare_loss()
    selection = layer.select()
    out, lse = ops.sparse_attention(q, k, v, layer.ctx.cu_seqlens, selection, scale)
    layer.observe(q, k, v, out, lse, selection, scale)
    return out


@torch.no_grad()
def _cached(layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    ctx, cache = layer.ctx, layer.ctx.cache
    write_pages(cache.k[layer.index], ctx.slot_mapping, k)
    write_pages(cache.v[layer.index], ctx.slot_mapping, v)
    layer.write_keys()
    return attend_cached(layer, layer.select(), q, k, v, scale)


def attend_cached(layer: Layer, selection: Selection | None, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [T, H, D] over its sets of the cache, which holds these tokens already -> [T, H, D]. k and v [T, Hkv, D]: these tokens' own."""
    ctx, cache = layer.ctx, layer.ctx.cache
    if ctx.mode == "decode":
        pages = (cache.k[layer.index], cache.v[layer.index])
        return ops.sparse_decode(q, *pages, ctx.block_table, ctx.seq_lens, selection, scale, ctx.scratch, ctx.exact)[0]
    if ctx.exact:  # a query of a prefill as the decode step would have computed it
        pages = (cache.k[layer.index], cache.v[layer.index])
        return ops.sparse_rows(q, *pages, ctx.cu_seqlens, ctx.positions, ctx.block_table, selection, scale)[0]
    if ctx.fresh:
        return ops.sparse_attention(q, k, v, ctx.cu_seqlens, selection, scale)[0]
    pages = (cache.k[layer.index], cache.v[layer.index])
    return ops.sparse_prefill(q, *pages, ctx.cu_seqlens, ctx.block_table, ctx.seq_lens, selection, scale)[0]
