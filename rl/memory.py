"""How much memory a conversion will want, printed before it begins.

What autograd keeps is not guessed: a short forward pass of the loaded model counts the bytes that it saves for its backward, at two
lengths, and the line through them is taken to the length of a step. The rest is arithmetic on the parameters and on the largest
temporaries: tiles of the torch kernels on a CPU, the workspaces of the Triton kernels on a GPU, whose sizes are the constants at the top
of their files. `measured_peak` is what to compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.torch_attention import TILE_BUDGET
from winnow.kernels.torch_logprobs import CHUNK_ELEMENTS
from winnow.models.attach import base_parameters, indexer_config, indexer_parameters
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.stages import last_served
from winnow.rl.teacher import CHUNK

GIB = 1 << 30
PROBE = (64, 128)  # tokens of the two short passes
ROWS = 256  # queries of an attention tile
KL_TILES = 4  # fp32, for each index head: q . k, its gradient, and the temporaries between them
QUERIES = 32  # of a block of the Triton kernels, at least: 128 rows of up to four heads


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
    on_gpu = next(model.parameters()).is_cuda
    stages: dict[str, dict[str, int]] = {}
    if options.warmup_batches:
        one = index_numbers // max(
            1, len(last_served(model))
        )  # an indexer's gradients are gone before the next one's come
        stages["warm-up"] = {
            "weights": weights, "indexers' Adam and gradients": index_numbers * 8 + one * 4 if on_gpu else index_numbers * 12,
            "pass": gpu_warmup_bytes(model, options) if on_gpu
            else _layer_bytes(model, options.warmup_tokens) + _tile_bytes(model, options.seq_len),
        }  # fmt: skip
    if options.sparse_steps:
        trained = [*indexers.values(), *(base.values() if options.sparse_model_lr > 0 else [])]
        activations = activation_bytes(model, options.sparse_tokens, True)
        if options.checkpointing:  # the layers' inputs, and one layer's own
            layers, size = model.config.num_hidden_layers, next(model.parameters()).element_size()
            activations = activations // layers + options.sparse_tokens * model.config.hidden_size * size * layers
        numbers = sum(p.numel() for p in trained)
        masters = sum(p.numel() * 4 for p in trained if p.dtype != torch.float32)
        if on_gpu:
            own = gpu_step_bytes(model, options)
        else:
            tile = _tile_bytes(model, options.seq_len)
            own = _layer_bytes(model, options.sparse_tokens) + _head_bytes(model, options.sparse_tokens) + tile
        fused = numbers * 4 if on_gpu else 0  # one more copy where a step runs over all tensors at once
        stages["sparse"] = {
            "weights": weights, "AdamW": numbers * 8 + masters,
            "step": max(activations + own, _bytes(trained) + masters + fused),
        }  # fmt: skip
        if options.sparse_average:
            stages["sparse"]["mean"] = numbers * 4
        if options.sparse_teacher == "dense":  # a copy, and a chunk's logits of both in fp32 with their gradient
            stages["sparse"]["teacher"] = weights + 6 * 4 * CHUNK * lm_head_weight(model).shape[0]
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
    """On a CPU: the tiles of queries over all keys of the indexer's KL. torch's flash kernel forms none that would be seen."""
    shape = indexer_config(model)
    index_heads = max(2, shape.num_heads) if shape else 0
    rows = max(8, min(ROWS, TILE_BUDGET // max(1, length * max(1, index_heads))))
    return KL_TILES * rows * length * index_heads * 4


@dataclass(frozen=True)
class Widths:
    """Bytes a token: hidden states, queries, keys (values take as much), and the MLP's inner states, in the model's dtype."""

    hidden: int
    queries: int
    keys: int
    inner: int
    size: int  # of a number
    index: int  # numbers: all index heads
    omission: int  # what the target "output" is made of, with its temporaries; 0 for the attention itself

    @classmethod
    def of(cls, model: Any) -> Widths:
        config, shape = model.config, indexer_config(model)
        head = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
        head = head or config.hidden_size // config.num_attention_heads
        size = next(model.parameters()).element_size()
        inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
        return cls(
            hidden=config.hidden_size * size, queries=config.num_attention_heads * head * size,
            keys=config.num_key_value_heads * head * size, inner=inner * size, size=size,
            index=shape.num_heads * shape.head_dim if shape else 0,
            omission=config.num_attention_heads * head * (3 * 4 + size) if shape and shape.target == "output" else 0,
        )  # fmt: skip


def gpu_kl_bytes(x: Widths, tokens: int) -> int:
    """The KL's workspaces: a slice (the next one's is there before the last is freed), and fp32 gradients of the index queries."""
    from winnow.kernels.indexer_kl import SLICE_BYTES

    return 2 * SLICE_BYTES + tokens * x.index * 4


def gpu_warmup_bytes(model: Any, options: ConvertOptions) -> int:
    """One layer of a forward without gradients, the largest of its parts.

    In its attention, where the indexer trains: embedding, the layer's input and the normed one, q, k, v and their contiguous copies, out;
    of a micro batch the indexer's two inputs in fp32, its queries before and after RoPE, the KL. In its MLP: gate, up, act, product.
    """
    x, config = Widths.of(model), model.config
    micro = min(options.warmup_tokens, max(options.warmup_micro, options.seq_len))
    attention = options.warmup_tokens * (4 * x.hidden + 3 * x.queries + 4 * x.keys + x.omission)
    indexer = micro * 4 * (2 * config.hidden_size + 2 * x.index) + gpu_kl_bytes(x, micro)
    mlp = options.warmup_tokens * (4 * x.hidden + 4 * x.inner)
    return max(attention + indexer, mlp)


def gpu_step_bytes(model: Any, options: ConvertOptions) -> int:
    """Beside what autograd holds, the largest of a sparse step: the head, the attention's backward, the KL, the MLP's backward.

    The head's gradient stays through the whole backward.
    """
    from winnow.kernels.key_lists import BITMAP_BYTES
    from winnow.kernels.logprobs import CHUNK_BYTES, CHUNK_VOCABULARY
    from winnow.kernels.sparse_backward import PARTS_BYTES

    x, tokens, weight = Widths.of(model), options.sparse_tokens, lm_head_weight(model)
    hidden = model.config.hidden_size
    head = 3 * CHUNK_BYTES // 2 + 4 * hidden * (tokens + min(CHUNK_VOCABULARY, len(weight)))
    keys = min(options.seq_len, QUERIES * options.top_k)  # of a block's list, at most
    parts = min(PARTS_BYTES, tokens // QUERIES * keys * 2 * x.keys)
    bitmap = min(BITMAP_BYTES, tokens * options.seq_len // 8)
    sums = tokens * 2 * x.keys * 4 // x.size
    attention = (
        parts + bitmap + sums + tokens * (3 * x.queries + 2 * x.keys)
    )  # gradients of out, q and the sum at q; of k and v
    kl = gpu_kl_bytes(x, tokens) + tokens * (
        x.index * 8 + x.omission
    )  # the index queries in fp32, and as they come out of RoPE
    return _bytes([weight]) + max(head, attention, kl, tokens * (4 * x.inner + 2 * x.hidden))


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
