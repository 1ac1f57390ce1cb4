"""A layer's forward pass in training on a GPU: transformers' modules and parameters, with few launches between products.

    norm ─> q, k, v ─> RoPE ─> attention over the sets ─> o ─> sum and norm ─> gate, up ─> silu(gate) up ─> down ─> sum

`fuse` puts it in the place of a layer's `forward`, so whatever is around layers (FSDP, activation checkpointing, hooks) finds it where the
other was. That one is still there: it runs on CPUs, and for every layer, dtype or context that this one does not know.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from winnow.kernels import ops
from winnow.models import joined
from winnow.models.attention import attend_packed
from winnow.models.context import ForwardContext, open_context
from winnow.models.inference import takes
from winnow.models.layer import Layer


def fuse(model: Any) -> None:
    """Every layer's forward becomes this module's, where the family is known. Again is no harm."""
    if takes(model):
        for layer in model.get_decoder().layers:
            layer.forward = partial(layer_forward, layer)


def separate(model: Any) -> None:
    """Undoes `fuse`."""
    for layer in model.get_decoder().layers:
        layer.__dict__.pop("forward", None)


def layer_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """hidden_states [1, T, C] -> [1, T, C]."""
    ctx, rows = kwargs.get("winnow") or open_context(), ops.train_rows_of(hidden_states)
    embedded = kwargs.get("position_embeddings")
    if ctx is None or rows is None or embedded is None or not knows(layer, hidden_states, embedded[0], ctx):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    angles = (embedded[0][0], embedded[1][0])
    x = hidden_states[0]
    ctx.check_tokens(len(x))
    y = normed(layer.input_layernorm, x, rows)
    out = attend(
        layer.self_attn, y if ctx.coupled else y.detach(), *heads(layer.self_attn, y, *angles, rows), *angles, ctx
    )
    x, y = _to_mlp(layer, x, out, rows)
    return (x + y)[None]


def normed(norm: Any, x: Tensor, rows: Any) -> Tensor:
    y: Tensor = rows.norm(x, norm.weight, norm.variance_epsilon)
    return y


def behind(layer: Any, x: Tensor, out: Tensor, norm: Any, rows: Any) -> tuple[Tensor, Tensor]:
    """What follows a layer's attention: x [T, C] before it, out [T, H, D] of it -> the layer's output, and that under the next norm."""
    x, y = _to_mlp(layer, x, out, rows)
    x, y = rows.add_norm(y, x, norm.weight, norm.variance_epsilon)
    return x, y


def _to_mlp(layer: Any, x: Tensor, out: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """The residual behind the attention, and what the MLP adds to it."""
    after = layer.post_attention_layernorm
    x, y = rows.add_norm(layer.self_attn.o_proj(out.reshape(len(x), -1)), x, after.weight, after.variance_epsilon)
    both = joined.together(y, joined.gates(layer.mlp))
    y = rows.silu_mul(both) if both is not None else rows.silu_mul(layer.mlp.gate_proj(y), layer.mlp.up_proj(y))
    return x, layer.mlp.down_proj(y)


def knows(layer: Any, x: Tensor, cos: Tensor, ctx: ForwardContext) -> bool:
    """Whether the kernels do what the modules would: packed tokens in training, one dtype, no dropout, RoPE over whole heads."""
    if ctx.mode != "train" or x.shape[0] != 1:
        return False
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    quiet = not (attention.training and attention.attention_dropout)
    return quiet and cos.shape[-1] == attention.head_dim and all(norm.weight.dtype == x.dtype for norm in norms)


def attend(
    module: Any, y: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, ctx: ForwardContext,
    projected: tuple[Tensor, ...] = (),
) -> Tensor:  # fmt: skip
    """y [T, C], what the layer's indexer reads; q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]. projected: what its indexer made of y, if it
    has."""
    own = getattr(module, "indexer", None) is not None
    layer = Layer(module, ctx, (y, cos, sin) if own else None)
    if projected and layer.sparse:
        assert layer.served is not None
        layer.served.projected = (projected[0], projected[1], projected[2])
        layer.served.indexer.calls += 1
    out: Tensor = attend_packed(layer, q, k, v, module.scaling)
    layer.finish()
    return out


def heads(module: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, C] -> q [T, H, D] and k [T, Hkv, D], normed where the family does that and turned, v [T, Hkv, D]."""
    dim, normed = module.head_dim, hasattr(module, "q_norm")
    qkv = None if normed else joined.together(x, joined.heads(module))
    if qkv is not None:
        return rows.split_heads(
            qkv, cos, sin, (module.q_proj.out_features // dim, module.k_proj.out_features // dim, dim)
        )
    q, k, v = (linear(x).view(len(x), -1, dim) for linear in joined.heads(module))
    if normed:
        q = rows.norm(q, module.q_norm.weight, module.q_norm.variance_epsilon)
        k = rows.norm(k, module.k_norm.weight, module.k_norm.variance_epsilon)
    q, k = (rows.turn(part, cos, sin, dim, "half", part.dtype) for part in (q, k))
    return q, k, v
