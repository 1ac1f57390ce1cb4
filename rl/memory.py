"""How much memory a conversion will want, printed before it begins.

What autograd keeps is not guessed: a short forward pass of the loaded model counts the bytes that it saves for its backward, at two
lengths, and the line through them is taken to the length of a step. The rest is arithmetic on the parameters and on the largest
temporaries of the kernels. `measured_peak` is what to compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.torch_attention import TILE_BUDGET
from winnow.kernels.torch_logprobs import CHUNK_ELEMENTS
from winnow.models.attach import base_parameters, indexer_config, indexer_parameters
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.convert_options import ConvertOptions

GIB = 1 << 30
PROBE = (64, 128)  # tokens of the two short passes
ROWS = 256  # queries of an attention tile
KL_TILES = 4  # fp32, for each index head: q . k, its gradient, and the temporaries between them
TILES = 5  # fp32 tiles alive at once in the attention's backward: scores, p, their gradients, the expanded keys


def saved_bytes(model: Any, length: int, indexer: bool) -> int:
    """Bytes that autograd keeps for the backward of one sequence of `length` tokens, counted once for each storage."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is counted for two tensors

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    device = next(model.parameters()).device
    watch = IndexerLoss() if indexer else None
    ctx = train_context([length], device, indexer_loss=watch, force_sparse=indexer)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden_states(model, torch.zeros(length, dtype=torch.int64, device=device), ctx)
    return sum(kept.values())


def activation_bytes(model: Any, tokens: int, indexer: bool) -> int:
    """`saved_bytes` at a step's length, from two short passes: all that is kept grows with the tokens, not with their square."""
    short, long = (saved_bytes(model, n, indexer) for n in PROBE)
    each = (long - short) / (PROBE[1] - PROBE[0])
    return int(short + each * (tokens - PROBE[0]))


def conversion_memory(model: Any, options: ConvertOptions) -> dict[str, dict[str, int]]:
    """Stage -> part -> bytes, for the model with its indexers attached.

    Activations go as gradients come, so a step needs the larger of what it holds before its backward and what it holds after.
    """
    base, indexers = base_parameters(model), indexer_parameters(model)
    weights = _bytes([*base.values(), *indexers.values()])
    index_numbers = sum(p.numel() for p in indexers.values())
    tile = _tile_bytes(model, options.seq_len)
    stages: dict[str, dict[str, int]] = {}
    if options.warmup_batches:
        stages["warm-up"] = {
            "weights": weights, "indexers' Adam and gradients": index_numbers * 12,
            "pass": _layer_bytes(model, options.warmup_tokens) + tile,
        }  # fmt: skip
    if options.sparse_steps:
        trained = [*indexers.values(), *(base.values() if options.sparse_model_lr > 0 else [])]
        activations = activation_bytes(model, options.sparse_tokens, True)
        if options.checkpointing:  # the layers' inputs, and one layer's own
            layers, size = model.config.num_hidden_layers, next(model.parameters()).element_size()
            activations = activations // layers + options.sparse_tokens * model.config.hidden_size * size * layers
        numbers = sum(p.numel() for p in trained)
        masters = sum(p.numel() * 4 for p in trained if p.dtype != torch.float32)
        own = _layer_bytes(model, options.sparse_tokens) + _head_bytes(model, options.sparse_tokens) + tile
        fused = numbers * 4 if trained[0].is_cuda else 0  # one more copy where a step runs over all tensors at once
        stages["sparse"] = {
            "weights": weights, "AdamW": numbers * 8 + masters,
            "step": max(activations + own, _bytes(trained) + masters + fused),
        }  # fmt: skip
    return stages


def describe(stages: dict[str, dict[str, int]]) -> list[str]:
    """A line a stage, in GiB."""
    lines = []
    for name, parts in stages.items():
        text = " + ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
        lines.append(f"memory, {name} (estimate): {sum(parts.values()) / GIB:.2f} GiB = {text}")
    return lines


def _bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _tile_bytes(model: Any, length: int) -> int:
    """The largest temporaries of the kernels: tiles of queries over all keys, of the attention and of the indexer's KL."""
    config, shape = model.config, indexer_config(model)
    index_heads = max(2, shape.num_heads) if shape else 0
    rows = max(8, min(ROWS, TILE_BUDGET // max(1, length * max(1, index_heads))))
    kl = KL_TILES * rows * length * index_heads * 4
    if next(model.parameters()).device.type == "cpu":
        return kl  # torch's flash kernel forms no tile that would be seen
    rows = max(8, min(ROWS, TILE_BUDGET // max(1, length)))
    return max(kl, TILES * rows * length * config.num_attention_heads * 4)


def _layer_bytes(model: Any, tokens: int) -> int:
    """One layer's own temporaries: the MLP's, q, k and v with their copies, the indexer's projections with their gradients (fp32)."""
    config, shape = model.config, indexer_config(model)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or hidden // heads
    width = (
        3 * getattr(config, "intermediate_size", 4 * hidden)
        + 6 * hidden
        + 4 * head * (heads + 2 * config.num_key_value_heads)
    )
    projections = 6 * shape.num_heads * shape.head_dim if shape else 0
    return tokens * (width * next(model.parameters()).element_size() + projections * 4)


def _head_bytes(model: Any, tokens: int) -> int:
    """The head works in chunks: a chunk's logits, probabilities and gradient in fp32, and the gradient of its weights."""
    weight = lm_head_weight(model)
    copies = 1 if weight.dtype == torch.float32 else 2
    return 12 * min(CHUNK_ELEMENTS, tokens * weight.shape[0]) + copies * 4 * weight.numel()


def measured_peak(device: str) -> int:
    """Bytes: the most that was allocated on the device since `reset_peak`; on a CPU the most that this process ever held."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
