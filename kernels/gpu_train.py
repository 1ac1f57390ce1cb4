"""The training operations on a GPU: which tensors the Triton kernels take, and when the sets are all the identity.

Lengths: where no sequence is longer than k and every set is whole, dense tiles run and no list is made. Above that lists, always: on an
H200 at 16K and k 2048 making them takes 0.8 ms of 14 (forward and backward), the tiles are 2.4 times faster than dense ones with
local sets, and uniform random sets, whose lists hold everything, cost what dense tiles cost. Imports triton inside functions: a
machine without a GPU needs none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels.omission import Omission
from winnow.kernels.packing import longest, on_host
from winnow.kernels.selection import Selection

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(*tensors: Tensor, widest: int = 256) -> bool:
    """Whether the kernels take these: on a GPU, of one dtype they compute in, the last dimension no larger than `widest`."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and all(x.dtype == first.dtype and x.shape[-1] <= widest for x in tensors)
    )


def unless_whole(selection: Selection | None, cu_seqlens: Tensor) -> Selection | None:
    """None where every query takes every position it sees: L <= k and full counts. Looks at the sets only where L <= k."""
    if selection is None:
        return None
    bounds = on_host(cu_seqlens)
    if len(bounds) < 2 or longest(bounds) > selection.k:
        return selection
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    tokens = len(selection.counts)
    origin = cu_seqlens[:-1].repeat_interleave(lengths, output_size=tokens)
    seen = torch.arange(1, tokens + 1, device=origin.device) - origin
    return None if bool((selection.counts == seen).all()) else selection


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    from winnow.kernels import sparse_backward

    return sparse_backward.sparse_attention(q, k, v, cu_seqlens, unless_whole(selection, cu_seqlens), scale)


def indexer_kl(
    q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None,
    scale: float, cost: Omission | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from winnow.kernels import indexer_kl as kernel

    whole = unless_whole(selection, cu_seqlens)
    return kernel.indexer_kl(q, k, w, attn_q, attn_k, lse, cu_seqlens, whole, scale, cost)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, kept: Any | None
) -> tuple[Tensor, Tensor]:
    from winnow.kernels import logprobs

    return logprobs.token_logprobs(hidden, weight, targets, temperature, kept)
