"""Models born with DSA: `deepseek_v32` and `glm_moe_dsa` as transformers has them, with indexers that can be trained.

Every tensor keeps its name: `Indexer` below holds the very modules of the checkpoint. What differs from transformers' own forward: ties
in the top-k go to the lowest position (theirs: to whatever torch.topk returns, so an exact-zero plateau gives another set), the indexer
computes in fp32 and has a gradient, sequences may be packed, and no [T, T] mask is built.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from winnow.models.indexer import Indexer, IndexerConfig
from winnow.models.mla import mla_forward
from winnow.models.routing import open_routers, routers

NATIVE = {"deepseek_v32": "half", "glm_moe_dsa": "interleaved"}  # model type -> RoPE layout of its indexer


def is_native(config: Any) -> bool:
    return getattr(config, "model_type", None) in NATIVE


def native_indexer_config(config: Any) -> IndexerConfig:
    """What a native checkpoint's own config says of its indexers."""
    kinds = getattr(config, "indexer_types", None) or ["full"] * config.num_hidden_layers
    if len(kinds) != config.num_hidden_layers or kinds[0] != "full" or set(kinds) - {"full", "shared"}:
        raise ValueError(
            f"indexer_types of this {config.model_type} model is {kinds}, but it needs one of 'full' and 'shared' for each of "
            f"{config.num_hidden_layers} layers, the first one 'full': a shared layer uses the selection of an earlier one"
        )
    return IndexerConfig(
        top_k=config.index_topk,
        num_heads=config.index_n_heads,
        head_dim=config.index_head_dim,
        rope_dim=config.qk_rope_head_dim,
        rope_layout=NATIVE[config.model_type],
        leaders=tuple(i for i, kind in enumerate(kinds) if kind == "full") if "shared" in kinds else (),
    )


def check_native(config: Any) -> None:
    """Raise ValueError, with the reason, for a native checkpoint that cannot be trained as it is."""
    native_indexer_config(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"this {config.model_type} checkpoint is quantized ({config.quantization_config.get('quant_method', 'unknown method')}): its "
            "weights cannot be trained; dequantize it to bf16 first"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError("attention_dropout is not supported: set it to 0 in config.json")


class NativeIndexer(Indexer):
    """The checkpoint's indexer: queries from the normalised q latent, keys and head weights from the hidden states. fp32 throughout."""

    def __init__(self, native: Any, config: IndexerConfig):
        nn.Module.__init__(self)
        self.config, self.calls = config, 0
        self.wq_b, self.wk = native.wq_b.float(), native.wk.float()
        self.k_norm, self.weights_proj = native.k_norm.float(), native.weights_proj.float()

    def _together(self, hidden: Tensor) -> None:
        """Its products read different things."""

    def keys(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        """hidden [T, C], q_latent [T, q_lora_rank], cos and sin [T, rope] -> [T, D_I]."""
        _, cos, sin = rest
        return self._turned(self.k_norm(self.wk(hidden.float()))[:, None], hidden, cos, sin)[:, 0]

    def queries(self, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, C], q_latent [T, q_lora_rank], cos and sin [T, rope] -> q [T, H_I, D_I], w [T, H_I]."""
        self.calls += 1
        q_latent, cos, sin = rest
        q = self.wq_b(q_latent.float()).view(-1, self.config.num_heads, self.config.head_dim)
        w = self.weights_proj(hidden.float()) * (self.config.num_heads * self.config.head_dim) ** -0.5
        return self._turned(q, hidden, cos, sin), w


def open_native(model: Any) -> Any:
    """Replace forwards of attention and routers, and the indexers; weights and their names stay. Changes and returns the model."""
    check_native(model.config)
    config = native_indexer_config(model.config)
    layers = model.get_decoder().layers
    open_routers(model)
    behind = routers(model)
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        if attention.indexer is not None:
            attention.indexer = NativeIndexer(attention.indexer, config)
        leader = config.leader_of(index)
        attention.winnow_served = (leader, config.last_served(leader, len(layers)))
        attention.winnow_router = (behind[index],) if index in behind else ()  # a tuple: no submodule of the attention
        attention.forward = MethodType(mla_forward, attention)
    return model


def latent_width(config: Any) -> int:
    """Numbers a token takes in the cache of one layer: kv_lora_rank + rope, 576 in V3.2."""
    return int(config.kv_lora_rank + config.qk_rope_head_dim)
