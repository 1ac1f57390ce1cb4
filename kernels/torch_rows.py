"""`rows.py` in torch: what those launches mean, and what runs where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, wide: Tensor | None = None
) -> Tensor:
    if residual is not None:
        x = residual.add_(x)
    x32 = x.float()
    y = weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if wide is not None:
        wide.copy_(y)
    return y


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def split_heads(
    qkv: Tensor, heads: tuple[int, int, int], norms: tuple[Tensor, Tensor] | None, eps: float, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    hq, hkv, dim = heads
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in qkv.split([hq * dim, hkv * dim, hkv * dim], -1))
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = _turn(q, cos, sin), _turn(k, cos, sin)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache.view(-1, *cache.shape[2:])[slots] = rows.to(cache.dtype)
    return q, k if keep else None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] by angles [T, D]."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def index_rows(
    proj: Tensor, shape: tuple[int, int, int], norm: tuple[Tensor, Tensor, float], cos: Tensor, sin: Tensor, layout: str,
    slots: Tensor, cache: Tensor, queries: bool, keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    heads, dim, rope = shape
    proj = proj if proj.ndim == 2 else proj.sum(0)
    step = cos.shape[-1] // rope if rope else 1
    last = cos.shape[-1] // 2 if rope else 0
    c, s = cos[:, :last:step].float(), sin[:, :last:step].float()
    keys = proj[:, heads * dim : heads * dim + dim] if queries else proj
    k = torch.nn.functional.layer_norm(keys, (dim,), norm[0], norm[1], norm[2])
    k = _turn_part(k, c, s, layout).to(cache.dtype)
    cache.view(-1, dim)[slots] = k
    kept = k if keep else None
    if not queries:
        return None, kept, None
    q = proj[:, : heads * dim].unflatten(-1, (heads, dim))
    q = _turn_part(q, c[:, None], s[:, None], layout).to(cache.dtype)
    return q, kept, proj[:, heads * dim + dim :] * (heads * dim) ** -0.5


def _turn_part(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """The first 2 * cos.shape[-1] numbers of x turned, in pairs (i, i + half) or (2 i, 2 i + 1)."""
    width = 2 * cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    a, b = (head[..., 0::2], head[..., 1::2]) if layout == "interleaved" else head.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if layout == "interleaved" else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)


def draw(
    logits: Tensor, temperature: Tensor, uniform: Tensor, tokens: Tensor, logprobs: Tensor, faults: Tensor, given: bool = False
) -> None:  # fmt: skip
    wide = logits.float()
    faults.masked_fill_(~torch.isfinite(wide.amax(1)).all(), 1)
    warm = wide / torch.where(temperature > 0, temperature, 1.0)[:, None]
    total = torch.logsumexp(warm, 1, keepdim=True)
    if not given:
        upto = torch.exp(warm - total).double().cumsum(1)
        mass = upto[:, -1:].contiguous()
        chosen = torch.searchsorted(upto, uniform[:, None] * mass, right=True)
        chosen = torch.minimum(chosen, torch.searchsorted(upto, mass))  # never past the last token with a probability
        drawn = torch.where(temperature[:, None] > 0, chosen, wide.argmax(1, keepdim=True))[:, 0]
        tokens.copy_(drawn.clamp(0, logits.shape[1] - 1))
    logprobs.copy_((warm.gather(1, tokens[:, None]) - total)[:, 0])
