"""Other people's kernels for the same work, where they can be imported: FlashMLA, DeepGEMM and vLLM's top-k (all inside vLLM's wheel).

Each function returns a callable, or a text that says why there is none. Nothing here is imported unless a benchmark asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _module(*names: str) -> Any:
    """The first of these modules that can be imported, or the reason of the last one."""
    reason = ""
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a missing or broken peer is a line in the table
            reason = f"{name}: {type(error).__name__} {str(error)[:160]}"
    return reason


def flash_mla() -> Any:
    """Module with flash_mla_with_kvcache and get_mla_metadata, or a text."""
    return _module("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")


def flash_mla_sparse(cache: Tensor, indices: Tensor, q: Tensor) -> Callable[[], Any] | str:
    """Sparse decode on the 656-byte cache [pages, page, 656] with physical indices [B, k]; q [B, H, 576]."""
    module = flash_mla()
    if isinstance(module, str):
        return module
    meta, _ = module.get_mla_metadata()
    view, places, query = cache.view(torch.uint8).unsqueeze(2), indices[:, None], q[:, None]
    return lambda: module.flash_mla_with_kvcache(
        query, view, None, None, 512, meta, is_fp8_kvcache=True, indices=places, softmax_scale=576**-0.5
    )


def flash_mla_dense(cache: Tensor, table: Tensor, lengths: Tensor, q: Tensor) -> Callable[[], Any] | str:
    """Dense decode on a bf16 cache [pages, 64, 576]."""
    module = flash_mla()
    if isinstance(module, str):
        return module
    meta, _ = module.get_mla_metadata()
    return lambda: module.flash_mla_with_kvcache(
        q[:, None], cache.unsqueeze(2), table, lengths, 512, meta, causal=False
    )


def deep_gemm() -> Any:
    return _module("deep_gemm", "vllm.third_party.deep_gemm")


def paged_logits(data: Sequence[Tensor], width: int) -> Callable[[], Any] | str:
    """DeepGEMM's paged fp8 indexer scores. data: q e4m3 [B, H, 128], cache uint8 [pages, 64 * 132], w [B, H], table, lengths."""
    q, cache, w, table, lengths = data
    module = deep_gemm()
    if isinstance(module, str):
        return module
    pages, context = cache.view(len(cache), 64, 1, 132), lengths[:, None].contiguous()
    schedule = module.get_paged_mqa_logits_metadata(
        context, 64, torch.cuda.get_device_properties(0).multi_processor_count
    )
    query = (q[:, None], None)
    return lambda: module.fp8_fp4_paged_mqa_logits(query, pages, w, context, table, schedule, width, clean_logits=False)


def prefill_logits(q: Tensor, keys: Tensor, scales: Tensor, w: Tensor) -> Callable[[], Any] | str:
    """DeepGEMM's prefill scores: q e4m3 [T, H, 128], keys e4m3 [S, 128] with scales [S]; every query sees every key."""
    module = deep_gemm()
    if isinstance(module, str):
        return module
    begins = torch.zeros(len(q), dtype=torch.int32, device=q.device)
    ends = torch.full_like(begins, len(keys))
    return lambda: module.fp8_fp4_mqa_logits((q, None), (keys, scales), w, begins, ends, clean_logits=False)


def top_k(name: str, scores: Tensor, lengths: Tensor, k: int) -> Callable[[], Any] | str:
    """vLLM's "cooperative" (at most 32 rows) or "persistent" top-k: unordered, ties as they come."""
    library = _module("vllm._C_stable_libtorch", "vllm._C")
    if isinstance(library, str):
        return library
    if name == "cooperative" and len(scores) > 32:
        return "takes at most 32 rows"
    call = getattr(torch.ops._C, f"{name}_topk")
    out = torch.empty(len(scores), k, dtype=torch.int32, device=scores.device)
    work = torch.zeros(1 << 20, dtype=torch.uint8, device=scores.device)
    return lambda: call(scores, lengths, out, work, k, scores.shape[1])
