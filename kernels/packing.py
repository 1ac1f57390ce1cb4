"""From packed tokens to padded batches and back, so that many short sequences cost a few large operations.

Sequences of similar length share a batch, padded on the right: causal rows never see the padding. A plan is made once for a list of
lengths and kept, since every layer of a model asks for the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_GROUP_TOKENS = 1 << 14  # padded query tokens in one batch
# Rows of a product are filled up to a multiple: a CPU's matrix library computes few rows, and the ones beyond a thread's last block, with
# another kernel, whose last bits differ, and the same token would get another result in a longer sequence or a larger batch. How many
# are few follows the width of the CPU's vectors: up to 3 with AVX2, up to 15 with AVX-512 (docs/experiments.md).
ROW_MULTIPLE = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def round_up(count: int) -> int:
    """The next multiple of ROW_MULTIPLE."""
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Batch:
    """Sequences computed together.

    sequences int64 [N]; rows int64 [N, Lq]: packed row of each query (padding repeats a real row); valid bool [N, Lq]; positions
    int64 [N, Lq]: logical position of each query, the last one repeated over the padding; kv_lens int64 [N]; Lk: the longest
    context. `span` is the packed slice when the batch is contiguous and needs no padding.
    """

    sequences: Tensor
    rows: Tensor
    valid: Tensor
    positions: Tensor
    kv_lens: Tensor
    num_keys: int
    span: tuple[int, int] | None
    square: bool  # queries are the whole context: position i is row i

    def pad(self, x: Tensor) -> Tensor:
        """Packed [T, ...] -> padded [N, Lq, ...]; a view when no padding is needed."""
        if self.span is not None:
            return x[self.span[0] : self.span[1]].reshape(*self.rows.shape, *x.shape[1:])
        return x.index_select(0, self.rows.reshape(-1)).view(*self.rows.shape, *x.shape[1:])

    def unpad_into(self, out: Tensor, padded: Tensor) -> None:
        """Write the valid rows of padded [N, Lq, ...] to their places in out [T, ...]."""
        if self.span is not None:
            out[self.span[0] : self.span[1]] = padded.reshape(-1, *padded.shape[2:]).to(out.dtype)
        else:
            out[self.rows[self.valid]] = padded[self.valid].to(out.dtype)

    def chunks(self, start: int, per_pair: int, budget: int, most: int = 256) -> list[tuple[int, int]]:
        """Query ranges [a, b) from `start` on, of at most `most` rows, with N * rows * Lk * per_pair <= budget where possible."""
        num, length = self.rows.shape
        size = min(most, budget // max(1, num * self.num_keys * per_pair)) // ROW_MULTIPLE * ROW_MULTIPLE
        size = max(ROW_MULTIPLE, size)
        return [(a, min(a + size, length)) for a in range(start, length, size)]

    def keys_until(self, stop: int) -> int:
        """Keys that the queries before row `stop` may see: the causal limit."""
        return min(stop, self.num_keys) if self.square else self.num_keys


def batches(cu_seqlens: Tensor, kv_lens: Tensor | None = None) -> tuple[Batch, ...]:
    """The plan for packed queries: cu_seqlens int [n + 1]; kv_lens int [n], the context incl. the queries (None: the same)."""
    bounds = tuple(cu_seqlens.tolist())
    contexts = None if kv_lens is None else tuple(kv_lens.tolist())
    return _plan(bounds, contexts, str(cu_seqlens.device))


@lru_cache(maxsize=16)
def _plan(bounds: tuple[int, ...], contexts: tuple[int, ...] | None, device: str) -> tuple[Batch, ...]:
    lens = [b - a for a, b in itertools.pairwise(bounds)]
    kv_lens = list(contexts) if contexts is not None else lens
    if any(kv < q for kv, q in zip(kv_lens, lens, strict=True)):
        raise ValueError(f"a sequence's context is shorter than its queries: contexts {kv_lens}, queries {lens}")
    order = sorted((i for i, n in enumerate(lens) if n > 0), key=lambda i: (lens[i], kv_lens[i], i))
    groups: list[list[int]] = []
    for i in order:
        group = groups[-1] if groups else None
        if (
            group
            and lens[i] <= 1.3 * lens[group[0]] + 16
            and kv_lens[i] <= 1.5 * min(kv_lens[j] for j in group) + 64
            and (len(group) + 1) * lens[i] <= MAX_GROUP_TOKENS
        ):
            group.append(i)
        else:
            groups.append([i])
    with torch.inference_mode(False):  # the engine's plans serve the learner as well
        return tuple(_batch(sorted(group), bounds, lens, kv_lens, device) for group in groups)


def _batch(group: list[int], bounds: tuple[int, ...], lens: list[int], kv_lens: list[int], device: str) -> Batch:
    longest, keys = (round_up(max(sizes[i] for i in group)) for sizes in (lens, kv_lens))
    steps = torch.arange(longest)
    lengths = torch.tensor([lens[i] for i in group])
    contexts = torch.tensor([kv_lens[i] for i in group])
    place = torch.minimum(steps, lengths[:, None] - 1)  # [N, Lq]
    starts = torch.tensor([bounds[i] for i in group])
    even = all(lens[i] == longest for i in group) and group == list(range(group[0], group[-1] + 1))
    return Batch(
        sequences=torch.tensor(group, device=device),
        rows=(starts[:, None] + place).to(device),
        valid=(steps < lengths[:, None]).to(device),
        positions=((contexts - lengths)[:, None] + place).to(device),
        kv_lens=contexts.to(device),
        num_keys=keys,
        span=(bounds[group[0]], bounds[group[-1] + 1]) if even else None,
        square=all(lens[i] == kv_lens[i] for i in group),
    )


def known(tensor: Tensor, values: Sequence[int]) -> Tensor:
    """Notes on `tensor` the values that it was made of, so that `on_host` need not wait for a GPU."""
    tensor._winnow_values = tuple(values)  # type: ignore[attr-defined]
    return tensor


def on_host(tensor: Tensor) -> tuple[int, ...]:
    """The values of a tensor [n] of integers, from `known` where that has been."""
    values: tuple[int, ...] | None = getattr(tensor, "_winnow_values", None)
    return values if values is not None else tuple(tensor.tolist())


@lru_cache(maxsize=64)
def longest(bounds: tuple[int, ...]) -> int:
    """The most tokens between two neighbours of the bounds; every layer asks."""
    return max((b - a for a, b in itertools.pairwise(bounds)), default=0)


def gather_pages(cache: Tensor, block_table: Tensor, lengths: Tensor, num_keys: int) -> Tensor:
    """The first `num_keys` logical positions of each sequence: [pages, page, ...] -> [n, num_keys, ...].

    Positions past a sequence's length repeat its last one: a page may hold anything there, NaN too.
    """
    page = cache.shape[1]
    positions = torch.minimum(torch.arange(num_keys, device=cache.device), lengths[:, None].to(cache.device) - 1).clamp(
        min=0
    )
    slots = block_table.long().gather(1, positions // page) * page + positions % page  # [n, num_keys]
    flat = cache.view(-1, *cache.shape[2:])
    return flat.index_select(0, slots.reshape(-1)).view(*slots.shape, *cache.shape[2:])


def gather_slots(cache: Tensor, block_table: Tensor, positions: Tensor) -> Tensor:
    """Chosen logical positions int64 [n, k] (all >= 0) of each sequence: [pages, page, ...] -> [n, k, ...]."""
    page = cache.shape[1]
    slots = block_table.long().gather(1, positions // page) * page + positions % page
    return cache.view(-1, *cache.shape[2:]).index_select(0, slots.reshape(-1)).view(*slots.shape, *cache.shape[2:])
