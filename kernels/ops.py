"""The public operations. Each chooses an implementation by device, shape and length; `reference.py` is what each of them means.

Shared conventions: tokens of several sequences are packed along the first axis, cu_seqlens int32 [n + 1] bounds them; caches are pages
[pages, page, ...] addressed by block_table int32 [n, max_pages]; lse is the natural log-sum-exp over S_t (no sink), -inf where S_t is
empty; selection None means every s <= t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels import gpu_ops, gpu_train, torch_attention, torch_indexer, torch_logprobs, torch_rows
from winnow.kernels.branch import Branch
from winnow.kernels.omission import Omission
from winnow.kernels.selection import Selection, exact_topk

FEW_ROWS = 256  # of a product whose pieces are added up by its reader: with more, they are more to write and read than the weights


def indexer_logits(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q [T, H_I, D_I], k [S, D_I], w [T, H_I] -> fp32 [T, S]: sum over heads, in head order, of w * relu(q . k). No mask.

    Differentiable by torch, which keeps [T, S] for it; `indexer_kl` has a gradient that does not.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, w))
    if not wanted and gpu_ops.takes_index(q, k):
        return gpu_ops.indexer_logits(q, k, w)
    return torch_indexer.logits(q, k, w)


def topk(scores: Tensor, lengths: Tensor, k: int) -> Selection:
    """Exact top-k of scores fp32 [rows, S] among s < lengths[row]: lowest index wins ties, -0 == +0, NaN raises ValueError."""
    if scores.is_cuda and scores.dtype == torch.float32:
        return gpu_ops.topk(scores, lengths, k)
    return exact_topk(scores, lengths, k)


def select_packed(
    q: Tensor | None,
    k: Tensor | None,
    w: Tensor | None,
    cu_seqlens: Tensor,
    positions: Tensor,
    top_k: int,
    selector: str = "indexer",
    faults: Tensor | None = None,
) -> Selection:
    """Causal top-k inside each packed sequence; rows at t < top_k get the identity 0..t.

    q [T, H_I, D_I], k [T, D_I], w [T, H_I] (all None for the floors); positions int64 [T], 0.. in every sequence; selector
    "indexer", a floor: "random" (a fixed hash of the two positions) or "recent" (the last top_k), or "random_ties" (selection.py). A NaN
    score raises ValueError; on a GPU it sets faults int32 [1] to 1 instead where there are any, without waiting for the device.
    """
    if selector == "indexer" and gpu_ops.takes_index(q, k):
        assert q is not None and k is not None and w is not None
        return gpu_ops.select_packed(q, k, w, cu_seqlens, positions, top_k, faults)
    return torch_indexer.packed_selection(q, k, w, cu_seqlens, positions, top_k, selector)


def select_prefill(
    q: Tensor | None, index_cache: Tensor | None, w: Tensor | None, cu_seqlens: Tensor, positions: Tensor, block_table: Tensor,
    seq_lens: Tensor, top_k: int, selector: str = "indexer", faults: Tensor | None = None,
) -> Selection:  # fmt: skip
    """As `select_packed`, for packed queries at the end of paged contexts of seq_lens int32 [n] tokens (these included)."""
    if selector == "indexer" and gpu_ops.takes_index(q, index_cache, paged=True):
        assert q is not None and index_cache is not None and w is not None
        return gpu_ops.select_prefill(q, index_cache, w, cu_seqlens, positions, block_table, seq_lens, top_k, faults)
    return torch_indexer.paged_selection(
        q, index_cache, w, cu_seqlens, positions, block_table, seq_lens, top_k, selector
    )


def select_paged(
    q: Tensor | None, index_cache: Tensor | None, w: Tensor | None, block_table: Tensor, seq_lens: Tensor, top_k: int,
    selector: str = "indexer", scratch: dict[Any, Any] | None = None, faults: Tensor | None = None, side: Branch | None = None,
) -> Selection:  # fmt: skip
    """Decode: q [B, H_I, D_I], w [B, H_I], one query per sequence at position seq_len - 1; index_cache [pages, page, D_I].

    scratch, faults, side: as in a ForwardContext, for CUDA graphs; a NaN score raises ValueError where no faults int32 [1] takes it.
    With side the sets are not there until it has been joined.
    """
    if selector == "indexer" and gpu_ops.takes_index(q, index_cache, paged=True):
        assert q is not None and index_cache is not None and w is not None
        return gpu_ops.select_paged(q, index_cache, w, block_table, seq_lens, top_k, scratch, faults, side)
    return torch_indexer.decode_selection(q, index_cache, w, block_table, seq_lens, top_k, selector)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Packed causal attention over S_t, differentiable in q [T, H, D], k and v [T, Hkv, D] -> out [T, H, D], lse [T, H].

    lse carries no gradient. Queries with an empty set give 0. No [L, L] tensor is kept for the backward.
    """
    if gpu_train.takes(q, k, v):
        return gpu_train.sparse_attention(q, k, v, cu_seqlens, selection, scale)
    return torch_attention.packed_attention(q, k, v, cu_seqlens, selection, scale)


def sparse_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens: Tensor, block_table: Tensor, seq_lens: Tensor,
    selection: Selection | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed queries at the end of their paged contexts (already written, these tokens included). Inference only."""
    if gpu_ops.takes_attention(q, k_cache, v_cache) and not torch.is_grad_enabled():
        return gpu_ops.sparse_prefill(q, k_cache, v_cache, cu_seqlens, block_table, seq_lens, selection, scale)
    return torch_attention.paged_context_attention(
        q, k_cache, v_cache, cu_seqlens, block_table, seq_lens, selection, scale
    )


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    selection: Selection | None,
    scale: float,
    scratch: dict[Any, Any] | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [B, H, D], one query per sequence at seq_len - 1; caches [pages, page, Hkv, D]; only selected slots are read."""
    if gpu_ops.takes_attention(q, k_cache, v_cache):
        return gpu_ops.sparse_decode(q, k_cache, v_cache, block_table, seq_lens, selection, scale, scratch, exact)
    return torch_attention.decode_attention(q, k_cache, v_cache, block_table, seq_lens, selection, scale)


def sparse_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens: Tensor, positions: Tensor, block_table: Tensor,
    selection: Selection | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sparse_prefill` for queries at positions int64 [T], each with the bits that `sparse_decode(..., exact=True)` gives it alone."""
    rows = torch.arange(len(cu_seqlens) - 1, device=q.device).repeat_interleave(
        (cu_seqlens[1:] - cu_seqlens[:-1]).to(q.device), output_size=len(q)
    )
    seen = (positions + 1).to(torch.int32)
    return sparse_decode(q, k_cache, v_cache, block_table[rows], seen, selection, scale, None, True)


def mla_decode(
    q: Tensor, cache: Tensor, rank: int, block_table: Tensor, seq_lens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Absorbed MLA: q [B, H, rank + rope], one query per sequence at seq_len - 1; cache [pages, page, rank + rope], whose first `rank`
    numbers are key and value at once -> out [B, H, rank], lse [B, H]; only selected slots are read."""
    fits = q.dtype == cache.dtype == torch.bfloat16 and (rank, q.shape[-1]) == (512, 576) and cache.is_contiguous()
    if q.is_cuda and fits:
        from winnow.kernels.mla_decode import mla_decode as kernel  # triton, where there is a GPU for it

        indices, counts = (None, None) if selection is None else (selection.indices, selection.counts)
        return kernel(q, cache, block_table, seq_lens, indices, counts, scale)
    shared = cache[:, :, None]  # one kv head
    out, lse = torch_attention.decode_attention(q, shared, shared, block_table, seq_lens, selection, scale)
    return out[..., :rank], lse


def mla_prefill(
    q: Tensor, cache: Tensor, rank: int, cu_seqlens: Tensor, block_table: Tensor, seq_lens: Tensor, selection: Selection | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `mla_decode`, for packed queries [T, H, rank + rope] at the end of their paged contexts (these included). Inference only."""
    fits = q.dtype == cache.dtype == torch.bfloat16 and (rank, q.shape[-1]) == (512, 576) and cache.is_contiguous()
    if q.is_cuda and fits and selection is not None:
        return gpu_ops.mla_prefill(q, cache, block_table, cu_seqlens, seq_lens, selection, scale)
    shared = cache[:, :, None]
    out, lse = sparse_prefill(q, shared, shared, cu_seqlens, block_table, seq_lens, selection, scale)
    return out[..., :rank], lse


def indexer_kl(
    q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None,
    scale: float, cost: Omission | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over rows of KL(p || softmax(I)) over S_t, differentiable in q, k, w only, and the number of rows, int64 scalar.

    q [T, H_I, D_I], k [T, D_I], w [T, H_I]; attn_q [T, H, D], attn_k [T, Hkv, D] and lse [T, H] (over the same S_t) are detached. p is
    the attention summed over heads (DeepSeek-V3.2, section 2.1); with cost, what leaving each key out would cost (`omission`).
    """
    if gpu_train.takes(q, k) and gpu_train.takes(attn_q, attn_k, widest=576):
        return gpu_train.indexer_kl(q, k, w, attn_q, attn_k, lse, cu_seqlens, selection, scale, cost)
    return torch_indexer.kl(q, k, w, attn_q, attn_k, lse, cu_seqlens, selection, scale, cost)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, exact: bool = False, scratch: dict[Any, Any] | None = None
) -> Tensor:
    """x [T, K] @ weight [N, K]^T (+ bias [N]), without gradient. exact: a row's bits depend on no other row.

    fp32 products are TF32 where torch's own are. scratch, of one forward pass: what its products share.
    """
    if exact and x.is_cuda:
        return gpu_ops.linear(x, weight, bias, scratch)
    return torch.nn.functional.linear(x, weight, bias)


def linear_parts(x: Tensor, weight: Tensor) -> Tensor | None:
    """x [T, K] @ weight [N, K]^T of few rows as fp32 [pieces, T, N], for a reader that adds the pieces up from zero, in order: the bits of
    `linear` with exact. None where that saves nothing."""
    if x.is_cuda and len(x) <= FEW_ROWS:
        return gpu_ops.linear_parts(x, weight)
    return None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, wide: Tensor | None = None
) -> Tensor:
    """RMS norm over the last dimension of x [T, C], without gradient. residual [T, C]: x is added to it first, in place. wide fp32
    [T, C]: gets the same numbers."""
    if x.is_cuda:
        from winnow.kernels import invariant

        return invariant.rms_norm(x, weight, eps, residual, wide)
    return torch_rows.rms_norm(x, weight, eps, residual, wide)


def draw(
    logits: Tensor, temperature: Tensor, uniform: Tensor, tokens: Tensor, logprobs: Tensor, faults: Tensor, given: bool = False
) -> None:  # fmt: skip
    """Fills tokens int64 [rows] and logprobs fp32 [rows]: one token a row of logits [rows, V], by inversion of the cumulative
    distribution at uniform fp64 [rows]; temperature fp32 [rows], 0 for the largest logit (log-probability of temperature 1). faults
    int32 [1] becomes 1 when a row has no finite peak. given: the tokens are there already, and only their log-probabilities are wanted.
    """
    if logits.is_cuda:
        from winnow.kernels.draw import draw as kernel

        kernel(logits, temperature, uniform, tokens, logprobs, faults, given)
    else:
        torch_rows.draw(logits, temperature, uniform, tokens, logprobs, faults, given)


def rows_of(x: Tensor) -> Any:
    """The row-wise operations for this tensor's device, with one signature: `rows` (Triton) or `torch_rows`."""
    if x.is_cuda:
        from winnow.kernels import rows

        return rows
    return torch_rows


def train_rows_of(x: Tensor) -> Any:
    """`train_rows`, row-wise operations with gradients, where this tensor's device has them; None elsewhere, where torch's will do."""
    if not x.is_cuda:
        return None
    from winnow.kernels import train_rows

    return train_rows


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, kept: Any | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of its distribution, fp32 [T] both, differentiable in hidden and weight.

    hidden [T, C]; weight [V, C]; targets int64 [T]; temperature > 0, one number or fp32 [T]; kept: an object with `indptr` [T + 1]
    and `token_ids` (or `ids`): the action set of each token, an empty row meaning the whole vocabulary. Raises ValueError when a
    target lies outside its set or the vocabulary.
    """
    temperatures = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device).expand(len(targets))
    inside = (targets >= 0) & (targets < len(weight))
    if not bool((inside & (temperatures > 0)).all()):  # one wait for the device
        if not bool(inside.all()):
            wrong = int(targets[~inside][0])
            raise ValueError(
                f"token {wrong} is scored, but the vocabulary is 0 .. {len(weight) - 1}: another tokenizer's?"
            )
        raise ValueError(
            f"temperature is {temperature}, but log-probabilities need one > 0 (greedy samples are scored at 1)"
        )
    sets = None
    if kept is not None:
        ids = kept.token_ids if hasattr(kept, "token_ids") else kept.ids
        sets = (torch.as_tensor(kept.indptr), torch.as_tensor(ids))
        if len(sets[0]) != len(targets) + 1:
            raise ValueError(f"kept sets cover {len(sets[0]) - 1} tokens, but {len(targets)} are scored")
    if gpu_train.takes(hidden, weight, widest=hidden.shape[-1]):
        return gpu_train.token_logprobs(hidden, weight, targets, temperatures, sets)
    return torch_logprobs.logprobs(hidden, weight, targets, temperatures, sets)
