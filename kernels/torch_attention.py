"""Sparse and dense causal attention in torch: packed (forward and backward), over a paged context, and decode.

On a CPU the tiles go to torch's flash kernel with the index sets as an additive mask; elsewhere to explicit matmuls. Autograd keeps
q, k, v, out, lse and the index sets only: masks are made again, chunk by chunk, in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels.packing import Batch, batches, gather_pages, gather_slots, round_up
from winnow.kernels.selection import Selection

TILE_BUDGET = 1 << 23  # elements of the largest temporary
# Up to so many positions a decoding query reads all of them and masks, as training does: both then add the same numbers in the same
# order, and on a CPU a gather of so few saves nothing. Longer contexts gather what is selected.
MASKED_DECODE = 512
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """[N, H, Lq, Lk] fp32 scores (float64 stays) with -inf outside the mask."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.to(wide) @ keys.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf
        )
    return scores


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, H, Lq, D], k and v [N, Hkv, Lk, D], additive mask [N, 1, Lq, Lk] -> out like q, lse [N, H, Lq] (0 on empty rows)."""
    if q.device.type == "cpu":
        return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return attend_plain(q, k, v, mask, causal, scale)


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend` in explicit matmuls, for any device."""
    scores = _scores(q, k, mask, causal, scale)
    lse = torch.logsumexp(scores, -1)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    values = v.to(scores.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (torch.exp(scores - lse[..., None]) @ values).to(q.dtype), lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` in q, k, v (shapes of q, k, v) from grad and out, both [N, H, Lq, D]."""
    if q.device.type == "cpu":
        return _flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return attend_plain_backward(grad, q, k, v, out, lse, mask, causal, scale)


def attend_plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in explicit matmuls, for any device."""
    p = torch.exp(_scores(q, k, mask, causal, scale) - lse[..., None])  # [N, H, Lq, Lk]
    num, heads, _, dim = q.shape
    group = heads // k.shape[1]
    grad, wide_q = grad.to(p.dtype), q.to(p.dtype)
    keys, values = (x.to(p.dtype).repeat_interleave(group, 1) for x in (k, v))
    grad_v = p.transpose(-1, -2) @ grad
    ds = p * (grad @ values.transpose(-1, -2) - (grad * out.to(p.dtype)).sum(-1, keepdim=True)) * scale
    grad_k = ds.transpose(-1, -2) @ wide_q
    fold = (num, k.shape[1], group, k.shape[2], dim)
    return (ds @ keys).to(q.dtype), grad_k.view(fold).sum(2).to(k.dtype), grad_v.view(fold).sum(2).to(v.dtype)


def selected_mask(indices: Tensor, positions: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Index sets int [N, C, k] of queries at positions [N, C] -> additive mask [N, 1, C, num_keys]; entries no query may see are dropped."""
    chosen = indices.long()
    chosen = torch.where((chosen < 0) | (chosen > positions[..., None]), num_keys, chosen).clamp(max=num_keys)
    mask = torch.full((*indices.shape[:2], num_keys + 1), -torch.inf, dtype=dtype, device=indices.device)
    return mask.scatter_(2, chosen, 0.0)[:, None, :, :num_keys]


def causal_mask(positions: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [N, 1, C, num_keys]: 0 where key <= position."""
    hidden = torch.arange(num_keys, device=positions.device) > positions[..., None]
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)[:, None]


class _Tiles:
    """How one batch is cut: whole and causal when every set is the identity, else chunks of queries with a mask."""

    def __init__(self, batch: Batch, selection: Selection | None, dtype: torch.dtype):
        self.batch, self.dtype = batch, dtype
        self.indices: Tensor | None = None
        if selection is not None and not bool((batch.pad(selection.counts) == batch.positions + 1).all()):
            self.indices = batch.pad(selection.indices)
        self.causal = self.indices is None and batch.square
        whole = [(0, batch.rows.shape[1])]
        self.ranges = whole if self.causal else batch.chunks(0, 1, TILE_BUDGET)

    def mask(self, a: int, b: int, num_keys: int) -> Tensor | None:
        if self.causal:
            return None
        positions = self.batch.positions[:, a:b]
        if self.indices is None:
            return causal_mask(positions, num_keys, self.dtype)
        return selected_mask(self.indices[:, a:b], positions, num_keys, self.dtype)


def _mask_dtype(q: Tensor) -> torch.dtype:
    return q.dtype if q.device.type == "cpu" else torch.promote_types(q.dtype, torch.float32)


def _forward_batch(q: Tensor, k: Tensor, v: Tensor, tiles: _Tiles, scale: float) -> tuple[Tensor, Tensor]:
    """q [N, Lq, H, D], k and v [N, Lk, Hkv, D] -> out [N, Lq, H, D], lse [N, Lq, H] as the kernel gives it."""
    outs, lses = [], []
    for a, b in tiles.ranges:
        keys = tiles.batch.keys_until(b)
        kt, vt = (x[:, :keys].transpose(1, 2) for x in (k, v))
        out, lse = attend(q[:, a:b].transpose(1, 2), kt, vt, tiles.mask(a, b, keys), tiles.causal, scale)
        outs.append(out.transpose(1, 2))
        lses.append(lse.transpose(1, 2))
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 1))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        raw = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for batch in batches(cu_seqlens):
            tiles = _Tiles(batch, selection, _mask_dtype(q))
            padded_out, padded_lse = _forward_batch(batch.pad(q), batch.pad(k), batch.pad(v), tiles, scale)
            batch.unpad_into(out, padded_out)
            batch.unpad_into(raw, padded_lse)
        sets = () if selection is None else (selection.indices, selection.counts)
        ctx.save_for_backward(
            q, k, v, out, raw, cu_seqlens, *sets
        )  # not in attributes: checkpointing lets go of tensors only
        ctx.scale = scale
        lse = raw if selection is None else raw.masked_fill((selection.counts == 0)[:, None], -torch.inf)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        q, k, v, out, raw, cu_seqlens, *sets = ctx.saved_tensors
        selection = Selection(*sets) if sets else None
        grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for batch in batches(cu_seqlens):
            tiles = _Tiles(batch, selection, _mask_dtype(q))
            qb, kb, vb, ob, lb = (batch.pad(x) for x in (q, k, v, out, raw))
            gb = batch.pad(grad)
            if batch.span is None:
                gb = gb * batch.valid[..., None, None]  # padding repeats a real row: count its gradient once
            dq, dk, dv = torch.empty_like(qb), torch.zeros_like(kb), torch.zeros_like(vb)
            for a, b in tiles.ranges:
                keys = batch.keys_until(b)
                gt, qt, ot, lt = (x[:, a:b].transpose(1, 2) for x in (gb, qb, ob, lb))
                kt, vt = (x[:, :keys].transpose(1, 2) for x in (kb, vb))
                mask = tiles.mask(a, b, keys)
                parts = attend_backward(gt, qt, kt, vt, ot, lt.contiguous(), mask, tiles.causal, ctx.scale)
                dq[:, a:b] = parts[0].transpose(1, 2)
                dk[:, :keys] += parts[1].transpose(1, 2)
                dv[:, :keys] += parts[2].transpose(1, 2)
            for total, padded in zip(grads, (dq, dk, dv), strict=True):
                batch.unpad_into(total, padded)
        return *grads, None, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _PackedAttention.apply(q, k, v, cu_seqlens, selection, scale)


def paged_context_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens: Tensor, block_table: Tensor, seq_lens: Tensor,
    selection: Selection | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunked prefill: packed queries at the end of their paged contexts. Inference only."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for batch in batches(cu_seqlens, seq_lens):
        table = block_table[batch.sequences]
        kb, vb = (gather_pages(c, table, batch.kv_lens, batch.num_keys).to(q.dtype) for c in (k_cache, v_cache))
        tiles = _Tiles(batch, selection, _mask_dtype(q))
        padded_out, padded_lse = _forward_batch(batch.pad(q), kb, vb, tiles, scale)
        batch.unpad_into(out, padded_out)
        batch.unpad_into(lse, padded_lse)
    if selection is not None:
        lse = lse.masked_fill((selection.counts == 0)[:, None], -torch.inf)
    return out, lse


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    selection: Selection | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query per sequence over its pages (None: all of them), or over the selected slots only."""
    last = seq_lens.long()[:, None] - 1  # [B, 1]: the query's position
    num_keys = round_up(int(seq_lens.max()))
    if selection is None or num_keys <= MASKED_DECODE:
        kb, vb = (gather_pages(c, block_table, seq_lens, num_keys).to(q.dtype) for c in (k_cache, v_cache))
        if selection is None:
            mask = causal_mask(last, num_keys, _mask_dtype(q))
        else:
            mask = selected_mask(selection.indices[:, None], last, num_keys, _mask_dtype(q))
    else:
        chosen = selection.indices.long()
        hidden = (chosen < 0) | (chosen > last)
        chosen = torch.where(hidden, last, chosen)  # any written slot: the mask hides it
        kb, vb = (gather_slots(c, block_table, chosen).to(q.dtype) for c in (k_cache, v_cache))
        mask = torch.zeros(hidden.shape, dtype=_mask_dtype(q), device=q.device).masked_fill_(hidden, -torch.inf)
        mask = mask[:, None, None]
    out, lse = _attend_one(q, kb.transpose(1, 2), vb.transpose(1, 2), mask, scale)
    if selection is not None:
        lse = lse.masked_fill((selection.counts == 0)[:, None], -torch.inf)
    return out, lse


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One query a sequence: q [B, H, D], k and v [B, Hkv, S, D], mask [B, 1, 1, S] -> out [B, H, D], lse [B, H].

    The query heads that share a kv head are the rows of one product: the keys are read once, and on a CPU the rows are filled up to
    where its matrix library computes each as it would in a longer product (`ROW_MULTIPLE`).
    """
    batch, heads, dim = q.shape
    group = heads // k.shape[1]
    rows = q.view(batch, k.shape[1], group, dim)
    if q.device.type == "cpu":
        rows = torch.nn.functional.pad(rows, (0, 0, 0, round_up(group) - group))
    if mask is not None:
        mask = mask.expand(batch, 1, rows.shape[2], k.shape[2])
    out, lse = attend(rows, k, v, mask, False, scale)  # [B, Hkv, rows, D], [B, Hkv, rows]
    return out[:, :, :group].reshape(q.shape[0], heads, v.shape[-1]), lse[:, :, :group].reshape(batch, heads)
