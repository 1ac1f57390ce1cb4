"""Chunked prefill on a GPU: packed queries at the end of their paged contexts, with the tiles of sparse_prefill.py.

Over sets nothing is gathered: the lists name each key by its slot in the cache. Dense tiles take neighbouring keys, so there K and V of the
contexts are laid side by side first. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.key_lists import key_lists, query_blocks
from winnow.kernels.selection import Selection
from winnow.kernels.sparse_prefill import check_shapes, forward_piece, plan_for


def context_slots(block_table: Tensor, seq_lens: Tensor, page: int) -> Tensor:
    """Slots of every context's positions, one context after the other: int64 [sum of seq_lens]."""
    lengths = seq_lens.tolist()
    device = block_table.device
    place = torch.cat([torch.arange(n, device=device) for n in lengths])
    owner = torch.arange(len(lengths), device=device).repeat_interleave(
        seq_lens.to(device).long(), output_size=sum(lengths)
    )
    return block_table[owner, place // page].long() * page + place % page


def paged_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens: Tensor, block_table: Tensor, seq_lens: Tensor, selection: Selection | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `ops.sparse_prefill`: q [T, H, D], caches [pages, page, Hkv, D] contiguous -> out [T, H, D], lse fp32 [T, H]."""
    slots = context_slots(block_table, seq_lens, k_cache.shape[1])
    keys, values = (cache.view(-1, *cache.shape[2:]) for cache in (k_cache, v_cache))
    if selection is None:
        keys, values = keys[slots], values[slots]
    check_shapes(q, keys, values)
    q = q.contiguous()
    plan = plan_for(q, keys)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for lists in key_lists(query_blocks(cu_seqlens, plan[0], seq_lens), selection):
        if selection is not None:
            listed = lists.keys
            lists.keys.copy_(torch.where(listed >= 0, slots[listed.clamp(min=0).long()].int(), -1))
        forward_piece(q, keys, values, out, lse, lists, scale, plan)
    return out, lse
