"""Drawing one token a row from logits, in two launches and without a wait: inversion of the cumulative distribution.

The first launch reduces pieces of a row, the second finds the piece and the token; sums in fp64, pieces of fixed size, so a row's draw
depends on nothing but the row. Without filters; `rollout/sampler.py` has those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a piece


@triton.jit
def _pieces(
    logits, temperature, peaks, sums, best, vocab, row_stride, pieces, BLOCK: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = piece * BLOCK + tl.arange(0, BLOCK)
    warm = tl.load(temperature + row)
    warm = tl.where(warm > 0, warm, 1.0)
    x = tl.load(logits + row * row_stride + offs, mask=offs < vocab, other=float("-inf")).to(tl.float32) / warm
    peak = tl.max(x, 0)
    broken = tl.sum((x != x).to(tl.int32), 0) > 0
    peak = tl.where(broken, float("nan"), peak)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(peaks + row * pieces + piece, peak)
    tl.store(sums + row * pieces + piece, tl.sum(tl.exp(x - safe).to(tl.float64), 0))
    tl.store(best + row * pieces + piece, tl.min(tl.where(x == peak, offs, vocab), 0))


@triton.jit
def _choose(
    logits, temperature, uniform, peaks, sums, best, tokens, logprobs, bad, vocab, row_stride, pieces,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, offs = tl.arange(0, PIECES), tl.arange(0, BLOCK)
    heat = tl.load(temperature + row)
    warm = tl.where(heat > 0, heat, 1.0)
    every = tl.load(peaks + row * pieces + p, mask=p < pieces, other=float("-inf"))
    peak = tl.max(every, 0)
    broken = (tl.sum((every != every).to(tl.int32), 0) > 0) | (tl.abs(peak) == float("inf"))
    if broken:
        tl.store(bad, 1)
        peak = 0.0
    mass = tl.load(sums + row * pieces + p, mask=p < pieces, other=0.0) * tl.exp(
        tl.where(every == float("-inf"), float("-inf"), every - peak)
    ).to(tl.float64)
    total = tl.sum(mass, 0)
    if GIVEN:
        token = tl.load(tokens + row).to(tl.int32)
    elif heat > 0:
        # searchsorted(cumulative, uniform * total, right): how many cumulative sums are at most the target
        target = tl.load(uniform + row) * total
        upto = tl.cumsum(mass, 0)
        last = tl.max(tl.where(mass > 0, p, 0), 0)
        piece = tl.minimum(tl.sum((upto <= target).to(tl.int32), 0), last)
        before = tl.sum(tl.where(p < piece, mass, 0.0), 0)
        at = piece * BLOCK + offs
        x = tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32) / warm
        share = tl.exp(x - peak).to(tl.float64)
        inside = before + tl.cumsum(share, 0)
        last = tl.max(tl.where(share > 0, offs, 0), 0)
        token = piece * BLOCK + tl.minimum(tl.sum(((inside <= target) & (at < vocab)).to(tl.int32), 0), last)
    else:
        token = tl.min(tl.where((every == peak) & (p < pieces), tl.load(best + row * pieces + p, mask=p < pieces, other=vocab), vocab), 0)  # fmt: skip
        token = tl.minimum(token, vocab - 1)
    x = tl.load(logits + row * row_stride + token).to(tl.float32) / warm
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, (x - peak) - tl.log(total).to(tl.float32))


def draw(
    logits: Tensor, temperature: Tensor, uniform: Tensor, tokens: Tensor | None = None, logprobs: Tensor | None = None,
    bad: Tensor | None = None, given: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One token a row: tokens int64 [rows], logprobs fp32 [rows], bad int32 [1], which turns 1 when a row's peak is not finite. Tokens are ids
    of the vocabulary even then: the next step may read them before the host has seen the flag.

    logits [rows, V]; temperature fp32 [rows], 0 takes the largest logit (lowest id on ties; its log-probability is of temperature 1);
    uniform fp64 [rows] in [0, 1). given: only the log-probabilities of `tokens` are wanted, the same bits as when they were drawn.
    Graph-safe.
    """
    rows, vocab = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device) if tokens is None else tokens
    logprobs = torch.empty(rows, dtype=torch.float32, device=device) if logprobs is None else logprobs
    bad = torch.zeros(1, dtype=torch.int32, device=device) if bad is None else bad
    pieces = triton.cdiv(vocab, BLOCK)
    peaks = torch.empty(rows, pieces, dtype=torch.float32, device=device)
    sums = torch.empty(rows, pieces, dtype=torch.float64, device=device)
    best = torch.empty(rows, pieces, dtype=torch.int32, device=device)
    if rows:
        _pieces[(rows, pieces)](
            logits, temperature, peaks, sums, best, vocab, logits.stride(0), pieces, BLOCK=BLOCK, num_warps=8
        )
        _choose[(rows,)](
            logits, temperature, uniform, peaks, sums, best, tokens, logprobs, bad, vocab, logits.stride(0), pieces,
            BLOCK=BLOCK, PIECES=triton.next_power_of_2(pieces), GIVEN=given, num_warps=8,
        )  # fmt: skip
    return tokens, logprobs, bad
