"""Index sets for the rows of bench_train.py: recorded from a trained indexer, or synthetic, local and uniform."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from winnow.kernels.selection import Selection

TOP_K = 2048


def _best(scores: Callable[[int, int], Tensor], length: int, top_k: int, device: str) -> Selection:
    """Top-k of scores(a, b) [b - a, b] of the queries a .. b, in chunks."""
    indices = torch.full((length, top_k), -1, dtype=torch.int32, device=device)
    counts = torch.arange(1, length + 1, device=device).clamp(max=top_k).int()
    step = max(1, (1 << 28) // length)
    for a in range(0, length, step):
        b = min(length, a + step)
        rows = torch.arange(a, b, device=device)[:, None]
        hidden = torch.arange(b, device=device) > rows
        chosen = scores(a, b).masked_fill_(hidden, -torch.inf).topk(min(top_k, b), 1).indices
        chosen = torch.where(chosen <= rows, chosen, 1 << 30).sort(1).values
        indices[a:b, : chosen.shape[1]] = torch.where(chosen < 1 << 30, chosen, -1).int()
    return Selection(indices, counts)


def local_sets(length: int, seed: int = 1, top_k: int = TOP_K, device: str = "cuda") -> Selection:
    """Sets with a trained indexer's kind of locality, synthetic.

    score(t, s) = importance of s, N(0, 1) + <u_t, v_s> + 2 exp(-(t - s) / 512); u and v are 32 numbers that share a topic for 256
    tokens (9/10 of u, 7/10 of v). Neighbours then share about 0.8 of their sets, some keys are everyone's, some a passage's.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    importance = normal(length)
    topic = normal(-(-length // 256), 32).repeat_interleave(256, 0)[:length]
    u = 0.9**0.5 * topic + 0.1**0.5 * normal(length, 32)
    v = (0.7**0.5 * topic + 0.3**0.5 * normal(length, 32)) / 32**0.5
    place = torch.arange(length, device=device)

    def scores(a: int, b: int) -> Tensor:
        distance = (place[a:b, None] - place[:b]).clamp(min=0)
        return u[a:b] @ v[:b].T + importance[:b] + 2 * torch.exp(-distance / 512.0)

    return _best(scores, length, top_k, device)


def uniform_sets(length: int, seed: int = 1) -> Selection:
    generator = torch.Generator("cuda").manual_seed(seed)
    return _best(lambda a, b: torch.rand(b - a, b, generator=generator, device="cuda"), length, TOP_K, "cuda")


@dataclass(frozen=True)
class Sets:
    """Where a row's sets come from: recorded ones of `folder`, or synthetic ones without it."""

    folder: Path | None = None

    def of(self, length: int) -> Iterator[tuple[str, Selection]]:
        """(name, sets) of a length: every recorded layer, or local_sets. A longer recording serves a shorter length: sets are causal."""
        if self.folder is None:
            yield "local_sets", local_sets(length)
            return
        found = [(re.fullmatch(r"(\d+)-layer(\d+)\.pt", file.name), file) for file in self.folder.iterdir()]
        longer = sorted((int(m[1]), int(m[2]), file) for m, file in found if m and int(m[1]) >= length)
        if not longer:
            raise ValueError(
                f"--sets {self.folder} holds no sets of {length} tokens: record them with winnow.rl.recorded_sets"
            )
        for recorded, layer, file in longer:
            if recorded == longer[0][0]:
                yield f"recorded, layer {layer}", read_sets(file, length)


def read_sets(file: Path, length: int, device: str = "cuda", top_k: int = TOP_K) -> Selection:
    """The sets of the first `length` queries of a recording, checked: top_k or all visible positions each, ascending, none in the future."""
    indices = torch.load(file, map_location="cpu", weights_only=True)["indices"][:length].to(device)
    counts = (indices >= 0).sum(1).int()
    place = torch.arange(length, device=device)
    gaps = indices.diff(dim=1)
    right = (
        len(indices) == length
        and indices.shape[1] == top_k
        and bool((counts == (place + 1).clamp(max=top_k)).all())
        and bool((indices.max(1).values <= place).all())
        and bool(((gaps > 0) | (indices[:, 1:] < 0)).all())
    )
    if not right:
        raise ValueError(f"{file} does not hold causal sets of {top_k} positions of {length} queries")
    return Selection(indices, counts)


def density(sets: Selection, size: int = 32) -> str:
    """How alike neighbours are: the union of `size` neighbouring full sets over their size, mean over 64 places."""
    length, k = sets.indices.shape
    unions = []
    for a in torch.linspace(k, length - size, 64).long().tolist():
        unions.append(len(sets.indices[a : a + size].unique()) / k)
    return f"union of {size} neighbours {sum(unions) / len(unions):.2f} k"
