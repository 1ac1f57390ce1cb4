"""Weights that meet the same input, laid behind one another in one tensor of which they stay parameters: one product instead of several.

    q, k, v    gate, up    an indexer's queries, keys, weights

Names, values and whoever holds the parameters stay as they are; an update of one is an update of the whole. What moves or replaces a
parameter takes it out again, and then the products are several: `whole` looks anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def join(model: Any) -> None:
    """Lays the weights of q, k, v, of gate and up, and of the indexer behind one another. In place."""
    for layer in model.get_decoder().layers:
        for group in (heads(layer.self_attn), gates(layer.mlp), of_indexer(getattr(layer.self_attn, "indexer", None))):
            for name in ("weight", "bias"):
                parts = [getattr(linear, name) for linear in group if getattr(linear, name) is not None]
                if len(parts) != len(group) or not group:
                    continue
                joined = torch.cat([part.data for part in parts])
                for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
                    part.data = view


def heads(attention: Any) -> list[nn.Linear]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def gates(mlp: Any) -> list[nn.Linear]:
    return [mlp.gate_proj, mlp.up_proj]


def of_indexer(indexer: Any) -> list[nn.Linear]:
    return [] if indexer is None else [indexer.wq, indexer.wk, indexer.ww]


def whole(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that these lie in, when they lie back to back in one storage; None otherwise."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if part.data_ptr() != end or not same or not part.is_contiguous():
            return None
        end += part.nbytes
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def together(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor | None:
    """x [T, K] times their weights, side by side [T, sum of N], with gradients; None where they are not joined, or have biases."""
    weights = [linear.weight for linear in linears]
    if any(type(linear) is not nn.Linear or linear.bias is not None for linear in linears):
        return None
    with torch.no_grad():
        joined = whole(weights)
    return None if joined is None else _Together.apply(x, joined, *weights)


class _Together(torch.autograd.Function):
    """The parts are given for their gradients alone, which are parts of one product's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, joined)
        ctx.sizes = [len(weight) for weight in weights]
        return x @ joined.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, joined = ctx.saved_tensors
        into = grads[0] @ joined if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return into, None, *(None for _ in ctx.sizes)
        parts = (grads[0].T @ x).split(ctx.sizes)
        return (
            into,
            None,
            *(part if wanted else None for part, wanted in zip(parts, ctx.needs_input_grad[2:], strict=True)),
        )
