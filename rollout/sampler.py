"""Drawing tokens: filters, one uniform number a row from a counter, log-probabilities of what was really drawn from.

Every filter is a threshold on the logits, so the kept set of a row is `logit >= threshold`: ties at the boundary stay in together, and
the set depends on nothing but the row. Filters apply in the order top_k, top_p (mass of the renormalised top_k), min_p (relative to the
largest probability). The draw inverts the cumulative distribution at a hash of (stream, position): the same request draws the same
tokens whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from winnow.kernels import ops

_FIRST_CANDIDATES = 1024  # top_p alone sorts only so many logits, and all of them when those do not hold the mass


@dataclass(frozen=True, kw_only=True, slots=True)
class RowParams:
    """Sampling parameters of a batch, one entry a row: temperature, top_p, min_p fp32; top_k int64; stream uint64; position int64."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    stream: np.ndarray
    position: np.ndarray

    @property
    def filtered(self) -> np.ndarray:
        """bool [rows]: which rows cut their vocabulary."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """tokens int64 [rows]; logprobs fp32 [rows] under the distribution drawn from; kept: per row int32 ids, None where not filtered."""

    tokens: np.ndarray
    logprobs: np.ndarray
    kept: list[np.ndarray | None] | None


def stream_seed(seed: int, request_id: str, sample: int) -> int:
    """A 64-bit number for one sample of one request; with the token's position it fixes the draw."""
    digest = hashlib.blake2b(f"{seed}/{request_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(stream: np.ndarray, position: np.ndarray) -> np.ndarray:
    """fp64 [rows] in [0, 1): splitmix64's finaliser (Steele et al. 2014) of stream + (position + 1) * golden ratio."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        x = stream.astype(np.uint64) + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _top_k_threshold(logits: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest logit of each row, -inf where top_k is 0 or reaches the vocabulary. [rows]."""
    vocab = logits.shape[1]
    active = (top_k > 0) & (top_k < vocab)
    if not bool(active.any()):
        return torch.full_like(logits[:, 0], -torch.inf)
    largest = logits.topk(int(top_k[active].max()), dim=1, sorted=True).values
    kth = largest.gather(1, (top_k.clamp(1, largest.shape[1]) - 1)[:, None])[:, 0]
    return torch.where(active, kth, -torch.inf)


def _top_p_threshold(logits: Tensor, top_p: Tensor, floor: Tensor) -> Tensor:
    """The logit of the last token of the smallest head whose mass, among logits >= floor, reaches top_p. [rows]."""
    vocab = logits.shape[1]
    total = torch.logsumexp(logits.masked_fill(logits < floor[:, None], -torch.inf), dim=1, keepdim=True)
    for width in (min(_FIRST_CANDIDATES, vocab), vocab):
        ordered = logits.topk(width, dim=1, sorted=True).values  # [rows, width] descending
        mass = torch.exp(ordered - total).masked_fill(ordered < floor[:, None], 0.0).double().cumsum(1)
        complete = (mass[:, -1] >= top_p) | (ordered[:, -1] < floor)
        if width == vocab or bool(complete.all()):
            break
    # a token is in the head when the mass before it has not reached top_p
    inside = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1) < top_p[:, None]
    last = inside.sum(1, keepdim=True) - 1
    return torch.maximum(ordered.gather(1, last)[:, 0], floor)


def thresholds(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest tempered logit that each row keeps. logits fp32 [rows, V]; -inf keeps all. [rows]."""
    threshold = _top_k_threshold(logits, top_k)
    if bool((top_p < 1).any()):
        threshold = torch.where(top_p < 1, _top_p_threshold(logits, top_p, threshold), threshold)
    if bool((min_p > 0).any()):
        relative = logits.amax(1) + torch.log(min_p)
        threshold = torch.where(min_p > 0, torch.maximum(threshold, relative), threshold)
    return threshold


def sample(logits: Tensor, params: RowParams, keep_sets: bool = True) -> Drawn:
    """One token a row. logits fp32 [rows, V]; a row of temperature 0 takes the largest logit (lowest id on ties), and its
    log-probability is under the unfiltered distribution of temperature 1. Raises ValueError when a row holds no finite maximum.
    """
    peak = logits.amax(1)
    if not bool(torch.isfinite(peak).all()):
        row = int((~torch.isfinite(peak)).nonzero()[0])
        raise ValueError(f"the logits of row {row} peak at {float(peak[row])}: the weights or the cache are not finite")
    device = logits.device
    greedy = params.temperature == 0
    filtered = params.filtered
    temperature = torch.from_numpy(np.where(greedy, 1.0, params.temperature).astype(np.float32)).to(device)
    tempered = logits / temperature[:, None]
    kept: list[np.ndarray | None] | None = None
    if filtered.any():
        rows = torch.from_numpy(np.flatnonzero(filtered)).to(device)
        picked = tempered[rows]
        columns = [torch.from_numpy(a[filtered]).to(device) for a in (params.top_k, params.top_p, params.min_p)]
        threshold = thresholds(picked, *columns)
        picked = picked.masked_fill(picked < threshold[:, None], -torch.inf)
        tempered[rows] = picked
        if keep_sets:
            kept = [None] * len(filtered)
            row_of, ids = (picked > -torch.inf).nonzero(as_tuple=True)
            bounds = np.cumsum(np.bincount(row_of.cpu().numpy(), minlength=len(rows)))[:-1]
            parts = np.split(ids.to(torch.int32).cpu().numpy(), bounds)
            for row, part in zip(np.flatnonzero(filtered).tolist(), parts, strict=True):
                kept[row] = part
    total = torch.logsumexp(tempered, dim=1, keepdim=True)
    if greedy.all():
        tokens = logits.argmax(1, keepdim=True)
    else:
        cumulative = (
            torch.exp(tempered - total).double().cumsum(1)
        )  # [rows, V]; fp32 would lose the tail of a large vocabulary
        mass = cumulative[:, -1:].contiguous()
        draw = torch.from_numpy(uniforms(params.stream, params.position)).to(device)[:, None] * mass
        tokens = torch.searchsorted(cumulative, draw, right=True)
        tokens = torch.minimum(
            tokens, torch.searchsorted(cumulative, mass)
        )  # never past the last token with a probability
        if greedy.any():
            tokens = torch.where(torch.from_numpy(greedy).to(device)[:, None], logits.argmax(1, keepdim=True), tokens)
    logprobs = (tempered.gather(1, tokens) - total)[:, 0]
    return Drawn(tokens=tokens[:, 0].cpu().numpy(), logprobs=logprobs.cpu().numpy(), kept=kept)


def draw(logits: Tensor, params: RowParams) -> Drawn:
    """As `sample` where no row is filtered, by the kernel that decode steps use: the same bits as theirs."""
    rows, device = len(logits), logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    faults = torch.zeros(1, dtype=torch.int32, device=device)
    temperature = torch.from_numpy(params.temperature).to(device)
    uniform = torch.from_numpy(uniforms(params.stream, params.position)).to(device)
    ops.draw(logits, temperature, uniform, tokens, logprobs, faults)
    if int(faults):
        raise ValueError("the logits of a step are not finite: the weights or the cache are not finite")
    return Drawn(tokens=tokens.cpu().numpy(), logprobs=logprobs.cpu().numpy(), kept=None)
