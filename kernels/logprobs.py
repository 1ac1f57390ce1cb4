"""Log-probabilities and entropies of given tokens on a GPU, forward and backward, without a [tokens, vocabulary] tensor.

The products are cuBLAS's, in chunks of (tokens x vocabulary) with fp32 results; one kernel folds a chunk of logits into running
maxima and sums (Milakov and Gimelshein, arXiv 1805.02867), another turns it into the logits' gradient. The vocabulary is the outer
loop: a chunk's weight gradient is finished before the next begins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 1 << 28  # fp32 logits held at once
CHUNK_VOCABULARY = 4096

Kept = tuple[Tensor, Tensor]


@triton.jit(do_not_specialize=["first_row", "low"])
def _mark_kept(indptr, ids, bitmap, first_row, low, high, words, BLOCK: tl.constexpr):
    """Bits of a chunk's tokens in each row's kept set: bitmap int32 [rows, words]; a row without a set has every bit."""
    row = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(indptr + first_row + row), tl.load(indptr + first_row + row + 1)
    offs = tl.arange(0, BLOCK)
    if start == stop:
        for w in range(0, words, BLOCK):
            tl.store(bitmap + row * words + w + offs, offs * 0 - 1, mask=w + offs < words)
    else:
        for i in range(start, stop, BLOCK):
            token = tl.load(ids + i + offs, mask=i + offs < stop, other=-1)
            inside = (token >= low) & (token < high)
            place = tl.where(inside, token - low, 0).to(tl.int32)
            tl.atomic_or(bitmap + row * words + (place >> 5), 1 << (place & 31), mask=inside, sem="relaxed")


@triton.jit
def _load_logits(logits, bitmap, row, words, v, width, KEPT: tl.constexpr):
    z = tl.load(logits + row * width + v, mask=v < width, other=float("-inf"))
    if KEPT:
        word = tl.load(bitmap + row * words + (v >> 5), mask=v < width, other=0)
        z = tl.where(((word >> (v & 31)) & 1) != 0, z, float("-inf"))
    return z


@triton.jit(do_not_specialize=["first_row", "low"])
def _fold(
    logits, bitmap, targets, temperature, top, total, mean, chosen, first_row, low, width, words, BLOCK: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """One row of a chunk into its running maximum, sum of exponentials, sum of exponentials times logits, and target's logit."""
    row = tl.program_id(0).to(tl.int64)
    at = first_row + row
    inverse = 1.0 / tl.load(temperature + at)
    target = tl.load(targets + at) - low
    old = tl.load(top + at)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    means = tl.zeros([BLOCK], tl.float32)
    offs = tl.arange(0, BLOCK)
    for v0 in range(0, width, BLOCK):
        z = _load_logits(logits, bitmap, row, words, v0 + offs, width, KEPT) * inverse
        new = tl.maximum(best, z)
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink, weight = tl.exp(best - safe), tl.exp(z - safe)
        sums = sums * shrink + weight
        means = means * shrink + weight * tl.where(weight > 0, z, 0.0)
        best = new
    new = tl.maximum(old, tl.max(best, 0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink, inner = tl.exp(old - safe), tl.exp(best - safe)
    tl.store(total + at, tl.load(total + at) * shrink + tl.sum(sums * inner, 0))
    tl.store(mean + at, tl.load(mean + at) * shrink + tl.sum(means * inner, 0))
    tl.store(top + at, new)
    if (target >= 0) & (target < width):
        z = _load_logits(logits, bitmap, row, words, target, width, KEPT) * inverse
        tl.store(chosen + at, z)


@triton.jit(do_not_specialize=["first_row", "low"])
def _slope(
    logits, bitmap, targets, temperature, lse, entropy, grad_logprob, grad_entropy, grad, first_row, low, width, words,
    BLOCK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """d/dz of log p[target] is onehot - p, of the entropy H it is -p (log p + H); both over the temperature."""
    row, v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = first_row + row
    inverse = 1.0 / tl.load(temperature + at)
    log_p = _load_logits(logits, bitmap, row, words, v, width, KEPT) * inverse - tl.load(lse + at)
    p = tl.exp(log_p)
    by_logprob, by_entropy = tl.load(grad_logprob + at), tl.load(grad_entropy + at)
    slope = p * (-by_logprob - by_entropy * (tl.where(p > 0, log_p, 0.0) + tl.load(entropy + at)))
    slope += tl.where(v == tl.load(targets + at) - low, by_logprob, 0.0)
    tl.store(grad + row * width + v, (slope * inverse).to(grad.dtype.element_ty), mask=v < width)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 from bf16 or fp32 operands."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _Chunks:
    """How tokens and vocabulary are cut, and the bitmap of kept sets of a chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, kept: Kept | None, chunk_bytes: int, vocabulary: int):
        self.vocab = [(a, min(a + vocabulary, len(weight))) for a in range(0, len(weight), vocabulary)]
        step = max(1, min(len(hidden), chunk_bytes // (4 * vocabulary)))
        self.rows = [(a, min(a + step, len(hidden))) for a in range(0, len(hidden), step)]
        self.kept = None if kept is None else tuple(x.to(hidden.device, torch.int64) for x in kept)

    def bitmap(self, rows: tuple[int, int], vocab: tuple[int, int]) -> tuple[Tensor | None, int]:
        if self.kept is None:
            return None, 0
        indptr, ids = self.kept
        words = (vocab[1] - vocab[0] + 31) // 32
        bits = torch.zeros(rows[1] - rows[0], words, dtype=torch.int32, device=ids.device)
        _mark_kept[(len(bits),)](indptr, ids, bits, rows[0], *vocab, words, BLOCK=128)
        return bits, words


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, kept: Kept | None, chunk_bytes: int, vocabulary: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens = len(hidden)
        top = torch.full((tokens,), -torch.inf, dtype=torch.float32, device=hidden.device)
        total, mean = torch.zeros_like(top), torch.zeros_like(top)
        chosen = torch.full_like(top, -torch.inf)
        chunks = _Chunks(hidden, weight, kept, chunk_bytes, vocabulary)
        block = 1024 if hidden.is_cuda else 64
        for vocab in chunks.vocab:
            for rows in chunks.rows:
                bits, words = chunks.bitmap(rows, vocab)
                logits = _product(hidden[slice(*rows)], weight[slice(*vocab)].T)
                _fold[(rows[1] - rows[0],)](
                    logits, bits, targets, temperature, top, total, mean, chosen, rows[0], vocab[0], logits.shape[1], words,
                    BLOCK=block, KEPT=kept is not None,
                )  # fmt: skip
        lse = top + torch.log(total)
        entropy = lse - mean / total
        logprobs = chosen - lse
        if kept is not None and bool((chosen == -torch.inf).any()):
            row = int((chosen == -torch.inf).nonzero()[0])
            raise ValueError(
                f"token {int(targets[row])} of row {row} is not in that row's kept set: the sets belong to other tokens"
            )
        ctx.save_for_backward(hidden, weight, targets, temperature, lse, entropy)
        ctx.chunks, ctx.block = chunks, block
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperature, lse, entropy = ctx.saved_tensors
        chunks: _Chunks = ctx.chunks
        by_logprob, by_entropy = (
            torch.zeros_like(lse) if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy)
        )
        grad_hidden = (
            torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if ctx.needs_input_grad[0] else None
        )
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for vocab in chunks.vocab:
            matrix = weight[slice(*vocab)]
            total = (
                torch.zeros(matrix.shape, dtype=torch.float32, device=weight.device)
                if grad_weight is not None
                else None
            )
            for rows in chunks.rows:
                bits, words = chunks.bitmap(rows, vocab)
                states = hidden[slice(*rows)]
                logits = _product(states, matrix.T)
                width = logits.shape[1]
                slope = torch.empty(logits.shape, dtype=hidden.dtype, device=hidden.device)
                _slope[(len(logits), triton.cdiv(width, ctx.block))](
                    logits, bits, targets, temperature, lse, entropy, by_logprob, by_entropy, slope, rows[0], vocab[0], width, words,
                    BLOCK=ctx.block, KEPT=chunks.kept is not None,
                )  # fmt: skip
                del logits
                if grad_hidden is not None:
                    _add_product(grad_hidden[slice(*rows)], slope, matrix)
                if total is not None:
                    _add_product(total, slope.T, states)
            if grad_weight is not None and total is not None:
                grad_weight[slice(*vocab)] = total
        done = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return done, grad_weight, None, None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, kept: Kept | None = None,
    chunk_bytes: int = CHUNK_BYTES, vocabulary: int = CHUNK_VOCABULARY,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities and entropies fp32 [T], differentiable in hidden [T, C] and weight [V, C] (one dtype).

    targets int64 [T] in [0, V); temperature fp32 [T]; kept: indptr [T + 1] and token ids, an empty row meaning the whole vocabulary.
    Extra memory: 1.5 times chunk_bytes (fp32 logits and their gradient) and fp32 sums of the gradients of hidden and of one
    vocabulary chunk. Raises ValueError when a target is outside its set.
    """
    if hidden.dtype != weight.dtype or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"token_logprobs: hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not fit"
        )
    return _TokenLogprobs.apply(
        hidden.contiguous(), weight, targets, temperature.contiguous(), kept, chunk_bytes, vocabulary
    )
