"""Multi-head latent attention with DSA (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3.2, arXiv 2512.02556), in its two forms.

    latent   c_t [kv_lora_rank], one rotary key r_t [rope]: all that the cache holds, page x (kv_lora_rank + rope), 576 in V3.2
    MHA      K = [W_uk c, r] [H, nope + rope], V = W_uv c [H, v]: fewer operations a pair; training and short prefill
    absorbed q' = [W_uk^T q_nope, q_rope] attends to [c, r] itself, one kv head; out = W_uv (sum of c): nothing is expanded;
             decode and long prefill

transformers expands K and V before its attention interface is reached, and its indexer runs under no_grad: so `self_attn.forward` is
replaced by `mla_forward`. Scores are equal in both forms up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.selection import Selection
from winnow.models.context import ForwardContext, current_context
from winnow.models.indexer import rotate
from winnow.models.layer import Layer, write_pages
from winnow.models.routing import show_context

ABSORBED_PAYS = 3.4  # absorbed sparse prefill is cheaper than MHA above an average context of this many top_k (from operation counts)


def mla_forward(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
    winnow: ForwardContext | None = None, prev_topk_indices: Any = None, past_key_values: Any = None, **_: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Stands in for `DeepseekV32Attention.forward` and `GlmMoeDsaAttention.forward`: hidden_states [1, T, C] of packed tokens.

    Shared selections travel in the forward context, so GLM's third result is None.
    """
    ctx = winnow if winnow is not None else current_context()
    if hidden_states.shape[0] != 1 or attention_mask is not None or past_key_values is not None:
        raise ValueError(
            "winnow attention takes packed sequences [1, tokens]: no attention mask, no batch axis, no transformers cache"
        )
    ctx.check_tokens(hidden_states.shape[1])
    show_context(self, ctx)
    hidden = hidden_states[0]  # [T, C]
    cos, sin = (x[0] for x in position_embeddings)  # [T, rope], both halves alike
    q_latent = self.q_a_layernorm(self.q_a_proj(hidden))  # [T, q_lora_rank]
    q = self.q_b_proj(q_latent).view(len(hidden), -1, self.qk_head_dim)  # [T, H, nope + rope]
    latent, key_rope = self.kv_a_proj_with_mqa(hidden).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
    half = self.qk_rope_head_dim // 2
    turn = (cos[:, :half], sin[:, :half])
    q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    q_rope = rotate(q_rope, turn[0][:, None], turn[1][:, None], "interleaved")
    kv = torch.cat(
        (self.kv_a_layernorm(latent), rotate(key_rope, *turn, "interleaved")), -1
    )  # [T, kv_lora_rank + rope]
    clean = hidden if ctx.coupled else hidden.detach()
    layer = Layer(self, ctx, (clean, q_latent if ctx.coupled else q_latent.detach(), cos, sin))
    if ctx.mode == "train":
        out = _train(self, layer, torch.cat((q_nope, q_rope), -1), kv)
    else:
        out = _cached(self, layer, q_nope, q_rope, kv)
    layer.finish()
    result = self.o_proj(out.reshape(1, len(hidden), -1))
    return (result, None, None) if hasattr(self, "skip_topk") else (result, None)


def _train(module: Any, layer: Layer, q: Tensor, kv: Tensor) -> Tensor:
    """q [T, H, nope + rope], kv [T, kv_lora_rank + rope] -> [T, H, v], in MHA form."""
    layer.prepare_loss()
    selection = layer.select()
    k, v = expand(module, kv)
    out, lse = attend(q, k, v, layer.ctx.cu_seqlens, selection, module.scaling)
    layer.observe(q, k, v, out, lse, selection, module.scaling)
    return out


@torch.no_grad()
def _cached(module: Any, layer: Layer, q_nope: Tensor, q_rope: Tensor, kv: Tensor) -> Tensor:
    ctx, scale = layer.ctx, module.scaling
    pages = ctx.cache.k[layer.index]  # [pages, page, kv_lora_rank + rope]
    write_pages(pages, ctx.slot_mapping, kv)
    layer.write_keys()
    selection = layer.select()
    if ctx.mode == "decode":
        q = absorb(module, q_nope, q_rope)
        latent = ops.mla_decode(q, pages, module.kv_lora_rank, ctx.block_table, ctx.seq_lens, selection, scale)[0]
        return lift(module, latent)
    if absorbed_pays(ctx, layer):
        q = absorb(module, q_nope, q_rope)
        where = (ctx.cu_seqlens, ctx.block_table, ctx.seq_lens)
        return lift(module, ops.mla_prefill(q, pages, module.kv_lora_rank, *where, selection, scale)[0])
    q = torch.cat((q_nope, q_rope), -1)
    if ctx.fresh:
        k, v = expand(module, kv)
        return attend(q, k, v, ctx.cu_seqlens, selection, scale)[0]
    return _prefill_expanded(module, q, pages, ctx, selection)


def absorbed_pays(ctx: ForwardContext, layer: Layer) -> bool:
    """Whether a prefill's average context is long enough, per top_k, for the absorbed form; dense layers stay in MHA form."""
    if not layer.sparse:
        return False
    average = ctx.max_seq_len - len(ctx.positions) / (
        2 * len(ctx.seq_lens)
    )  # exact for one sequence, and nothing is read back
    return average > ABSORBED_PAYS * layer.top_k


def expand(module: Any, kv: Tensor) -> tuple[Tensor, Tensor]:
    """kv [..., kv_lora_rank + rope] -> keys [..., H, nope + rope] and values [..., H, v]."""
    latent, rope = kv.split([module.kv_lora_rank, module.qk_rope_head_dim], -1)
    both = module.kv_b_proj(latent).unflatten(-1, (module.num_heads, -1))  # [..., H, nope + v]
    k_nope, v = both.split([module.qk_nope_head_dim, module.v_head_dim], -1)
    shared = rope[..., None, :].expand(*k_nope.shape[:-1], -1)
    return torch.cat((k_nope, shared), -1), v


def absorb(module: Any, q_nope: Tensor, q_rope: Tensor) -> Tensor:
    """q_nope [T, H, nope], q_rope [T, H, rope] -> queries of the latents themselves [T, H, kv_lora_rank + rope]."""
    w_uk = _up_weights(module)[:, : module.qk_nope_head_dim]  # [H, nope, kv_lora_rank]
    return torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_rope), -1)


def lift(module: Any, latent: Tensor) -> Tensor:
    """Attended latents [T, H, kv_lora_rank] -> values [T, H, v]."""
    return torch.einsum("thc,hvc->thv", latent, _up_weights(module)[:, module.qk_nope_head_dim :])


def _up_weights(module: Any) -> Tensor:
    return module.kv_b_proj.weight.view(module.num_heads, -1, module.kv_lora_rank)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`ops.sparse_attention` for values of another width than the keys: the narrower side is padded with zeros, the output cut."""
    width = max(q.shape[-1], v.shape[-1])
    out, lse = ops.sparse_attention(_wide(q, width), _wide(k, width), _wide(v, width), cu_seqlens, selection, scale)
    return out[..., : v.shape[-1]], lse


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _prefill_expanded(
    module: Any, q: Tensor, pages: Tensor, ctx: ForwardContext, selection: Selection | None
) -> Tensor:
    """A chunk at the end of its context in MHA form: K and V of the sequences' own pages are expanded for this call."""
    table = ctx.block_table.long()
    k, v = expand(
        module, pages[table.reshape(-1)]
    )  # [n * max_pages, page, H, ...]; unwritten slots hold anything and are not read
    width = max(k.shape[-1], v.shape[-1])
    own = torch.arange(table.numel(), device=table.device, dtype=torch.int32).view(table.shape)
    out = ops.sparse_prefill(
        _wide(q, width), _wide(k, width), _wide(v, width), ctx.cu_seqlens, own, ctx.seq_lens, selection, module.scaling
    )[0]
    return out[..., : module.v_head_dim]
