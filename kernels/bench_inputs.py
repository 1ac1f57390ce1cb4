"""Inputs and checks that the rows of `winnow bench kernels` share. All tensors on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.bench_timing import Case

K, PAGE = 2048, 64
SHAPES = ((1, 131072), (8, 131072), (32, 65536), (128, 32768))  # batch, length


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Unit normal numbers, drawn in pieces."""
    x = torch.empty(*shape, dtype=dtype, device="cuda")
    for piece in x.flatten().split(1 << 28):
        piece.normal_()
    return x


def paged(batch: int, length: int) -> tuple[Tensor, Tensor, int]:
    """A shuffled block table, the lengths, the number of pages."""
    pages = batch * length // PAGE
    table = torch.randperm(pages, device="cuda").int().reshape(batch, -1)
    return table, torch.full((batch,), length, dtype=torch.int32, device="cuda"), pages


def picks(batch: int, length: int) -> Tensor:
    """Uniform sets int32 [batch, K], ascending."""
    return torch.stack([torch.randperm(length, device="cuda")[:K].sort().values for _ in range(batch)]).int()


def places(table: Tensor, indices: Tensor) -> Tensor:
    """Physical slots of logical positions."""
    at = indices.long()
    return (table.gather(1, at // PAGE).long() * PAGE + at % PAGE).int()


def distance(got: Tensor, want: Tensor) -> float:
    """1 - 2xy / (x^2 + y^2), in float64."""
    x, y = got.double(), want.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def full_counts(batch: int) -> Tensor:
    return torch.full((batch,), K, dtype=torch.int32, device="cuda")


Found = Callable[[], Any] | str


def every(found: Sequence[Found]) -> Sequence[Callable[[], Any]] | str:
    """The peer's calls, or the first reason why there are none."""
    calls = [f for f in found if not isinstance(f, str)]
    return calls if len(calls) == len(found) else next(f for f in found if isinstance(f, str))


def turns(call: Callable[[int], Any], sets: int) -> list[Callable[[], Any]]:
    """`call` on each input set."""
    return [partial(call, i) for i in range(sets)]


def index_inputs(batch: int, length: int, heads: int = 64, fp8: bool = True) -> tuple[Tensor, ...]:
    """q, cache, w, table and lengths of the indexer's decode, D 128."""
    table, lengths, pages = paged(batch, length)
    w = torch.randn(batch, heads, device="cuda")
    if not fp8:
        return noise(batch, heads, 128), noise(pages, PAGE, 128), w, table, lengths
    values = torch.cat(
        [noise(len(part), PAGE * 128).to(torch.float8_e4m3fn) for part in torch.arange(pages).split(20000)]
    )
    cache = torch.cat([values.view(torch.uint8), (torch.rand(pages, PAGE, device="cuda") + 0.5).view(torch.uint8)], 1)
    return noise(batch, heads, 128).to(torch.float8_e4m3fn), cache, w, table, lengths


def cases(make: Callable[..., Case], shapes: Sequence[tuple[Any, ...]]) -> Iterator[Case]:
    """One case at a time, so that one shape's tensors are gone before the next are made."""
    for shape in shapes:
        yield make(*shape)
        torch.cuda.empty_cache()
