"""The meaning of every operation, in plain torch, one sequence or one row at a time. Tests compare everything else with this file.

Written to be read, not to be fast. Inputs in float64 are computed in float64. Log-sum-exp is natural; it holds no sink.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.selection import Selection


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def indexer_logits(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """I[t, s] = sum over j of w[t, j] * relu(q[t, j] . k[s]), heads added in order (DeepSeek-V3.2, arXiv 2512.02556).

    q [T, H_I, D_I], k [S, D_I], w [T, H_I] (already scaled by H_I^-1/2 D_I^-1/2) -> fp32 [T, S]. No mask.
    """
    q, k, w = _float(q), _float(k), _float(w)
    total = q.new_zeros(q.shape[0], k.shape[0])
    for head in range(q.shape[1]):
        total = total + w[:, head, None] * torch.relu(q[:, head] @ k.T)
    return total


def topk(scores: Tensor, lengths: Tensor, k: int) -> Selection:
    """The k largest of each row's first `length` scores by a stable sort: lowest index wins, -0 == +0, NaN raises."""
    indices = torch.full((scores.shape[0], k), -1, dtype=torch.int32)
    counts = torch.zeros(scores.shape[0], dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        valid = scores[row, :length] + 0.0  # -0 + 0 is +0
        if torch.isnan(valid).any():
            raise ValueError(f"top-k: row {row} has a NaN score")
        chosen = torch.sort(valid, descending=True, stable=True).indices[:k].sort().values
        indices[row, : len(chosen)] = chosen.to(torch.int32)
        counts[row] = len(chosen)
    return Selection(indices, counts)


def allowed_positions(length: int, selection: Selection | None, start: int) -> Tensor:
    """bool [length, length]: what each query of one packed sequence (its tokens begin at row `start`) attends to."""
    allowed = torch.ones(length, length).tril().bool()
    if selection is not None:
        chosen = torch.zeros(length, length, dtype=torch.bool)
        for t in range(length):
            row = selection.indices[start + t].long()
            chosen[t, row[(row >= 0) & (row <= t)]] = True
        allowed = allowed & chosen
    return allowed


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over S_t of its own sequence. Returns out [T, H, D_v], lse [T, H] (-inf where S_t is empty)."""
    group = q.shape[1] // k.shape[1]
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), _float(q).new_full(q.shape[:2], -torch.inf)
    for start, stop in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        allowed = allowed_positions(stop - start, selection, start)
        for head in range(q.shape[1]):
            keys, values = _float(k[start:stop, head // group]), _float(v[start:stop, head // group])
            scores = (_float(q[start:stop, head]) @ keys.T) * scale
            scores = scores.masked_fill(~allowed, -torch.inf)
            empty = ~allowed.any(1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=1).masked_fill(empty, 0.0)
            out = out.index_put((torch.arange(start, stop), torch.tensor(head)), (weights @ values).to(out.dtype))
            lse[start:stop, head] = torch.logsumexp(scores, dim=1).detach()
    return out, lse


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    selection: Selection | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query per sequence, at position seq_len - 1, over a paged cache. Returns out [B, H, D], lse [B, H]."""
    outs, lses = [], []
    page = k_cache.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        positions = torch.arange(length)
        if selection is not None:
            positions = selection.indices[row].long()
            positions = positions[(positions >= 0) & (positions < length)].unique()
        pages = block_table[row, positions // page].long()
        keys, values = _float(k_cache[pages, positions % page]), _float(v_cache[pages, positions % page])
        group = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)  # [n, H, D]
        scores = torch.einsum("hd,nhd->hn", _float(q[row]), keys) * scale
        lses.append(torch.logsumexp(scores, dim=1))
        outs.append(torch.einsum("hn,nhd->hd", torch.softmax(scores, dim=1), values).to(q.dtype))
    return torch.stack(outs), torch.stack(lses)


def indexer_kl(
    q: Tensor, k: Tensor, w: Tensor, attn_q: Tensor, attn_k: Tensor, lse: Tensor, cu_seqlens: Tensor, selection: Selection | None,
    scale: float, projected: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Sum over rows of KL(p_t || softmax(I_t)) over S_t, and the number of rows with a non-empty S_t.

    p_t is attention summed over heads and L1-normalised, detached; 0 log 0 = 0; `lse` is taken over the same S_t. projected: values
    [T, Hkv, D], outputs [T, H, D] and an output projection [E, H * D]: p_t is what the projected output loses without each key.
    """
    total, rows = _float(q).new_zeros(()), 0
    group = attn_q.shape[1] // attn_k.shape[1]
    for start, stop in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        scores = indexer_logits(q[start:stop], k[start:stop], w[start:stop])
        keys = _float(attn_k[start:stop].detach()).repeat_interleave(group, 1)
        attention = torch.einsum("thd,shd->ths", _float(attn_q[start:stop].detach()), keys) * scale
        allowed = allowed_positions(stop - start, selection, start)
        for t in range(stop - start):
            keep = allowed[t]
            if not keep.any():
                continue
            shares = torch.exp(attention[t][:, keep] - lse[start + t, :, None].detach())  # [H, n]
            if projected is not None:
                values, out, weight = (_float(x.detach()) for x in projected)
                away = values[start:stop][keep].repeat_interleave(group, 1) - out[start + t]  # [n, H, D]
                split = weight.view(len(weight), *away.shape[1:])
                if keep.sum() > 1:
                    there = values[start:stop][keep].repeat_interleave(group, 1)
                    moved, a, b = (
                        torch.einsum("nhd,ehd->hne", x, split).norm(dim=-1) for x in (away, there, out[start + t, None])
                    )
                    alone = shares**2 * torch.hypot(a, b)
                    shares = shares * torch.maximum(moved / (1 - shares).clamp(min=0.01), alone)
            mass = shares.sum(0)
            target = mass / mass.sum()
            log_model = torch.log_softmax(scores[t][keep], dim=0)
            total = total + (torch.xlogy(target, target) - target * log_model).sum()
            rows += 1
    return total, rows


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature)[target] and the entropy, over each token's kept set (an empty one: everything)."""
    logits = _float(hidden) @ _float(weight).T
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    if kept is not None:
        indptr, ids = kept
        for row in range(len(targets)):
            chosen = ids[indptr[row] : indptr[row + 1]].long()
            if len(chosen):
                outside = torch.ones(logits.shape[1], dtype=torch.bool)
                outside[chosen] = False
                logits = torch.where((torch.arange(len(targets)) == row)[:, None] & outside, -torch.inf, logits)
    logprobs = torch.log_softmax(logits, dim=1)
    probs = logprobs.exp()
    entropy = -torch.where(probs > 0, probs * logprobs.masked_fill(probs == 0, 0.0), 0.0).sum(1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy
