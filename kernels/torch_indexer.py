"""The lightning indexer in torch: scores, selection (packed, chunked prefill, decode) and the KL that trains it.

Packed and paged scores are one formula in one order (`_scores`), so that the learner and the engine see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.omission import REST, TINY, Omission
from winnow.kernels.packing import Batch, batches, gather_pages
from winnow.kernels.selection import SELECTORS, Selection, exact_topk, hash_scores, window_selection, with_random_ties
from winnow.kernels.torch_attention import TILE_BUDGET, selected_mask

Score = Callable[[int, int, int], Tensor]  # (first query, end query, keys) -> fp32 [N, queries, keys] of one batch


def _head_scores(q: Tensor, k: Tensor) -> Tensor:
    """q [N, C, H, D], k [N, S, D] -> relu(q . k) [N, C, H, S] in fp32 (float64 stays)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    num, rows, heads, dim = q.shape
    flat = torch.bmm(q.to(wide).reshape(num, rows * heads, dim), k.to(wide).transpose(1, 2))
    return flat.relu_().view(num, rows, heads, -1)


def _weighted(relu: Tensor, w: Tensor) -> Tensor:
    """Sum over heads of w * relu, in head order, one rounding per operation: [N, C, H, S] -> [N, C, S]."""
    w = w.to(relu.dtype)
    total = relu[:, :, 0] * w[:, :, 0, None]
    for head in range(1, relu.shape[2]):
        total += relu[:, :, head] * w[:, :, head, None]
    return total


def logits(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q [T, H_I, D_I], k [S, D_I], w [T, H_I] -> fp32 [T, S], in chunks of queries."""
    step = max(1, TILE_BUDGET // max(1, q.shape[1] * k.shape[0]))
    parts = [
        _weighted(_head_scores(q[None, a : a + step], k[None]), w[None, a : a + step])[0]
        for a in range(0, len(q), step)
    ]
    return torch.cat(parts) if parts else q.new_zeros(0, len(k), dtype=torch.promote_types(q.dtype, torch.float32))


def _select_rows(batch: Batch, score: Score, heads: int, top_k: int, selection: Selection) -> None:
    """Fill the rows of `selection` whose position is at least top_k; the others hold the identity already."""
    first = top_k if batch.square else 0
    for a, b in batch.chunks(first, heads, TILE_BUDGET):
        keys = batch.keys_until(b)
        positions = batch.positions[:, a:b]
        chosen = exact_topk(score(a, b, keys).reshape(-1, keys), positions.reshape(-1) + 1, top_k)
        fill = (batch.valid[:, a:b] & (positions >= top_k)).reshape(-1)
        rows = batch.rows[:, a:b].reshape(-1)[fill]
        selection.indices[rows] = chosen.indices[fill]
        selection.counts[rows] = chosen.counts[fill]


def _hash_score(batch: Batch) -> Score:
    def score(a: int, b: int, keys: int) -> Tensor:
        rows = batch.positions[:, a:b]
        return hash_scores(rows.reshape(-1), keys).view(*rows.shape, keys)

    return score


def _indexer_score(q: Tensor, k: Tensor, w: Tensor) -> Score:
    """q [N, Lq, H_I, D_I], k [N, Lk, D_I], w [N, Lq, H_I]: one batch, padded."""

    def score(a: int, b: int, keys: int) -> Tensor:
        return _weighted(_head_scores(q[:, a:b], k[:, :keys]), w[:, a:b])

    return score


def _tied_score(score: Score) -> Score:
    return lambda a, b, keys: with_random_ties(score(a, b, keys))


def _check(top_k: int, selector: str) -> None:
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: a query must keep at least one position; set top_k >= 1")
    if selector not in SELECTORS:
        raise ValueError(f"selector {selector!r} is unknown: use one of {SELECTORS}")


def select(
    q: Tensor | None,
    w: Tensor | None,
    keys_of: Callable[[Batch], Tensor],
    plan: tuple[Batch, ...],
    positions: Tensor,
    top_k: int,
    selector: str,
) -> Selection:
    """Selection of packed queries; keys_of(batch) gives the padded indexer keys [N, Lk, D_I] of a batch."""
    _check(top_k, selector)
    selection = window_selection(positions, top_k)
    for batch in plan:
        if batch.num_keys <= top_k or selector == "recent":
            continue
        if selector == "random":
            _select_rows(batch, _hash_score(batch), 1, top_k, selection)
        else:
            assert q is not None and w is not None, "the indexer's selection needs its queries and weights"
            score = _indexer_score(batch.pad(q), keys_of(batch), batch.pad(w))
            if selector == "random_ties":
                score = _tied_score(score)
            _select_rows(batch, score, q.shape[1], top_k, selection)
    return selection


def packed_selection(
    q: Tensor | None,
    k: Tensor | None,
    w: Tensor | None,
    cu_seqlens: Tensor,
    positions: Tensor,
    top_k: int,
    selector: str,
) -> Selection:
    def keys_of(batch: Batch) -> Tensor:
        assert k is not None
        return batch.pad(k)

    return select(q, w, keys_of, batches(cu_seqlens), positions, top_k, selector)


def paged_selection(
    q: Tensor | None, index_cache: Tensor | None, w: Tensor | None, cu_seqlens: Tensor, positions: Tensor, block_table: Tensor,
    seq_lens: Tensor, top_k: int, selector: str,
) -> Selection:  # fmt: skip
    def keys_of(batch: Batch) -> Tensor:
        assert index_cache is not None
        return gather_pages(index_cache, block_table[batch.sequences], batch.kv_lens, batch.num_keys)

    return select(q, w, keys_of, batches(cu_seqlens, seq_lens), positions, top_k, selector)


def decode_selection(
    q: Tensor | None,
    index_cache: Tensor | None,
    w: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    top_k: int,
    selector: str,
) -> Selection:
    """One query per sequence, at position seq_len - 1."""
    _check(top_k, selector)
    lengths = seq_lens.long()
    num_keys = int(lengths.max())
    if selector == "recent":
        return window_selection(lengths - 1, top_k)
    if selector == "random":
        scores = hash_scores(lengths - 1, num_keys)
    else:
        assert q is not None and w is not None and index_cache is not None, "the indexer's selection needs its inputs"
        keys = gather_pages(index_cache, block_table, lengths, num_keys)
        scores = _weighted(_head_scores(q[:, None], keys), w[:, None])[:, 0]
        if selector == "random_ties":
            scores = with_random_ties(scores)
    return exact_topk(scores, lengths, top_k)


class _IndexerKL(torch.autograd.Function):
    """The loss and, where asked for, its gradients in one pass: nothing of size [T, S] outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor,
        selection: Selection | None, scale: float, cost: Omission | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wants = any(ctx.needs_input_grad[:3])
        wide = torch.promote_types(q.dtype, torch.float32)
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, w)] if wants else []
        total = torch.zeros((), dtype=torch.float64, device=q.device)
        rows = torch.zeros((), dtype=torch.int64, device=q.device)
        for batch in batches(cu_seqlens):
            qb, kb, wb, aq, ak, lb = (batch.pad(x) for x in (q, k, w, attn_q, attn_k, lse))
            indices = None if selection is None else batch.pad(selection.indices)
            costs = cost and cost.padded(batch)
            sums = [torch.zeros(x.shape, dtype=wide, device=q.device) for x in (qb, kb, wb)] if wants else None
            for a, b in batch.chunks(0, max(q.shape[1], 2), TILE_BUDGET):
                keys = batch.keys_until(b)
                keep = _allowed(batch, indices, a, b, keys)
                target = attention_target(
                    aq[:, a:b], ak[:, :keys], lb[:, a:b], keep, scale, costs and costs.tile(a, b, keys)
                )
                kl, count, parts = _kl_chunk(qb[:, a:b], kb[:, :keys], wb[:, a:b], target, keep, wants)
                total += kl
                rows += count
                if sums is not None:
                    sums[0][:, a:b] = parts[0]
                    sums[1][:, :keys] += parts[1]
                    sums[2][:, a:b] = parts[2]
            for full, part in zip(grads, sums or [], strict=True):
                batch.unpad_into(full, part)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (q.dtype, k.dtype, w.dtype)
        ctx.mark_non_differentiable(rows)
        return total.to(wide), rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = [(grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *parts, None, None, None, None, None, None, None


def _allowed(batch: Batch, indices: Tensor | None, a: int, b: int, keys: int) -> Tensor:
    """bool [N, C, keys]; rows of padding are empty."""
    positions = batch.positions[:, a:b]
    if indices is None:
        keep = torch.arange(keys, device=positions.device) <= positions[..., None]
    else:
        keep = selected_mask(indices[:, a:b], positions, keys, torch.float32)[:, 0] == 0
    return keep if batch.span is not None else keep & batch.valid[:, a:b, None]


def attention_target(
    attn_q: Tensor, attn_k: Tensor, lse: Tensor, keep: Tensor, scale: float, cost: Omission | None
) -> Tensor:
    """Attention summed over heads, L1-normalised over `keep` [N, C, S]: p [N, C, S], zero elsewhere and on empty rows.

    attn_q [N, C, H, D]; attn_k [N, S, Hkv, D]; lse [N, C, H], over the kept positions. cost: what each head's output loses without the
    key (`omission.py`) instead; values [N, S, Hkv, D], pull [N, C, H, D], own [N, C, H], theirs [N, S, H].
    """
    group = attn_q.shape[2] // attn_k.shape[2]
    wide = lse.dtype
    mass = torch.zeros(keep.shape, dtype=wide, device=keep.device)
    for head in range(attn_q.shape[2]):  # one head at a time: the temporary stays [N, C, S]
        keys = attn_k[:, :, head // group].to(wide)
        scores = torch.bmm(attn_q[:, :, head].to(wide) * scale, keys.transpose(1, 2))
        share = scores.sub_(lse[:, :, head, None]).exp_()
        if cost is not None:
            values = cost.values[:, :, head // group].to(wide)
            square = torch.bmm(cost.pull[:, :, head].to(wide) * -2, values.transpose(1, 2))
            both = cost.own[:, :, head, None] + cost.theirs[:, None, :, head]
            moved = square.add_(both).clamp_(min=0).add_(TINY).sqrt_().div_((1 - share).clamp_(min=REST))
            share = torch.maximum(moved, share.square() * both.sqrt_()).mul_(share)
        mass += share
    mass.masked_fill_(~keep, 0.0)
    norm = mass.sum(-1, keepdim=True)
    return mass.div_(norm.masked_fill_(norm == 0, 1.0))


def _kl_chunk(
    q: Tensor, k: Tensor, w: Tensor, target: Tensor, keep: Tensor, wants: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """KL(p || softmax(I)) summed over a chunk's rows, how many rows counted, and the gradients in q, k, w."""
    relu = _head_scores(q, k)
    scores = _weighted(relu, w).masked_fill_(~keep, -torch.inf)
    filled = keep.any(-1)  # rows with a set
    log_norm = torch.logsumexp(scores, -1).masked_fill(~filled, 0.0)
    cross = (target * scores.masked_fill(~keep, 0.0)).sum(-1)
    rows = torch.xlogy(target, target).sum(-1) - cross + log_norm
    total = rows.masked_fill(~filled, 0.0).sum(dtype=torch.float64)
    if not wants:
        return total, filled.sum(), ()
    grad = (scores - log_norm[..., None]).exp_().sub_(target)  # softmax(I) - p, zero outside the set and on empty rows
    grad_w = torch.einsum("ncs,nchs->nch", grad, relu)
    per_head = relu.gt_(0).mul_(grad[:, :, None]).mul_(w[..., None])  # [N, C, H, S]: gradient in q . k
    num, rows_, heads, keys = per_head.shape
    flat = per_head.view(num, rows_ * heads, keys)
    grad_q = torch.bmm(flat, k.to(flat.dtype)).view(q.shape)
    grad_k = torch.bmm(flat.transpose(1, 2), q.to(flat.dtype).reshape(num, rows_ * heads, -1))
    return total, filled.sum(), (grad_q, grad_k, grad_w)


def kl(
    q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None,
    scale: float, cost: Omission | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _IndexerKL.apply(q, k, w, attn_q.detach(), attn_k.detach(), lse.detach(), cu_seqlens, selection, scale, cost)
