"""The routers of a native model's mixture of experts, whose choices can be recorded in the rollout and replayed in training.

    hidden -> logits -> sigmoid scores -> the top_k experts, or those of the rollout -> gates: their scores, normalised and scaled

Near a tie two forward passes choose different experts, and the probability of a token jumps where it should move by a rounding error.
Replay (Keep Routing, DeepSeek-V3.2, arXiv 2512.02556, section 3.1; R3, arXiv 2510.11370) gives training the rollout's experts: scores and
gates are computed and differentiated as ever, at the recorded experts, and nothing is chosen.

Experts come ascending on both sides, so the sum that normalises the gates has one order; transformers leaves the order open.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.models.context import ForwardContext


def open_routers(model: Any) -> None:
    """Replace the routers' forwards of a native model; weights and names stay."""
    for index, router in routers(model).items():
        router.winnow_layer, router.winnow_choices, router.winnow_context = index, 0, None
        router.forward = MethodType(router_forward, router)


def routers(model: Any) -> dict[int, Any]:
    """Layer -> router, of the layers that have experts; empty for a model without any."""
    layers = enumerate(model.get_decoder().layers)
    return {index: layer.mlp.gate for index, layer in layers if hasattr(layer.mlp, "experts")}


def routing_choices(model: Any) -> int:
    """How often the model's routers have chosen experts themselves."""
    return sum(router.winnow_choices for router in routers(model).values())


def show_context(attention: Any, ctx: ForwardContext) -> None:
    """Hand the context to the router behind this attention: transformers passes a layer's mlp nothing but the hidden states."""
    for router in getattr(attention, "winnow_router", ()):
        router.winnow_context = ctx


def router_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stands in for `DeepseekV32TopkRouter.forward` and `GlmMoeDsaTopkRouter.forward`.

    hidden_states [..., C] -> logits fp32 [T, experts], gates fp32 [T, k], experts int64 [T, k] ascending. Without a context that this
    layer's attention has shown it (the model's own forward is called), it chooses.
    """
    ctx, self.winnow_context = self.winnow_context, None
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    logits = F.linear(hidden.float(), self.weight.float())
    scores = logits.sigmoid()
    if ctx is not None and ctx.experts_in is not None:
        experts = replayed(self, ctx, len(hidden))
    else:
        experts = choose(self, scores.detach())
    if ctx is not None and ctx.experts_out is not None:
        ctx.experts_out[self.winnow_layer] = experts
    gates = scores.gather(1, experts)
    if self.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return logits, gates * self.routed_scaling_factor, experts


def choose(router: Any, scores: Tensor) -> Tensor:
    """scores [T, experts] -> the top_k of the best topk_group groups (a group counts for its two best), ascending int64 [T, k]."""
    router.winnow_choices += 1
    biased = scores + router.e_score_correction_bias
    grouped = biased.unflatten(-1, (router.num_group, -1))  # [T, groups, experts of a group]
    best = grouped.topk(2, -1)[0].sum(-1).topk(router.topk_group, -1, sorted=False)[1]
    kept = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1.0).bool()
    allowed = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    return allowed.topk(router.top_k, -1, sorted=False)[1].sort(-1)[0]


def replayed(router: Any, ctx: ForwardContext, tokens: int) -> Tensor:
    """The context's experts of this layer, int64 [tokens, k]; ValueError when it has none, or not for these tokens."""
    assert ctx.experts_in is not None
    given = ctx.experts_in.get(router.winnow_layer)
    if given is None:
        raise ValueError(
            f"routing replay: no experts for layer {router.winnow_layer}, only for {sorted(ctx.experts_in)}; was the rollout recorded with "
            "another model? Set learner.routing to own to choose again"
        )
    if given.shape != (tokens, router.top_k):
        raise ValueError(
            f"routing replay: layer {router.winnow_layer} has experts {tuple(given.shape)} for {tokens} tokens and top_k {router.top_k}: the "
            "record does not belong to these tokens or to this model"
        )
    return given
