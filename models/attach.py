"""DSA inside a dense Hugging Face model: indexers attached beside `self_attn`, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from winnow.models.attention import NAME, give_indexer_its_input, register
from winnow.models.indexer import Indexer, IndexerConfig
from winnow.models.native import check_native, is_native, latent_width, native_indexer_config, open_native
from winnow.models.training import fuse, separate

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
MARK = ".self_attn.indexer."  # every indexer tensor's name has it, no other tensor's does
_HOOK = "_winnow_hook"


def check_family(config: Any) -> None:
    """Raise ValueError, with the reason, for a model that this attention would compute wrongly."""
    kind = getattr(config, "model_type", "unknown")
    if is_native(config):
        return check_native(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model type {kind!r} is an encoder-decoder: DSA needs a causal decoder; use one of {FAMILIES}"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    if kind not in FAMILIES:
        architectures = getattr(config, "architectures", None) or []
        causal = any("CausalLM" in name or "LMHead" in name for name in architectures) or getattr(
            config, "is_decoder", False
        )
        if not causal and kind in (
            "bert",
            "roberta",
            "distilbert",
            "electra",
            "albert",
            "deberta",
            "deberta-v2",
            "modernbert",
            "vit",
        ):
            raise ValueError(
                f"model type {kind!r} is an encoder: it attends both ways, DSA needs a causal decoder; use one of {FAMILIES}"
            )
        if not rope:
            raise ValueError(
                f"model type {kind!r} has no rotary position embedding, which the indexer shares; use one of {FAMILIES}"
            )
        raise ValueError(f"model type {kind!r} is not supported: the families known to work are {', '.join(FAMILIES)}")
    if not rope:
        raise ValueError(
            f"this {kind} model has no rotary position embedding (rope_parameters is empty), which the indexer shares"
        )
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds or (kind == "mistral" and window is not None):
        raise ValueError(
            f"this {kind} model uses sliding-window attention (sliding_window={window}): a query cannot see its whole context, so an "
            "indexer over it makes no sense. If the contexts you use are shorter, set sliding_window to null in its config.json"
        )


def attach(model: Any, config: IndexerConfig) -> Any:
    """Give every layer an indexer (random weights) and write `config` to model.config.winnow. Changes and returns the model."""
    check_family(model.config)
    if is_native(model.config):
        raise ValueError(
            f"a {model.config.model_type} model is born with indexers: open it with load, and train it as it is"
        )
    if is_converted(model):
        raise ValueError("this model has indexers already: strip it first, or convert the original model")
    if config.leaders and config.leaders[-1] >= model.config.num_hidden_layers:
        raise ValueError(
            f"indexer.leaders names layer {config.leaders[-1]}, but the model's layers are 0 to {model.config.num_hidden_layers - 1}"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.top_k > context:
        raise ValueError(
            f"indexer.top_k is {config.top_k}, larger than the model's context of {context} tokens: every set would be the whole context; "
            "set a top_k well below the lengths you train on"
        )
    _check_rope(model, config)
    use_winnow_attention(model)
    device = next(model.parameters()).device
    for index, layer in enumerate(_layers(model)):
        leader = config.leader_of(index)
        layer.self_attn.winnow_served = (leader, config.last_served(leader, model.config.num_hidden_layers))
        if leader != index:
            continue
        indexer = Indexer(model.config.hidden_size, config).to(device)
        for linear in (indexer.wq, indexer.wk, indexer.ww):
            nn.init.normal_(linear.weight, std=model.config.hidden_size**-0.5)
        layer.self_attn.indexer = indexer
        handle = layer.self_attn.register_forward_pre_hook(give_indexer_its_input, with_kwargs=True)
        object.__setattr__(layer.self_attn, _HOOK, handle)
    model.config.winnow = config.to_dict()
    return model


def _check_rope(model: Any, config: IndexerConfig) -> None:
    if config.rope_dim == 0:
        return
    width = 2 * model.get_decoder().rotary_emb.inv_freq.shape[0]
    if config.rope_dim > width or width % config.rope_dim:
        raise ValueError(
            f"indexer.rope_dim is {config.rope_dim}, but it must divide the model's {width} rotary dims, whose angles it shares"
        )


def use_winnow_attention(model: Any) -> None:
    """Route every layer's attention through `winnow_attention` (dense where there is no indexer), or a native model's through its own."""
    check_family(model.config)
    register()
    if is_native(model.config):
        open_native(model)
    model.set_attn_implementation(NAME)
    fuse(model)


def strip(model: Any) -> Any:
    """Take the indexers off: what is left is a plain dense transformers model, with sdpa attention."""
    if is_native(model.config):
        raise ValueError(f"a {model.config.model_type} model has no dense form: its indexers belong to the checkpoint")
    separate(model)
    for layer in _layers(model):
        if hasattr(layer.self_attn, "winnow_served"):
            del layer.self_attn.winnow_served
        if hasattr(layer.self_attn, "indexer"):
            del layer.self_attn.indexer
            getattr(layer.self_attn, _HOOK).remove()
            object.__delattr__(layer.self_attn, _HOOK)
    if hasattr(model.config, "winnow"):
        del model.config.winnow
    model.set_attn_implementation("sdpa")
    return model


def is_converted(model: Any) -> bool:
    """Whether the model has indexers, attached or its own."""
    return any(getattr(layer.self_attn, "indexer", None) is not None for layer in _layers(model))


def indexer_config(model: Any) -> IndexerConfig | None:
    """The indexers' shape, None for a dense model."""
    if is_native(model.config):
        return native_indexer_config(model.config)
    return IndexerConfig.from_dict(model.config.winnow) if is_converted(model) else None


def cache_shape(model: Any) -> dict[str, Any]:
    """What `rollout.cache.PagedCache` needs to know of a model, by the names of its arguments.

    Indexer keys are kept in the model's own dtype: what is compared is rounded the same way in training (`indexer.rounded`).
    """
    config, indexer = model.config, indexer_config(model)
    heads = config.num_attention_heads
    layers = range(config.num_hidden_layers)
    shape = {
        "num_layers": len(layers),
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "index_dim": indexer.head_dim if indexer else 0,
        "index_layers": [i for i in layers if indexer.leader_of(i) == i] if indexer else [],
        "index_dtype": model.dtype if model.dtype.itemsize < 4 else torch.float32,  # as `rounded` leaves the keys
    }
    return shape | {"latent_dim": latent_width(config)} if is_native(config) else shape


def is_indexer_name(name: str) -> bool:
    return MARK in name


def indexer_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if is_indexer_name(name)}


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Every parameter that is not an indexer's; tied ones once."""
    return {name: p for name, p in model.named_parameters() if not is_indexer_name(name)}


def freeze(parameters: dict[str, nn.Parameter]) -> None:
    """requires_grad False, gradients dropped. Leave them out of the optimizer too: AdamW's decay shrinks a parameter without gradient."""
    for p in parameters.values():
        p.requires_grad_(False)
        p.grad = None


def unfreeze(parameters: dict[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.requires_grad_(True)


def trainable(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What belongs in an optimizer."""
    return {name: p for name, p in parameters.items() if p.requires_grad}


def indexer_calls(model: Any) -> int:
    """How often the model's indexers have scored queries."""
    return sum(module.calls for module in model.modules() if isinstance(module, Indexer))


def indexer_state(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in indexer_parameters(model).items()}


def load_indexer_state(model: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Copy indexer tensors in; every name and shape must match, or ValueError names the first that does not."""
    wanted = indexer_parameters(model)
    missing, strange = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or strange:
        raise ValueError(
            f"{where}: the indexer weights do not match what config.json says of them: {len(missing)} missing "
            f"{missing[:3]}, {len(strange)} unexpected {strange[:3]}; the folder is incomplete or was edited: convert again"
        )
    with torch.no_grad():
        for name, p in wanted.items():
            if p.shape != tensors[name].shape:
                raise ValueError(
                    f"{where}: {name} is {tuple(tensors[name].shape)}, config.json says {tuple(p.shape)}: convert again"
                )
            p.copy_(tensors[name])


def _layers(model: Any) -> Iterator[Any]:
    yield from model.get_decoder().layers
