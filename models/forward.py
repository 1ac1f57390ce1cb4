"""The one forward pass that learner and engine share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.models.context import ForwardContext, open_context
from winnow.models.inference import inference_states


def hidden_states(model: Any, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
    """input_ids int64 [T], packed as `ctx` says -> final hidden states [T, C], after the last norm, before the head."""
    if input_ids.ndim != 1 or len(input_ids) != len(ctx.positions):
        raise ValueError(
            f"input_ids are {tuple(input_ids.shape)}, but the context holds {len(ctx.positions)} packed tokens"
        )
    if torch.is_grad_enabled() and ctx.mode != "train":
        with torch.no_grad():
            return hidden_states(model, input_ids, ctx)
    if ctx.fused:
        states = inference_states(model, input_ids, ctx)
        if ctx.mode == "prefill":
            ctx.check_faults()
        return states
    decoder = model.get_decoder()
    # An open context is found by the layers themselves. FSDP's hooks would hand each layer a copy of one that is passed, and what the
    # layer notes in it (KL, sets) would be lost.
    passed = {} if open_context() is ctx else {"winnow": ctx}
    output = decoder(input_ids=input_ids[None], position_ids=ctx.positions[None], use_cache=False, **passed)
    if ctx.mode != "decode":
        ctx.check_faults()
    return output.last_hidden_state[0]


def lm_head_weight(model: Any) -> Tensor:
    """[V, C]: the output embedding, tied to the input one or not."""
    return model.get_output_embeddings().weight
