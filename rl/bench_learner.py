"""`winnow bench learner`: one training step of a long sequence on a model of a known shape with random weights.

    winnow bench learner --model qwen3-1.7b --device cuda --lengths 32768

Rows: dense on this project's tiles, dense as torch does it (the one that sparse must beat), sparse with a frozen indexer, sparse with its
KL. Each is a whole `Learner.step` (forward, backward with recomputed layers, clip,
AdamW) in bf16 on fp32 masters, every token trained; `parts` is the device's time by what its kernels do. On a GPU the allocator's own
record is searched for a tensor of [tokens, vocabulary] or [length, length]: there must be none. `workspace_gib` is the one buffer whose
size is a constant, the shares of a slice of the backward.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.models.attach import attach, use_winnow_attention
from winnow.models.indexer import IndexerConfig
from winnow.models.training import separate
from winnow.rl import memory
from winnow.rl.bench_models import SHAPES
from winnow.rl.config import make_config
from winnow.rl.learner import Learner

VOCABULARY = 151_936  # Qwen3's: a head of full size, since the head is part of what is shown
GIB = 1 << 30
ROWS = {
    "dense": {"selector": "dense", "train": "frozen"},
    "dense, SDPA": {"selector": "dense", "train": "frozen", "attention": "sdpa"},
    "sparse, indexer frozen": {"selector": "indexer", "train": "frozen"},
    "sparse, indexer kl": {"selector": "indexer", "train": "kl"},
}
PARTS = {  # names of kernels, first match wins
    "indexer scores": ("_prefill", "_decode"),
    "top-k": ("_select", "_maxima", "_select_short"),
    "indexer KL": ("_compare", "_normalise", "_query_gradient", "_key_gradient", "_scores"),
    "lists": ("_mark", "_union", "_fill"),
    "attention forward": ("_forward",),
    "attention backward": ("_backward", "_sum_rows"),
    "head": ("_fold", "_slope"),
    "attention of SDPA": ("flash", "sdpa", "fmha"),
    "matmul": ("gemm", "cutlass", "nvjet", "xmma", "splitKreduce", "cublas"),
    "AdamW": ("adam", "multi_tensor"),
    "copies": ("Memcpy", "Memset", "copy_"),
}


def bench_learner(
    shape: str,
    lengths: Sequence[int],
    device: str,
    layers: int | None = None,
    rows: Iterable[str] = ROWS,
    repeats: int = 3,
    progress: Callable[[str], object] = lambda text: None,
    keep: Callable[[dict[str, Any]], object] = lambda figures: None,
) -> dict[str, Any]:
    """Figures of each length and row. Times in seconds, memory in GiB; a row that failed its check has "wrong", one that had no room
    "failed". `keep` takes the figures so far after each row: what is measured is not lost where a later row is."""
    figures: dict[str, Any] = {
        "bench": "learner", "shape": shape, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for name in rows:
        learner = make_learner(shape, device, layers, **ROWS[name])
        figures.setdefault("parameters", sum(p.numel() for p in learner.model.parameters()))
        for length in lengths:
            try:
                found.append({"row": name, **measure(learner, length, repeats)})
            except torch.OutOfMemoryError as error:
                learner.optimizer.zero_grad()
                found.append({"row": name, "length": length, "failed": str(error)[:300]})
            progress(json.dumps(found[-1]))
            keep(figures | {"figures": {"rows": found}})
        del learner
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return figures | {"figures": {"rows": found}}


def make_learner(
    shape: str, device: str, layers: int | None, selector: str, train: str, attention: str = ""
) -> Learner:
    """A learner around a model of that shape, made on the device: no folder is written or read. attention: transformers' own, by name."""
    gpu = device.startswith("cuda")
    dtype = "bfloat16" if gpu else "float32"
    config = make_config(
        {
            "model": {"path": shape, "dtype": dtype},
            "domains": [{"name": "bench", "source": "bench"}],
            "learner": {"lr": 1e-6, "checkpointing": True, "threads": torch.get_num_threads(), "micro_tokens": 1 << 20},
            "indexer": {"selector": selector, "train": train},
            "cluster": {"learner_gpus": 1.0 if gpu else 0.0},
        }
    )
    learner = Learner(config)
    learner.device, learner.tokenizer = "cuda" if gpu else "cpu", None
    learner._adopt(shape_model(shape, layers, getattr(torch, dtype), device, VOCABULARY if gpu else 1024), shape)
    if attention:  # a batch is one sequence: causal, without a mask
        separate(learner.model)  # our layers would call our attention
        learner.model.set_attn_implementation(attention)
    return learner


def shape_model(name: str, layers: int | None, dtype: torch.dtype, device: str, vocabulary: int) -> Any:
    """A Qwen3 of one of `SHAPES`, tied, with random weights and indexers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if SHAPES.get(name, ("",))[0] != "qwen3":
        known = ", ".join(key for key, (family, *_) in SHAPES.items() if family == "qwen3")
        raise ValueError(f"bench learner: shape {name!r} is none of {known}")
    _, values, indexer = SHAPES[name]
    values = {**values, "vocab_size": vocabulary, "max_position_embeddings": 1 << 20, "tie_word_embeddings": True}
    values |= {"num_hidden_layers": layers} if layers else {}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(Qwen3Config(**values))
    finally:
        torch.set_default_dtype(before)
    use_winnow_attention(model)
    return attach(model, IndexerConfig.from_dict(indexer))


def measure(learner: Learner, length: int, repeats: int) -> dict[str, Any]:
    """One row: warm-up, `repeats` steps by the clock, one step under the profiler, one under the allocator's record."""
    vocabulary = int(learner.model.config.vocab_size)
    tokens = np.random.default_rng(0).integers(0, vocabulary, length + 1).astype(np.int32)
    mask = np.arange(length + 1) > 0

    def step() -> None:
        learner.sft_step([(tokens, mask)])
        _settle(learner.device)

    step()
    memory.reset_peak(learner.device)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    row: dict[str, Any] = {
        "length": length, "step_s": round(seconds, 4), "tokens_per_s": round(length / seconds, 1),
        "peak_gib": round(memory.measured_peak(learner.device) / GIB, 3),
    }  # fmt: skip
    if learner.device == "cpu":
        return row
    row |= {"parts_s": parts(step)}
    sizes, made = forbidden(learner, length, vocabulary), allocations(step)
    own = {parameter_bytes(p.numel()) for p in learner.model.parameters()}
    shares = [size for size, where in made if is_workspace(size, where)]
    row["workspace_gib"] = round(max(shares, default=0) / GIB, 3)
    others = [
        size for size, where in made if not (any(size in sizes_of for sizes_of in own) or is_workspace(size, where))
    ]
    row["largest_gib"] = round(max(others, default=0) / GIB, 3)
    row["forbidden_gib"] = {name: round(size / GIB, 3) for name, size in sizes.items()}
    above = {name: size for name, size in sizes.items() if max(others, default=0) >= size}
    return row | ({"wrong": f"an allocation of {max(others)} bytes is as large as {above}"} if above else {})


def forbidden(learner: Learner, length: int, vocabulary: int) -> dict[str, int]:
    """Bytes of the tensors that must not exist, in the smallest dtype each could have."""
    return {"[tokens, vocabulary] bf16": 2 * length * vocabulary, "[length, length] bool": length * length}


def parameter_bytes(count: int) -> frozenset[int]:
    """What the allocator makes of a tensor of a parameter's shape, in bf16 and fp32: rounded up to 512 bytes."""
    return frozenset(-(-count * size // 512) * 512 for size in (2, 4))


def allocations(step: Callable[[], None]) -> list[tuple[int, str]]:
    """Of everything that one step allocates on the GPU, from the allocator's record: bytes, and the function that asked, "file:name"."""
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=1_000_000)
    try:
        step()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    events = [event for trace in traces for event in trace if event["action"] == "alloc"]
    return sorted({(int(event["size"]), asked_by(event.get("frames", []))) for event in events}, reverse=True)


def asked_by(frames: Sequence[Mapping[str, Any]]) -> str:
    """ "file:function" of the innermost frame that is not torch's."""
    ours = (frame for frame in frames if "/torch/" not in frame["filename"] and frame["filename"].endswith(".py"))
    frame = next(ours, None)
    return f"{Path(frame['filename']).name}:{frame['name']}" if frame else ""


def is_workspace(size: int, where: str) -> bool:
    """The shares of a slice of the backward: as many bytes as it is given, however long the sequence is. Above that it is not one."""
    from winnow.kernels.sparse_backward import PARTS_BYTES  # Triton, which a CPU need not have

    return where == "sparse_backward.py:_backward_slice" and size <= PARTS_BYTES


def parts(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of the device by part of a step; "other" is what no name matches, mostly elementwise kernels of the model."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
    return by_part({event.key: event.self_device_time_total / 1e6 for event in trace.key_averages()})


def by_part(seconds: Mapping[str, float]) -> dict[str, float]:
    """Kernel name -> seconds, summed by `PARTS`, largest first."""
    sums: dict[str, float] = {}
    for kernel, spent in seconds.items():
        part = next((name for name, words in PARTS.items() if any(_matches(word, kernel) for word in words)), "other")
        sums[part] = sums.get(part, 0.0) + spent
    return {name: round(value, 5) for name, value in sorted(sums.items(), key=lambda item: -item[1]) if value}


def _matches(word: str, kernel: str) -> bool:
    """Names of ours are whole and begin with an underscore; those of libraries contain the word."""
    return kernel == word if word.startswith("_") else word.lower() in kernel.lower()


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
