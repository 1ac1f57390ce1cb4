"""fp32 masters of weights in 16 bits: where in its rounding interval each begins.

A weight in bf16 stands for every number that rounds to it. A master that begins in the middle has half a spacing to go before the model
sees anything of it: at a learning rate of 1e-5, ten updates for most weights, and a hundred at 1e-6, in which the optimizer believes that
it moves and nothing happens. One that begins anywhere in its interval crosses into the next with the probability that its step is a part of
the spacing, so the model moves as far as its masters do on average from the first update on (dither: Roberts 1962; docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from winnow.rl.ranks import split_like, whole


def masters_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Parameter -> fp32 master, of those in 16 bits. Each rounds to its parameter, bit for bit. The same for every split over ranks, all
    of which must ask."""
    narrow = [p for p in parameters if p.dtype != torch.float32]
    return {p: split_like(dithered(whole(p), seed), p.detach()) for seed, p in enumerate(narrow)}


def dithered(weight: Tensor, seed: int) -> Tensor:
    """fp32, anywhere in the interval that rounds to `weight`. In its middle where the draw lies outside: the interval of a power of two, of 0,
    or at either end of the dtype's range is another than its neighbours'."""
    draw = torch.Generator(weight.device).manual_seed(seed)
    middle = weight.float()
    spacing = torch.ldexp(torch.full_like(middle, torch.finfo(weight.dtype).eps / 2), torch.frexp(middle).exponent)
    noise = torch.rand(weight.shape, generator=draw, device=weight.device) - 0.5
    found = middle + noise * spacing
    return torch.where(found.to(weight.dtype) == weight, found, middle)
