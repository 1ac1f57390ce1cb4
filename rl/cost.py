"""What attention over sets costs and saves, by length: prefill and decode, dense and sparse, and where they break even.

At each length L the cache is filled with random keys and values, so nothing has to be prefilled to get there.

    prefill   the chunk of `chunk` tokens that ends at L, per token: what a token costs at that place, as published curves have it
    decode    one token for each of B sequences of L tokens, per token; B * L is about `decode_tokens`; on a GPU as a CUDA graph, as an
              engine would run it: "graphs" says where that was possible
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from winnow.models.attach import cache_shape, indexer_config
from winnow.models.context import ForwardContext
from winnow.models.forward import hidden_states
from winnow.rollout.cache import PagedCache

MODES = {"dense": "dense", "sparse": "indexer"}


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Tokens. Each figure is the median of `repeats` runs after one that is not counted."""

    lengths: Sequence[int]
    chunk: int = 2048
    decode_tokens: int = 8192
    max_batch: int = 128
    page_size: int = 64
    repeats: int = 5


def default_lengths(device: str, context: int) -> list[int]:
    """2K to 128K on a GPU; on a CPU 256 to 1024, and never more than the model's context there: a figure must not take minutes."""
    if device.startswith("cuda"):
        return [2048 << i for i in range(7)]
    return [length for length in (256, 512, 1024) if length <= context]


def default_cost(device: str, lengths: Sequence[int]) -> CostOptions:
    """Sizes that fill a GPU, or that a CPU can bear."""
    if device.startswith("cuda"):
        return CostOptions(lengths=lengths, decode_tokens=1 << 19)
    return CostOptions(lengths=lengths, chunk=128, decode_tokens=2048, repeats=2)


@torch.no_grad()
def cost_curves(model: Any, options: CostOptions) -> dict[str, Any]:
    """{"lengths", "prefill": {"dense": [µs per token], "sparse": [..]}, "decode": {...}, "batch": [..], "top_k", "break_even": {...}}."""
    shape = indexer_config(model)
    assert shape is not None, "cost is compared on a converted model"
    result: dict[str, Any] = {
        "lengths": list(options.lengths),
        "top_k": shape.top_k,
        "batch": [],
        "chunk": [],
        "graphs": [],
    }
    result |= {kind: {name: [] for name in MODES} for kind in ("prefill", "decode")}
    for length in options.lengths:
        print(f"cost at {length} tokens", file=sys.stderr, flush=True)
        for kind in ("prefill", "decode"):
            wanted = options.decode_tokens // length if kind == "decode" else 1
            batch = max(1, min(options.max_batch, wanted))
            tokens = 1 if kind == "decode" else min(options.chunk, length)
            cache, table = _filled_cache(model, batch, length, options.page_size)
            for name, selector in MODES.items():
                run = _runner(model, cache, table, batch, length, tokens, kind, selector)
                if kind == "decode" and table.is_cuda:
                    run, graphed = _graphed(run)
                    result["graphs"].append(graphed)
                result[kind][name].append(_seconds(run, options.repeats, str(table.device)) * 1e6 / (batch * tokens))
            result["batch" if kind == "decode" else "chunk"].append(batch if kind == "decode" else tokens)
            del cache
    result["break_even"] = {kind: break_even(options.lengths, result[kind]) for kind in ("prefill", "decode")}
    return result


def break_even(lengths: Sequence[int], curves: dict[str, list[float]]) -> int | None:
    """The smallest measured length from which on sparse never costs more than dense; None where dense wins at the longest."""
    found = None
    for length, dense, sparse in reversed(list(zip(lengths, curves["dense"], curves["sparse"], strict=True))):
        if sparse > dense:
            break
        found = length
    return found


def _filled_cache(model: Any, batch: int, length: int, page: int) -> tuple[PagedCache, Tensor]:
    weight = next(model.parameters())
    pages = -(-length // page)
    cache = PagedCache(
        **cache_shape(model), num_pages=batch * pages, page_size=page, dtype=weight.dtype, device=weight.device
    )
    for store in (*cache.k, *cache.v, *cache.index.values()):
        store.normal_()
    return cache, torch.arange(batch * pages, dtype=torch.int32, device=weight.device).view(batch, pages)


def _runner(
    model: Any, cache: PagedCache, table: Tensor, batch: int, length: int, tokens: int, mode: str, selector: str
) -> Callable[[], object]:
    device, page = table.device, cache.page_size
    positions = torch.arange(length - tokens, length, device=device).repeat(batch)
    owner = torch.arange(batch, device=device).repeat_interleave(tokens)
    slots = table[owner, positions // page].long() * page + positions % page
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch * tokens,), generator=generator).to(device)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    bounds = (torch.arange(batch + 1, device=device) * tokens).to(torch.int32)

    ctx = ForwardContext(
        mode=mode, positions=positions, cu_seqlens=bounds, seq_lens=lengths, block_table=table, slot_mapping=slots, cache=cache,
        selector=selector,
    )  # fmt: skip
    return lambda: hidden_states(model, ids, ctx)


def _graphed(run: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """`run` as a CUDA graph, or as it is where it cannot be captured; whether it was."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles what compiles on its first call
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"decode runs without a CUDA graph: {str(error)[:200]}", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def _seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for turn in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        if turn:
            times.append(time.perf_counter() - begin)
    return median(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
