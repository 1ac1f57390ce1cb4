"""Log-probabilities and entropies of given tokens from hidden states, without a [tokens, vocabulary] tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels.packing import round_up

CHUNK_ELEMENTS = 1 << 23  # logits held at once


def _chunk_logits(
    hidden: Tensor, weight: Tensor, temperature: Tensor, kept: tuple[Tensor, Tensor] | None, a: int
) -> Tensor:
    """Tempered logits [C, V] of rows a..a+C, -inf outside each row's kept set."""
    # Filled up to whole blocks: a CPU's matrix library gives the rows beyond them other last bits (as in packing.py).
    padding = round_up(len(hidden)) - len(hidden) if hidden.device.type == "cpu" else 0
    states = torch.nn.functional.pad(hidden, (0, 0, 0, padding)) if padding else hidden
    logits = (states @ weight.T)[: len(hidden)].div_(temperature[:, None])
    if kept is None:
        return logits
    indptr, ids = kept
    b = a + len(hidden)
    counts = (indptr[a + 1 : b + 1] - indptr[a:b]).to(hidden.device)
    if int(counts.sum()) == 0:
        return logits
    rows = torch.arange(len(hidden), device=hidden.device).repeat_interleave(counts)
    outside = (counts > 0)[:, None].expand(logits.shape).clone()
    outside[rows, ids[int(indptr[a]) : int(indptr[b])].to(hidden.device).long()] = False
    return logits.masked_fill_(outside, -torch.inf)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        kept: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        matrix = weight.to(wide)
        logprobs, entropy = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        step = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for a in range(0, len(hidden), step):
            rows = slice(a, a + step)
            logits = _chunk_logits(hidden[rows].to(wide), matrix, temperature[rows], kept, a)
            lse = torch.logsumexp(logits, 1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - lse
            probs = (logits - lse[:, None]).exp_()
            if kept is not None:
                logits = logits.masked_fill_(logits == -torch.inf, 0.0)
            entropy[rows] = lse - (probs * logits).sum(1)
        if kept is not None and bool((logprobs == -torch.inf).any()):
            row = int((logprobs == -torch.inf).nonzero()[0])
            raise ValueError(
                f"token {int(targets[row])} of row {row} is not in that row's kept set: the sets belong to other tokens"
            )
        ctx.save_for_backward(hidden, weight, targets, temperature)
        ctx.kept, ctx.step = kept, step
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperature = ctx.saved_tensors
        wide = torch.promote_types(hidden.dtype, torch.float32)
        matrix = weight.to(wide)
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if ctx.needs_input_grad[1] else None
        for a in range(0, len(hidden), ctx.step):
            rows = slice(a, a + ctx.step)
            states = hidden[rows].to(wide)
            logits = _chunk_logits(states, matrix, temperature[rows], ctx.kept, a)
            grad = _logit_gradient(
                logits, targets[rows], *(None if g is None else g[rows] for g in (grad_logprobs, grad_entropy))
            )
            grad.div_(temperature[rows, None])
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ matrix
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, states)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None, None, None,
        )  # fmt: skip


def _logit_gradient(
    logits: Tensor, targets: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """d/dz of log p[target] is onehot - p; of the entropy H is -p (log p + H)."""
    log_p = logits.sub_(torch.logsumexp(logits, 1, keepdim=True))
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if grad_logprobs is not None:
        grad = p.mul(-grad_logprobs[:, None])
        grad.scatter_add_(1, targets[:, None], grad_logprobs[:, None].to(grad.dtype))
    if grad_entropy is not None:
        log_p = log_p.masked_fill_(log_p == -torch.inf, 0.0)
        entropy = -(p * log_p).sum(1, keepdim=True)
        grad.sub_(p.mul(log_p.add_(entropy)).mul_(grad_entropy[:, None]))
    return grad


def logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, kept: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, kept)
