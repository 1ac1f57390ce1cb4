"""Decode selection: indexer scores and their top-k in two launches, the row's scores read back once from the cache.

The first kernel (indexer_logits.py) writes scores and the maximum of every few; the second (topk.py) bounds the k-th score
by those maxima, keeps about 1.4 k candidates and chooses exactly.
"""

from contextlib import nullcontext

import torch
import triton

from winnow.kernels.indexer_logits import indexer_logits_decode
from winnow.kernels.topk import select_from_maxima, topk_workspace

BLOCK_N = 64  # keys per step of the score kernel


def select_workspace(batch, width, k, device):
    """Scratch of `select_decode` for sequences up to `width` tokens; `work["bad"]` turns 1 when a score was NaN."""
    work = topk_workspace(batch, width, k, device)
    work["span"] = BLOCK_N * (
        work["group"] if batch > 4 else 4
    )  # few rows: more programs for the scores, more maxima to fold
    work["group"] = work["span"] // BLOCK_N
    work["maxima"] = torch.empty(batch, triton.cdiv(width, work["span"]) * BLOCK_N, dtype=torch.int32, device=device)
    return work | {"scores": torch.empty(batch, width, dtype=torch.float32, device=device)}


def select_decode(
    q, cache, w, block_table, seq_lens, k, max_len, out=None, counts=None, workspace=None, check=True, side=None, **options
):  # fmt: skip
    """The k best positions of one query per sequence: arguments as in `indexer_logits_decode`, results as in `topk`.

    Rows no longer than k get every position and cost neither scores nor a choice. Graph-safe when out, counts and workspace
    are given and check is False. side: a branch that chooses, to be joined before the sets are read (not with check); scores are read
    at the device's full rate and leave nothing for others, while the choice mostly waits for itself.
    """
    work = workspace or select_workspace(len(q), max_len, k, q.device)
    out = torch.empty(len(q), k, dtype=torch.int32, device=q.device) if out is None else out
    counts = torch.empty(len(q), dtype=torch.int32, device=q.device) if counts is None else counts
    whole = work["chunk"] >= max_len  # many rows: one program chooses in a whole row, and finds its maxima itself
    maxima, span = (None, None) if whole else (work["maxima"], work["span"])
    indexer_logits_decode(
        q,
        cache,
        w,
        block_table,
        seq_lens,
        work["scores"],
        max_len,
        maxima,
        skip=k,
        chunk=span,
        block_n=BLOCK_N,
        **options,
    )
    with nullcontext() if side is None else side.beside():
        select_from_maxima(work["scores"], seq_lens, k, work, out, counts, span, skipped=True)
    if check and int(work["bad"]):
        work["bad"].zero_()
        raise ValueError("select_decode: a score is NaN; the indexer's input or weights are broken")
    return out, counts
