"""Absorbed MLA and exact GQA over packed sequences: every query is a decode of its own over the packed keys.

With 64 or 128 heads a query fills a tile by itself, so nothing is gained by uniting neighbours; and a decode kernel called with
constant splits gives the same bits for a query whether its keys lie in pages or packed. That is the `exact` mode of both forms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.kernels.gqa_decode import gqa_decode
from winnow.kernels.mla_decode import mla_decode, plan_for
from winnow.kernels.selection import Selection, window_selection
from winnow.kernels.sparse_prefill import capability

PAGE = 64
EXACT = {"split": 512, "block_n": 64}  # of gqa_decode, on both sides
CHUNK = 4096  # queries of one exact launch: bounds the partial sums


def packed_rows(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(first packed row of its sequence, position in it) of every token: int32 [T] both."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    origin = cu_seqlens[:-1].to(torch.int32).repeat_interleave(lengths, output_size=tokens)
    return origin, torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device) - origin


def absolute(selection: Selection | None, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Packed rows of every set, int32 [T, k], -1 where the set has no (visible) position."""
    origin, positions = packed_rows(cu_seqlens, tokens)
    if selection is None:
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if len(cu_seqlens) > 1 else 1
        selection = window_selection(positions.long(), max(1, longest))
    chosen = selection.indices
    hidden = (chosen < 0) | (chosen > positions[:, None])
    return (chosen + origin[:, None]).masked_fill_(hidden, -1)


def _paged(x: Tensor) -> Tensor:
    """[T, ...] as pages [pages, PAGE, ...]: a view when T is a multiple of PAGE."""
    short = -len(x) % PAGE
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, short))
    return x.view(-1, PAGE, *x.shape[1:])


def _as_decode(rows: Tensor, pages: int) -> dict[str, Any]:
    """The arguments that make a decode kernel read packed rows int32 [T, k] (masked): pages in order, the same for all."""
    tokens, device = len(rows), rows.device
    table = torch.arange(pages, dtype=torch.int32, device=device).expand(tokens, pages)
    return {
        "block_table": table,
        "seq_lens": torch.full(
            (tokens,), pages * PAGE, dtype=torch.int32, device=device
        ),  # the sets are masked already
        "indices": rows,
        "counts": torch.full((tokens,), rows.shape[1], dtype=torch.int32, device=device),
    }


def mla_exact(q: Tensor) -> dict[str, int]:
    """Constants of `mla_decode` that make a row's bits independent of the batch: one split, and one shape of tiles."""
    sm = capability(q.device)
    if sm == 0 or (sm // 10 == 9 and q.shape[1] > 32):  # one shape in any case
        return {"splits": 1}
    shape = zip(("block_h", "block_n", "num_warps", "num_stages"), plan_for(sm, 1), strict=True)
    return {"splits": 1, **dict(shape)}


def mla_prefill(q: Tensor, kv: Tensor, rows: Tensor, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
    """q [T, H, 576], kv [T, 576] packed, rows int32 [T, k] from `absolute` -> out [T, H, 512], lse fp32 [T, H].

    Without options the fastest kernel. With **mla_exact(q), bit for bit what `mla_decode` gives with the same, whatever its batch.
    """
    if not options and capability(q.device) // 10 == 9:
        from winnow.kernels import mla_prefill_sm90  # Gluon

        if mla_prefill_sm90.fits(q, kv, rows):
            out, lse = q.new_empty(*q.shape[:2], 512), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            if len(q):
                mla_prefill_sm90.launch(q.contiguous(), kv.contiguous(), rows.contiguous(), out, lse, scale)
            return out, lse
    cache = _paged(kv.contiguous())
    call = _as_decode(rows, len(cache))
    return mla_decode(q, cache, scale=scale, **call, **(options or {"splits": 1}))


def gqa_prefill_exact(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, selection: Selection | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As `sparse_prefill`, each token's bits being those of `gqa_decode(..., **EXACT)` on the same set. Slow: no tile is shared."""
    rows = absolute(selection, cu_seqlens, len(q))
    keys, values = _paged(k.contiguous()), _paged(v.contiguous())
    call = _as_decode(rows, len(keys))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for a in range(0, len(q), CHUNK):
        part = {name: x[a : a + CHUNK] for name, x in call.items()}
        out[a : a + CHUNK], lse[a : a + CHUNK] = gqa_decode(
            q[a : a + CHUNK], keys, values, scale=scale, **part, **EXACT
        )
    return out, lse
