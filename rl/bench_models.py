"""`winnow bench cost | warmup | memory`: figures of whole models with random weights, in the shapes of known ones.

cost     prefill and decode per token, dense and sparse, by length, with the break-even (`cost.py`)
warmup   the streaming KL of a warm-up against one that forms the [L, L] matrices: memory beyond the inputs, and time
memory   one step of each stage of a conversion: the estimate that `winnow convert` prints, and the measured peak
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.models.attach import attach, use_winnow_attention
from winnow.models.context import train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import IndexerConfig
from winnow.rl import memory
from winnow.rl.convert_data import pack
from winnow.rl.cost import cost_curves, default_cost
from winnow.rl.stages import sparse_stage, warm_up

GIB = 1 << 30
VOCAB = 1024  # of the cost models: the head is not what is compared
# name -> (family, config, indexer); layers may be cut with --layers
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "tiny": ("qwen3", {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                       "num_hidden_layers": 2}, {"top_k": 64, "num_heads": 4, "head_dim": 32, "rope_dim": 16}),
    "small": ("qwen3", {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
                        "num_hidden_layers": 8}, {"top_k": 256, "num_heads": 4, "head_dim": 64, "rope_dim": 32}),
    "tiny-mla": ("deepseek_v32", {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
                                  "num_hidden_layers": 2, "kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 16,
                                  "qk_nope_head_dim": 32, "v_head_dim": 32, "index_topk": 64, "index_head_dim": 32, "index_n_heads": 4,
                                  "first_k_dense_replace": 99}, {}),
    "qwen3-0.6b": ("qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
                             "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151936, "tie_word_embeddings": True},
                   {"top_k": 2048, "num_heads": 16, "head_dim": 64, "rope_dim": 32}),
    "qwen3-1.7b": ("qwen3", {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
                             "head_dim": 128, "num_hidden_layers": 28}, {"top_k": 2048, "num_heads": 16, "head_dim": 64, "rope_dim": 32}),
    "smollm2-135m": ("llama", {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                               "head_dim": 64, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True},
                     {"top_k": 2048, "num_heads": 4, "head_dim": 32, "rope_dim": 16}),
    "v3.2": ("deepseek_v32", {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
                              "num_hidden_layers": 4, "first_k_dense_replace": 99}, {}),
}  # fmt: skip


def random_model(
    name: str, layers: int | None, dtype: torch.dtype, device: str, dense: bool = False, changes: Mapping[str, Any] | None = None,
    indexer_changes: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A model of that shape with random weights and indexers (`dense`: without, where it is not native), at contexts up to 1M tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown: the shapes are {', '.join(SHAPES)}")
    family, shape, indexer = SHAPES[name]
    classes = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    if family == "deepseek_v32":  # only newer transformers have it
        from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

        classes[family] = (DeepseekV32Config, DeepseekV32ForCausalLM)
    config_class, model_class = classes[family]
    values = {"vocab_size": VOCAB, "max_position_embeddings": 1 << 20, **shape, **(changes or {})}
    if layers:
        values["num_hidden_layers"] = layers
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = model_class(config_class(**values)).eval()
    finally:
        torch.set_default_dtype(before)
    if family == "deepseek_v32" or dense:
        use_winnow_attention(model)
        return model
    return attach(model, IndexerConfig.from_dict({**indexer, **(indexer_changes or {})}))


def bench_cost(
    shape: str, lengths: Sequence[int], layers: int | None, device: str, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    model = random_model(shape, layers, dtype, device)
    options = dataclasses.replace(default_cost(device, lengths), repeats=repeats)
    about = {"shape": shape, "layers": model.config.num_hidden_layers, "dtype": str(dtype)}
    return about | cost_curves(model, options)


def bench_warmup(lengths: Sequence[int], device: str, dtype: torch.dtype, repeats: int, heads: tuple[int, int, int] = (16, 8, 128),
                 indexer: tuple[int, int] = (16, 64)) -> dict[str, Any]:  # fmt: skip
    """One layer's dense KL, forward and backward, both ways. heads: query heads, kv heads, width; indexer: heads, width."""
    rows = []
    for length in lengths:
        inputs = _kl_inputs(length, device, dtype, heads, indexer)
        row: dict[str, Any] = {"length": length}
        for name, loss in (("streaming", _streaming), ("materialising", _materialising)):
            try:
                row[name] = _timed(partial(loss, *inputs), device, repeats)
            except torch.OutOfMemoryError:
                row[name] = {"out_of_memory": True}
        rows.append(row)
    return {"heads": heads, "indexer": indexer, "dtype": str(dtype), "rows": rows}


def _kl_inputs(
    length: int, device: str, dtype: torch.dtype, heads: tuple[int, int, int], indexer: tuple[int, int]
) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=kind)

    q, k, w = draw(length, *indexer, kind=dtype), draw(length, indexer[1], kind=dtype), draw(length, indexer[0])
    attn_q, attn_k = draw(length, heads[0], heads[2], kind=dtype), draw(length, heads[1], heads[2], kind=dtype)
    cu = torch.tensor([0, length], dtype=torch.int32, device=device)
    lse = ops.sparse_attention(attn_q, attn_k, attn_k, cu, None, heads[2] ** -0.5)[1]
    return *(x.requires_grad_() for x in (q, k, w)), attn_q, attn_k, lse, cu


def _streaming(q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu: Tensor) -> Tensor:
    return ops.indexer_kl(q, k, w, attn_q, attn_k, lse, cu, None, attn_q.shape[-1] ** -0.5, None)[0]


def _materialising(q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu: Tensor) -> Tensor:
    """The same loss as plain torch writes it: scores and target whole, autograd keeping what it wants; a head at a time, or no GPU holds it."""
    causal = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
    scores = torch.zeros(len(q), len(q), device=q.device)
    for head in range(q.shape[1]):
        scores = scores + w[:, head, None] * torch.relu(q[:, head].float() @ k.float().T)
    log_model = torch.log_softmax(scores.masked_fill(~causal, -torch.inf), -1)
    with torch.no_grad():
        target = torch.zeros_like(scores)
        group = attn_q.shape[1] // attn_k.shape[1]
        for head in range(attn_q.shape[1]):
            logits = (attn_q[:, head].float() @ attn_k[:, head // group].float().T) * attn_q.shape[-1] ** -0.5
            target += torch.exp(logits.masked_fill(~causal, -torch.inf) - lse[:, head, None])
        target /= target.sum(-1, keepdim=True)
    return (torch.xlogy(target, target) - target * log_model.masked_fill(~causal, 0.0)).sum()


def _timed(loss: Callable[[], Tensor], device: str, repeats: int) -> dict[str, Any]:
    times, value = [], 0.0
    for turn in range(repeats + 1):
        _settle(device)
        begin = time.perf_counter()
        out = loss()
        out.backward()
        value = float(out.detach())
        _settle(device)
        if turn:
            times.append(time.perf_counter() - begin)
    figures: dict[str, Any] = {"seconds": sorted(times)[len(times) // 2], "kl": value}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        loss().backward()
        figures["gib_beyond_inputs"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return figures


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def bench_memory(
    shape: str, length: int, layers: int | None, device: str, dtype: torch.dtype, checkpointing: bool
) -> dict[str, Any]:
    """One warm-up step and two sparse steps (AdamW has its state from the second on) of one sequence of `length` random tokens."""
    from winnow.rl.convert_options import ConvertOptions

    before = 0 if device.startswith("cuda") else _process_bytes(shape)
    model = random_model(shape, layers, dtype, device)
    options = ConvertOptions(
        top_k=int(model.config.winnow["top_k"]) if hasattr(model.config, "winnow") else model.config.index_topk, seq_len=length,
        warmup_batches=1, warmup_tokens=length, warmup_micro=length, warmup_passes=1, sparse_steps=2, sparse_tokens=length,
        checkpointing=checkpointing, device=device,
    )  # fmt: skip
    estimate = memory.conversion_memory(model, options)
    generator = torch.Generator().manual_seed(0)
    sequence = torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
    result: dict[str, Any] = {
        "shape": shape,
        "layers": model.config.num_hidden_layers,
        "length": length,
        "dtype": str(dtype),
    }
    for name, stage in (("warm-up", warm_up), ("sparse", sparse_stage)):
        memory.reset_peak(device)
        begin = time.perf_counter()
        stage(model, iter([pack([sequence])] * 2), options, lambda text: None)
        _settle(device)
        peak, total = memory.measured_peak(device) - before, sum(estimate[name].values())
        ratio = (
            total / peak if peak > 0 else None
        )  # a CPU process that has held more before shows no peak of this one's
        result[name] = {"estimate_gib": total / GIB, "peak_gib": peak / GIB, "estimate_over_peak": ratio,
                        "parts": estimate[name], "seconds": time.perf_counter() - begin}  # fmt: skip
    return result


def _process_bytes(shape: str) -> int:
    """What the process holds once every module is imported and a step has run, on a model that takes next to nothing."""
    model = random_model("tiny-mla" if SHAPES[shape][0] == "deepseek_v32" else "tiny", None, torch.float32, "cpu")
    loss = hidden_states(model, torch.zeros(100, dtype=torch.int64), train_context([100])).sum()
    loss.backward()
    return memory.measured_peak("cpu")


def measure_models(what: str, arguments: Any) -> dict[str, Any]:
    """The figures of `winnow bench cost | warmup | memory` by its parsed arguments."""
    device = arguments.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.set_num_threads(arguments.threads)
    on_gpu = device.startswith("cuda")
    lengths = arguments.lengths or (
        [2048 << i for i in range(7)] if on_gpu and what == "cost" else [32768] if on_gpu else [256, 512]
    )
    repeats = 5 if on_gpu else 2
    figures: dict[str, Any] = {
        "bench": what,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    if what == "cost":
        shape = arguments.model or ("qwen3-1.7b" if on_gpu else "tiny")
        return figures | bench_cost(shape, lengths, arguments.layers, device, dtype, repeats)
    if what == "warmup":
        return figures | (bench_warmup(lengths, device, dtype, repeats) if on_gpu else
                          bench_warmup(lengths, device, dtype, repeats, (4, 2, 16), (4, 16)))  # fmt: skip
    shape = arguments.model or ("qwen3-0.6b" if on_gpu else "tiny")
    return figures | bench_memory(shape, lengths[0], arguments.layers, device, dtype, checkpointing=on_gpu)
