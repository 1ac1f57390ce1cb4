"""The public operations of ops.py on the Triton kernels: which tensors they take, and how they are called.

Each `takes_*` says whether the kernels cover a call; ops.py falls back on torch where they do not. The sets follow the rule of
selection.py, and prefill and decode give equal bits for equal inputs, so that a set does not depend on which of them chose it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.branch import Branch
from winnow.kernels.packing import longest, on_host
from winnow.kernels.selection import Selection

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCORE_BUDGET = 1 << 27  # fp32 scores of one piece of a prefill: 512 MiB, and 1 GiB of candidates
EXACT_SPLIT, EXACT_STEP = 512, 64  # positions per program and step of a decode whose bits depend on no batch


def round_up(length: int) -> int:
    """The power of two, 1024 at least, that holds `length`: kernels are compiled for these widths and not for every length."""
    return max(1024, 1 << (length - 1).bit_length())


def takes_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in FLOATS
        and q.dtype == k_cache.dtype == v_cache.dtype
        and k_cache.stride() == v_cache.stride()
        and k_cache.stride(3) == 1
        and k_cache.stride(0) == k_cache.shape[1] * k_cache.stride(1)
        and q.shape[2] <= 256
    )


def takes_index(q: Tensor | None, cache: Tensor | None, paged: bool = False) -> bool:
    """Queries [T, H_I, D_I] and keys of one dtype with a head dimension that the tiles know; pages lie back to back."""
    return (
        q is not None
        and cache is not None
        and q.is_cuda
        and q.dtype in FLOATS
        and cache.dtype == q.dtype
        and q.shape[-1] in (16, 32, 64, 128)
        and (not paged or cache.is_contiguous())
    )


def sparse_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, selection: Selection | None, scale: float,
    scratch: dict[Any, Any] | None = None, exact: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ops.sparse_decode. fp32 takes smaller tiles: four bytes a number."""
    from winnow.kernels.gqa_decode import gqa_decode, gqa_decode_workspace, splits_of

    indices, counts = (None, None) if selection is None else (selection.indices, selection.counts)
    narrow = q.dtype == torch.float32 and q.is_cuda and q.shape[2] <= 128  # wider ones: `plan` knows what fits the chip
    split, block_n = (EXACT_SPLIT, EXACT_STEP) if exact else (None, 32 if narrow else None)
    work = None
    if scratch is not None:
        splits = splits_of(q, k_cache, block_table, indices, split)
        key = ("sparse_decode", *q.shape, splits)
        if key not in scratch:
            scratch[key] = gqa_decode_workspace(len(q), q.shape[1], k_cache.shape[2], q.shape[2], splits, q.device)
        work = scratch[key]
    return gqa_decode(
        q, k_cache, v_cache, block_table, seq_lens, indices, counts, scale, workspace=work, split=split,
        block_n=block_n, num_stages=2 if narrow else None,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scratch: dict[Any, Any] | None = None) -> Tensor:
    """As ops.linear with exact: products that are cut along the inner dimension count arrivals in one array a pass and stream."""
    from winnow.kernels.invariant import FULL
    from winnow.kernels.invariant import linear as multiply

    arrivals = None
    if scratch is not None:
        key = ("linear", torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
        if key not in scratch:
            scratch[key] = torch.zeros(FULL, dtype=torch.int32, device=x.device)
        arrivals = scratch[key]
    return multiply(x, weight, bias, arrivals, _precision())


def linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """As ops.linear_parts."""
    from winnow.kernels.invariant import linear_parts as multiply

    return multiply(x, weight, _precision())


def _precision() -> str:
    """Of fp32 products: torch's own setting."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def sparse_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens: Tensor, block_table: Tensor, seq_lens: Tensor, selection: Selection | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ops.sparse_prefill. The contexts' pages are copied side by side: 4 H_kv D bytes a token, next to nothing beside the products."""
    from winnow.kernels.sparse_prefill import context_prefill

    page, contexts = k_cache.shape[1], on_host(seq_lens)
    counts = [-(-length // page) for length in contexts]
    starts = [page * n for n in itertools.accumulate([0, *counts[:-1]])]
    pages = torch.cat([row[:count] for row, count in zip(block_table, counts, strict=True)])
    k, v = (cache.index_select(0, pages).flatten(0, 1) for cache in (k_cache, v_cache))
    return context_prefill(q, k, v, cu_seqlens, tuple(zip(starts, contexts, strict=True)), selection, scale)


def mla_prefill(
    q: Tensor, cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, seq_lens: Tensor, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ops.mla_prefill over sets: the cache's slots are the packed rows of the kernel. q bf16 [T, H, 576], cache [pages, page, 576]."""
    from winnow.kernels.mla_prefill import mla_prefill as kernel

    page, chosen = cache.shape[1], selection.indices.long()
    queries = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    owner = torch.arange(len(queries), device=q.device).repeat_interleave(queries, output_size=len(q))
    place = chosen.clamp(min=0)
    slots = block_table.long()[owner].gather(1, place // page) * page + place % page
    return kernel(q, cache.view(-1, cache.shape[2]), torch.where(chosen >= 0, slots, -1).int(), scale)


def indexer_logits(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """As ops.indexer_logits: the keys are one page."""
    from winnow.kernels.indexer_logits import indexer_logits_prefill

    table = torch.zeros(1, dtype=torch.int32, device=q.device)
    return indexer_logits_prefill(q.detach(), k.detach().contiguous()[None], w.detach().float(), table, len(k))


def topk(scores: Tensor, lengths: Tensor, k: int) -> Selection:
    rows, device = len(scores), scores.device
    chosen = Selection(
        torch.empty(rows, k, dtype=torch.int32, device=device), torch.empty(rows, dtype=torch.int32, device=device)
    )
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    _choose(scores.contiguous(), lengths.to(torch.int32), k, chosen.indices, chosen.counts, bad)
    _raise_if(bad)
    return chosen


def _choose(scores: Tensor, lengths: Tensor, k: int, indices: Tensor, counts: Tensor, bad: Tensor) -> None:
    """Fills indices int32 [rows, k] and counts int32 [rows]; bad int32 [1]: 1 after a NaN."""
    from winnow.kernels.topk import topk as choose
    from winnow.kernels.topk import topk_workspace
    from winnow.kernels.topk_rows import suits, topk_rows

    if suits(len(scores), scores.shape[1]):
        topk_rows(scores, lengths, k, indices, counts, bad)
    else:
        work = topk_workspace(len(scores), scores.shape[1], k, scores.device) | {"bad": bad}
        choose(scores, lengths, k, indices, counts, work, check=False)


def select_paged(
    q: Tensor, cache: Tensor, w: Tensor, block_table: Tensor, seq_lens: Tensor, top_k: int,
    scratch: dict[Any, Any] | None = None, faults: Tensor | None = None, side: Branch | None = None,
) -> Selection:  # fmt: skip
    """As ops.select_paged with the indexer: q [B, H_I, D_I], one query a sequence."""
    from winnow.kernels.decode_select import select_decode, select_workspace
    from winnow.kernels.select_short import DECODED

    width = block_table.shape[1] * cache.shape[1]
    if width <= DECODED and faults is not None:
        with nullcontext() if side is None else side.beside():
            return _select_short(q, cache, w, block_table, None, seq_lens, top_k, faults)
    work = None
    if scratch is not None and faults is not None:
        key = ("select_paged", len(q), width, top_k)
        if key not in scratch:
            scratch[key] = select_workspace(len(q), width, top_k, q.device) | {"bad": faults}
        work = scratch[key]
    # A graph cannot wait for the device: without `faults` a NaN there is not noticed.
    check = work is None and not (q.is_cuda and torch.cuda.is_current_stream_capturing())
    chosen = select_decode(
        q, cache, w.float(), block_table, seq_lens, top_k, width, workspace=work, check=check, side=side
    )
    return Selection(*chosen)


def select_rows(
    q: Tensor, cache: Tensor, w: Tensor, bounds: Sequence[int], tables: Tensor, contexts: Sequence[int], positions: Tensor, top_k: int,
    faults: Tensor | None = None,
) -> Selection:  # fmt: skip
    """Causal top-k of packed queries: those of sequence i are rows bounds[i] .. bounds[i + 1] and the last of contexts[i] positions.

    cache [pages, page, D_I], tables int32 [n, max_pages]; positions [T]. Rows at t < top_k keep every position.
    """
    bad = torch.zeros(1, dtype=torch.int32, device=q.device) if faults is None else faults
    rows = _Rows(q, w.float(), positions, top_k, bad)
    for i, keys in enumerate(contexts):
        rows.choose(bounds[i], bounds[i + 1], cache, tables[i], keys)
    if faults is None:
        _raise_if(bad)
    return rows.selection


class _Rows:
    """Queries whose sets are chosen sequence by sequence; those at t < top_k keep every position. bad int32 [1]: 1 after a NaN."""

    def __init__(self, q: Tensor, w: Tensor, positions: Tensor, top_k: int, bad: Tensor):
        from winnow.kernels.topk_rows import keep_all

        self.q, self.w, self.top_k, self.bad = q, w, top_k, bad
        self.ends = positions.to(torch.int32) + 1
        self.selection = Selection(self.ends.new_empty(len(q), top_k), torch.empty_like(self.ends))
        keep_all(self.ends, top_k, self.selection.indices, self.selection.counts)

    def choose(self, first: int, last: int, cache: Tensor, table: Tensor, keys: int) -> None:
        """Rows [first, last), the last of `keys` positions. Those that see at most top_k positions keep them all."""
        from winnow.kernels.indexer_logits import indexer_logits_prefill

        indices, counts, device = self.selection.indices, self.selection.counts, self.q.device
        step = max(64, SCORE_BUDGET // max(8192, keys))
        for a in range(max(first, last - (keys - self.top_k)), last, step):
            b = min(a + step, last)
            seen = keys - (last - b)  # what the piece's last query sees
            scores = torch.empty(b - a, round_up(seen), dtype=torch.float32, device=device)
            ends = self.ends[a:b]
            indexer_logits_prefill(self.q[a:b], cache, self.w[a:b], table, seen, ends, scores)
            _choose(scores, ends, self.top_k, indices[a:b], counts[a:b], self.bad)


def _raise_if(bad: Tensor) -> None:
    """Waits for the device."""
    if int(bad):
        raise ValueError("top-k: a score is NaN; the indexer's inputs or weights are not finite")


def select_prefill(
    q: Tensor, cache: Tensor, w: Tensor, cu_seqlens: Tensor, positions: Tensor, block_table: Tensor, seq_lens: Tensor, top_k: int,
    faults: Tensor | None = None,
) -> Selection:  # fmt: skip
    """As ops.select_prefill with the indexer."""
    from winnow.kernels.select_short import LONGEST

    bounds, contexts = on_host(cu_seqlens), on_host(seq_lens)
    if max(contexts, default=0) <= LONGEST and cache.dtype == q.dtype:
        return select_short(q, cache, w, cu_seqlens, block_table, positions, top_k, faults)
    return select_rows(q, cache, w, bounds, block_table, contexts, positions, top_k, faults)


@lru_cache(maxsize=16)
def _own_pages(bounds: tuple[int, ...], width: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed sequences of these bounds, each a page of `width` rows: of every token its slot int64 and its sequence, and how many positions
    it sees; a table of one page a sequence. int32 but for the slots. Every layer asks for the same."""
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    with torch.inference_mode(False):  # or a later call could not save them for its backward
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        place = torch.arange(bounds[-1]) - torch.tensor(bounds)[owner]
        tables = torch.arange(len(lengths), dtype=torch.int32)[:, None].to(device)
        return (owner * width + place).to(device), owner.int().to(device), (place.int() + 1).to(device), tables


def select_short(
    q: Tensor,
    cache: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    tables: Tensor,
    positions: Tensor,
    top_k: int,
    faults: Tensor | None = None,
) -> Selection:
    """As `select_rows`, for any number of short contexts at the price of one."""
    owner = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=len(q)).to(torch.int32)
    return _select_short(q, cache, w, tables, owner, positions.to(torch.int32) + 1, top_k, faults)


def _select_short(
    q: Tensor, cache: Tensor, w: Tensor, tables: Tensor, owner: Tensor | None, ends: Tensor, top_k: int, faults: Tensor | None
) -> Selection:  # fmt: skip
    from winnow.kernels.select_short import select_short as kernel

    bad = torch.zeros(1, dtype=torch.int32, device=q.device) if faults is None else faults
    indices, counts = kernel(q, cache, w.float(), tables, owner, ends, top_k, bad)
    if faults is None:
        _raise_if(bad)
    return Selection(indices, counts)


def select_packed(
    q: Tensor, k: Tensor, w: Tensor, cu_seqlens: Tensor, positions: Tensor, top_k: int, faults: Tensor | None = None
) -> Selection:
    """As ops.select_packed with the indexer: keys k [T, D_I] packed like the queries, every sequence a page of its own."""
    from winnow.kernels.select_short import LONGEST

    bounds, dim = on_host(cu_seqlens), k.shape[1]
    most = longest(bounds)
    if most <= LONGEST and k.dtype == q.dtype:
        width = 1 << (max(most, 64) - 1).bit_length()
        slots, owner, ends, tables = _own_pages(bounds, width, str(k.device))
        pages = k.new_zeros((len(bounds) - 1) * width, dim).index_copy_(0, slots, k).view(-1, width, dim)
        return _select_short(q, pages, w, tables, owner, ends, top_k, faults)
    bad = torch.zeros(1, dtype=torch.int32, device=q.device) if faults is None else faults
    rows = _Rows(q, w.float(), positions, top_k, bad)
    table = torch.zeros(1, dtype=torch.int32, device=q.device)
    for a, b in itertools.pairwise(bounds):
        if b - a > top_k:
            keys = k.new_zeros(1, round_up(b - a), dim)
            keys[0, : b - a] = k[a:b]
            rows.choose(a, b, keys, table, b - a)
    if faults is None:
        _raise_if(bad)
    return rows.selection
