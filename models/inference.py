"""The forward pass of an engine on a GPU: the learner's modules and parameters, read layer by layer, with few launches between products.

A decode step of 28 layers is 2,500 launches when transformers' modules run it and 370 here; at 2 us each that is most of the step. What
is computed is the same, up to where 16-bit numbers are rounded; tests hold both against each other. Weights that meet the same input are
one product where `joined.join` has been.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.models import joined
from winnow.models.attention import attend_cached
from winnow.models.context import ForwardContext
from winnow.models.indexer import tensor_cores
from winnow.models.layer import Layer

SHORT = 512  # tokens of a context whose keys are next to nothing to read
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
STEADY_ROPE = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone


def takes(model: Any) -> bool:
    """Whether this forward pass knows the model: grouped-query attention with RoPE, RMS norms and a SwiGLU."""
    config = model.config
    rope = getattr(model.get_decoder().rotary_emb, "rope_type", "") if config.model_type in FAMILIES else ""
    return rope in STEADY_ROPE and config.hidden_act in ("silu", "swish") and not getattr(config, "mlp_bias", False)


def inference_states(model: Any, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
    """input_ids int64 [T] of a prefill or decode context -> hidden states [T, C] after the last norm."""
    assert ctx.mode != "train", "the fused forward pass has no gradient"
    decoder = model.get_decoder()
    x = nn.functional.embedding(input_ids, decoder.embed_tokens.weight)  # [T, C]
    cos, sin = (angle[0] for angle in decoder.rotary_emb(x[None], ctx.positions[None]))  # [T, D]
    rows = ops.rows_of(x)
    residual: Tensor | None = None
    for layer in decoder.layers:
        wide = torch.empty_like(x, dtype=torch.float32) if _reads_fp32(layer.self_attn, x, ctx) else None
        x, residual = _normed(x, residual, layer.input_layernorm, wide)
        x = _attention(layer.self_attn, x, x if wide is None else wide, cos, sin, ctx)
        x, residual = _normed(x, residual, layer.post_attention_layernorm)
        x = _linear(rows.silu_mul(_together(x, joined.gates(layer.mlp), ctx)), layer.mlp.down_proj.weight, None, ctx)
    return _normed(x, residual, decoder.norm)[0]


def _normed(x: Tensor, residual: Tensor | None, norm: Any, wide: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, in `wide` as fp32 too, and that sum, which is the next residual."""
    y = ops.rms_norm(x, norm.weight, norm.variance_epsilon, residual, wide)
    return y, x if residual is None else residual


def _reads_fp32(attention: Any, x: Tensor, ctx: ForwardContext) -> bool:
    """Whether an indexer, whose products are fp32, reads this layer's input of 16 bits."""
    return x.element_size() < 4 and ctx.scores and getattr(attention, "indexer", None) is not None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, ctx: ForwardContext) -> Tensor:
    return ops.linear(x, weight, bias, ctx.exact, ctx.scratch)


def _attention(module: Any, hidden: Tensor, wide: Tensor, cos: Tensor, sin: Tensor, ctx: ForwardContext) -> Tensor:
    """hidden [T, C], and the same as fp32 where an indexer is -> the output of self_attn [T, C]."""
    dim = module.head_dim
    heads = (module.q_proj.out_features // dim, module.k_proj.out_features // dim, dim)
    norms, eps = None, 0.0
    if hasattr(module, "q_norm"):
        norms, eps = (module.q_norm.weight, module.k_norm.weight), module.q_norm.variance_epsilon
    layer = Layer(module, ctx, (hidden, cos, sin))
    with _beside(layer):
        _index(layer, hidden.dtype, wide, cos, sin)
        selection = layer.select()
    qkv = _together(hidden, joined.heads(module), ctx)
    pages = (ctx.cache.k[layer.index], ctx.cache.v[layer.index])
    keep = ctx.mode == "prefill" and bool(ctx.fresh)
    q, k = ops.rows_of(qkv).split_heads(qkv, heads, norms, eps, cos, sin, ctx.slot_mapping, *pages, keep=keep)
    v = qkv[:, (heads[0] + heads[1]) * dim :].unflatten(1, (heads[1], dim))
    if ctx.side is not None:
        ctx.side.join()
    out = attend_cached(layer, selection, q, k, v, module.scaling)
    layer.finish()
    return _linear(out.reshape(len(hidden), -1), module.o_proj.weight, module.o_proj.bias, ctx)


def _beside(layer: Layer) -> AbstractContextManager[None]:
    """Where there is a second stream, an indexer works on it beside the layer's projections. Not where it reads a long context's keys: that
    takes all that the memory gives, and `select` takes to the second stream when it has been."""
    ctx = layer.ctx
    if ctx.side is None or not layer.leads or (layer.sparse and ctx.max_seq_len > SHORT):
        return nullcontext()
    return ctx.side.beside()


def _index(layer: Layer, dtype: torch.dtype, wide: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The indexer's keys into the cache; with its queries and weights where this layer is about to choose. wide fp32 [T, C]; dtype: the
    model's own."""
    ctx = layer.ctx
    if not layer.leads or not ctx.scores:
        return
    assert layer.served is not None
    indexer, choosing = layer.served.indexer, layer.sparse
    shape = indexer.config
    with tensor_cores(dtype):
        proj = _products(wide, joined.of_indexer(indexer) if choosing else [indexer.wk], ctx)
    norm = (indexer.k_norm.weight, indexer.k_norm.bias, indexer.k_norm.eps)
    q, k, w = ops.rows_of(proj).index_rows(
        proj, (shape.num_heads, shape.head_dim, shape.rope_dim), norm, cos, sin, shape.rope_layout, ctx.slot_mapping,
        ctx.cache.index[layer.index], choosing, keep=choosing and bool(ctx.fresh),
    )  # fmt: skip
    if choosing:
        indexer.calls += 1
        layer.served.projected = (
            q,
            q if k is None else k,
            w,
        )  # with an earlier context the keys are read from the cache


def _products(x: Tensor, linears: Sequence[nn.Linear], ctx: ForwardContext) -> Tensor:
    """`_together`, or of few tokens its pieces [P, T, N]."""
    weight = joined.whole([linear.weight for linear in linears])
    parts = None if weight is None else ops.linear_parts(x, weight)
    return _together(x, linears, ctx) if parts is None else parts


def _together(x: Tensor, linears: Sequence[nn.Linear], ctx: ForwardContext) -> Tensor:
    """x [T, K] times several weights, side by side [T, sum of N]: one product where `joined.join` has been."""
    weight = joined.whole([linear.weight for linear in linears])
    bias = joined.whole([linear.bias for linear in linears]) if linears[0].bias is not None else None
    if weight is not None and (bias is None) == (linears[0].bias is None):
        return _linear(x, weight, bias, ctx)
    return torch.cat([_linear(x, linear.weight, linear.bias, ctx) for linear in linears], -1)
