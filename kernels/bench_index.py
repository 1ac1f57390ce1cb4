"""Indexer rows of `winnow bench kernels` on a GPU: scores (decode and prefill), top-k, and both in one decode selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from winnow.kernels import bench_peers as peers
from winnow.kernels import reference_decode as reference
from winnow.kernels.bench_inputs import (
    PAGE,
    SHAPES,
    Found,
    K,
    cases,
    distance,
    every,
    full_counts,
    index_inputs,
    noise,
    turns,
)
from winnow.kernels.bench_timing import Case, WrongKernelError, expect


def dense_keys(cache: Tensor, table: Tensor, length: int) -> Tensor:
    rows = cache[table.long()[: -(-length // PAGE)]]
    return (reference.dequantise_index(rows, 128) if cache.dtype == torch.uint8 else rows).reshape(-1, 128)[:length]


def check_scores(got: Tensor, q: Tensor, cache: Tensor, w: Tensor, table: Tensor, length: int) -> float:
    """Distance of the last row's first scores from the float64 reference; table [pages] of that row."""
    want = reference.indexer_logits(q[-1:].float(), dense_keys(cache, table, length), w[-1:])
    return expect(distance(got[-1:, :length], want), 5e-6, "indexer_logits")


def logits(batch: int, length: int, fp8: bool) -> Case:
    from winnow.kernels.indexer_logits import indexer_logits_decode

    data = [index_inputs(batch, length, 64, fp8) for _ in range(6 if batch == 1 else 2)]
    out = torch.empty(batch, length, device="cuda")

    def call(i: int) -> Any:
        q, cache, w, table, lengths = data[i]
        chunk = 256 if batch == 1 else 512
        return indexer_logits_decode(q, cache, w, table, lengths, out=out, max_len=length, chunk=chunk)

    def check() -> float:
        out.fill_(float("nan"))
        call(0)
        q, cache, w, table, _ = data[0]
        return check_scores(out, q, cache, w, table[-1], 4096)

    theirs: Sequence[Found] = [peers.paged_logits(d, length) for d in data] if fp8 else ["takes fp8 only"]
    shape = {"batch": batch, "length": length, "heads": 64, "dim": 128, "cache": "fp8" if fp8 else "bf16"}
    return Case(
        row="indexer_logits", shape=shape, calls=turns(call, len(data)), check=check,
        bytes=batch * length * (136.0 if fp8 else 260.0), peers={"DeepGEMM": every(theirs)},
    )  # fmt: skip


def prefill(heads: int, tokens: int = 4096, length: int = 32768) -> Case:
    from winnow.kernels.indexer_logits import indexer_logits_prefill

    _, cache, _, table, _ = index_inputs(1, length)
    q = noise(tokens, heads, 128).to(torch.float8_e4m3fn)
    w, out = torch.randn(tokens, heads, device="cuda"), torch.empty(tokens, length, device="cuda")
    rows = cache[table[0].long()]
    keys = rows[:, : PAGE * 128].contiguous().view(torch.float8_e4m3fn).reshape(-1, 128)
    scales = rows[:, PAGE * 128 :].contiguous().view(torch.float32).reshape(-1)

    def call(i: int) -> Any:
        return indexer_logits_prefill(q, cache, w, table[0], length, out=out)

    def check() -> float:
        out.fill_(float("nan"))
        call(0)
        return check_scores(out, q, cache, w, table[0], 4096)

    return Case(
        row="indexer_logits_prefill", shape={"queries": tokens, "length": length, "heads": heads, "cache": "fp8"},
        calls=turns(call, 1), check=check, flop=2.0 * heads * 128 * tokens * length,
        peers={"DeepGEMM": every([peers.prefill_logits(q, keys, scales, w)])},
    )  # fmt: skip


def check_sets(got: Tensor, scores: Tensor, lengths: Tensor) -> float:
    """Index sets of the first and last row against the definition, entry by entry."""
    for row in {0, len(scores) - 1}:
        want, _ = reference.topk(scores[row : row + 1], lengths[row : row + 1], K)
        if not torch.equal(got[row], want[0]):
            place = int((got[row] != want[0]).nonzero()[0])
            raise WrongKernelError(
                f"topk: row {row}, entry {place} is {int(got[row, place])}, not {int(want[0, place])}"
            )
    return 0.0


def topk(rows: int, width: int, kind: str) -> Case:
    from winnow.kernels.topk import topk as select
    from winnow.kernels.topk import topk_workspace
    from winnow.kernels.topk_rows import suits, topk_rows

    sets = 16 if rows == 1 else 8 if rows * width < 5e6 else 3 if rows < 4096 else 1
    scores = [torch.randn(rows, width, device="cuda") for _ in range(sets)]
    if kind == "plateau":  # what ReLU leaves: most scores are exact zeros, and the k-th is one of them
        scores = [s.masked_fill_(s < 2.3, 0.0) for s in scores]
    lengths = torch.full((rows,), width, dtype=torch.int32, device="cuda")
    out, counts = torch.empty(rows, K, dtype=torch.int32, device="cuda"), torch.empty_like(lengths)
    work = topk_workspace(rows, width, K, out.device)

    def call(i: int) -> Any:
        if suits(rows, width):
            return topk_rows(scores[i], lengths, K, out, counts, work["bad"])
        return select(scores[i], lengths, K, out, counts, work, check=False)

    def check() -> float:
        out.fill_(-7)
        call(0)
        return check_sets(out, scores[0], lengths)

    theirs: dict[str, Sequence[Callable[[], Any]] | str] = {
        f"vLLM {name}": every([peers.top_k(name, s, lengths, K) for s in scores])
        for name in ("cooperative", "persistent")
    }
    theirs["torch.topk"] = [partial(torch.topk, s, K, sorted=False) for s in scores]
    shape = {"rows": rows, "width": width, "k": K, "scores": kind}
    return Case(row="topk", shape=shape, calls=turns(call, sets), check=check, bytes=4.0 * rows * width, peers=theirs)


def selection(batch: int, length: int) -> Case:
    from winnow.kernels.decode_select import select_decode, select_workspace
    from winnow.kernels.indexer_logits import indexer_logits_decode

    data = [index_inputs(batch, length) for _ in range(6 if batch == 1 else 2)]
    work = select_workspace(batch, length, K, data[0][0].device)
    out, counts = torch.empty(batch, K, dtype=torch.int32, device="cuda"), full_counts(batch)

    def call(i: int) -> Any:
        q, cache, w, table, lengths = data[i]
        return select_decode(q, cache, w, table, lengths, K, length, out, counts, work, check=False)

    def check() -> float:
        out.fill_(-7)
        call(0)
        q, cache, w, table, lengths = data[0]
        return check_sets(out, indexer_logits_decode(q, cache, w, table, lengths, max_len=length), lengths)

    shape = {"batch": batch, "length": length, "k": K, "heads": 64, "cache": "fp8"}
    return Case(
        row="select_decode", shape=shape, calls=turns(call, len(data)), check=check, bytes=132.0 * batch * length,
        peers={f"DeepGEMM + vLLM {name}": score_then_choose(name, data, length) for name in ("cooperative", "persistent")},
    )  # fmt: skip


def score_then_choose(name: str, data: Sequence[tuple[Tensor, ...]], length: int) -> Sequence[Callable[[], Any]] | str:
    """DeepGEMM's scores, then vLLM's top-k of them."""
    scored = every([peers.paged_logits(d, length) for d in data])
    chosen = peers.top_k(name, torch.randn(len(data[0][0]), length, device="cuda"), data[0][4], K)
    if isinstance(scored, str):
        return scored
    if isinstance(chosen, str):
        return chosen

    def both(i: int) -> None:
        choose = peers.top_k(name, scored[i](), data[i][4], K)
        assert not isinstance(choose, str)
        choose()

    return turns(both, len(data))


TOPK = ((1, 131072), (32, 65536), (32, 131072), (128, 32768), (128, 131072), (4096, 32768))

ROWS: dict[str, Callable[[], Iterator[Case]]] = {
    "logits": lambda: cases(logits, [(*s, fp8) for fp8 in (True, False) for s in SHAPES]),
    "prefill": lambda: cases(prefill, [(64,), (32,)]),
    "topk": lambda: cases(topk, [(*s, kind) for kind in ("random", "plateau") for s in TOPK]),
    "selection": lambda: cases(selection, SHAPES),
}
