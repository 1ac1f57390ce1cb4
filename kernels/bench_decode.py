"""Attention and linear rows of `winnow bench kernels` on a GPU: the shapes of the design's bench set, each with its check and its peers.

One function makes one case and holds its tensors; ROWS names them for `--only`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.kernels import bench_peers as peers
from winnow.kernels import reference_decode as reference
from winnow.kernels.bench_inputs import (
    PAGE,
    SHAPES,
    K,
    cases,
    distance,
    every,
    full_counts,
    index_inputs,
    noise,
    paged,
    picks,
    places,
    turns,
)  # fmt: skip
from winnow.kernels.bench_timing import Case, expect


def gqa(batch: int, length: int) -> Case:
    from winnow.kernels.gqa_decode import gqa_decode, gqa_decode_workspace

    heads, kv, dim = 32, 8, 128
    table, lengths, pages = paged(batch, length)
    keys, values = noise(pages, PAGE, kv, dim), noise(pages, PAGE, kv, dim)
    sets = 16 if batch == 1 else 6 if batch == 8 else 3
    q, chosen = [noise(batch, heads, dim) for _ in range(sets)], [picks(batch, length) for _ in range(sets)]
    out, lse = torch.empty_like(q[0]), torch.empty(batch, heads, device="cuda")
    work, counts = gqa_decode_workspace(batch, heads, kv, dim, 8, q[0].device), full_counts(batch)

    def call(i: int) -> Any:
        return gqa_decode(q[i], keys, values, table, lengths, chosen[i], counts, out=out, lse=lse, workspace=work)

    def check() -> float:
        out.fill_(float("nan"))
        call(0)
        row = slice(batch - 1, batch)
        want = reference.gqa_decode(q[0][row], keys, values, table[row], lengths[row], chosen[0][row], counts[row])
        return expect(distance(out[row], want[0]), 7e-6, "gqa_decode")

    shape = {"batch": batch, "length": length, "k": K, "heads": heads, "kv_heads": kv, "dim": dim, "dtype": "bf16"}
    return Case(row="gqa_decode", shape=shape, calls=turns(call, sets), check=check, bytes=batch * K * 4.0 * kv * dim)


def mla_fp8_cache(pages: int) -> Tensor:
    """A 656-byte cache of valid numbers."""
    latent = torch.randint(0, 112, (pages, PAGE, 512), dtype=torch.uint8, device="cuda")
    latent |= torch.randint(0, 2, latent.shape, dtype=torch.uint8, device="cuda") << 7
    scales = (torch.rand(pages, PAGE, 4, device="cuda") * 0.005 + 0.002).view(torch.uint8)
    return torch.cat([latent, scales, noise(pages, PAGE, 64).view(torch.uint8)], -1)


def mla(batch: int, length: int, heads: int, fp8: bool) -> Case:
    from winnow.kernels.mla_decode import mla_decode, mla_decode_workspace

    table, lengths, pages = paged(batch, length)
    cache8 = mla_fp8_cache(pages)  # FlashMLA's cache, whichever is ours
    cache = cache8 if fp8 else noise(pages, PAGE, 576)
    sets = {1: 40, 8: 6, 32: 3, 128: 2}[batch]
    chosen, counts = [picks(batch, length) for _ in range(sets)], full_counts(batch)
    q = [noise(batch, heads, 576) for _ in range(min(sets, 6))]
    out = torch.empty(batch, heads, 512, dtype=torch.bfloat16, device="cuda")
    lse, work = torch.empty(batch, heads, device="cuda"), mla_decode_workspace(batch, heads, 32, out.device)

    def call(i: int) -> Any:
        at = q[i % len(q)]
        return mla_decode(at, cache, table, lengths, chosen[i], counts, out=out, lse=lse, workspace=work)

    def check() -> float:
        out.fill_(float("nan"))
        call(0)
        row = slice(batch - 1, batch)
        want = reference.mla_decode(q[0][row], cache, table[row], lengths[row], chosen[0][row], counts[row])
        # the SM90 kernel rounds an fp8 value times its scale to bf16, as FlashMLA does
        return expect(distance(out[row], want[0]), 4e-5 if fp8 else 7e-6, "mla_decode")

    theirs = [peers.flash_mla_sparse(cache8, places(table, c), q[i % len(q)]) for i, c in enumerate(chosen)]
    shape = {"batch": batch, "length": length, "k": K, "heads": heads, "cache": "fp8" if fp8 else "bf16"}
    return Case(
        row="mla_decode", shape=shape, calls=turns(call, sets), check=check, bytes=batch * K * (656.0 if fp8 else 1152.0),
        flop=2176.0 * heads * batch * K, peers={"FlashMLA sparse, fp8 cache": every(theirs)},
    )  # fmt: skip


def layer_inputs(
    batch: int, length: int
) -> tuple[Callable[[int], None], Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Runs the selection of input set i; with it the table, lengths, chosen positions, counts and the row's shape."""
    from winnow.kernels.decode_select import select_decode, select_workspace

    data = [index_inputs(batch, length) for _ in range(2)]
    table, lengths = data[0][3], data[0][4]
    work = select_workspace(batch, length, K, table.device)
    chosen, counts = torch.empty(batch, K, dtype=torch.int32, device="cuda"), full_counts(batch)

    def choose(i: int) -> None:
        q, cache, w = data[i][:3]
        select_decode(q, cache, w, table, lengths, K, length, chosen, counts, work, check=False)

    return choose, table, lengths, chosen, counts, {"batch": batch, "length": length, "k": K, "index_heads": 64}


def layer_gqa(batch: int, length: int) -> Case:
    """Indexer, selection and attention of one layer's decode in one graph, against dense attention over the whole context."""
    from winnow.kernels.gqa_decode import gqa_decode, gqa_decode_workspace

    choose, table, lengths, chosen, counts, shape = layer_inputs(batch, length)
    pages = batch * length // PAGE
    keys, values, q = noise(pages, PAGE, 8, 128), noise(pages, PAGE, 8, 128), noise(batch, 32, 128)
    out, lse = torch.empty_like(q), torch.empty(batch, 32, device="cuda")
    scratch = gqa_decode_workspace(batch, 32, 8, 128, 8, q.device)

    def run(i: int) -> None:
        choose(i)
        gqa_decode(q, keys, values, table, lengths, chosen, counts, out=out, lse=lse, workspace=scratch)

    def check() -> float:
        run(0)
        row = slice(0, 1)
        want = reference.gqa_decode(q[row], keys, values, table[row], lengths[row], chosen[row], counts[row])
        return expect(distance(out[row], want[0]), 7e-6, "layer gqa")

    dense = [x.view(batch, length, 8, 128).transpose(1, 2).contiguous() for x in (keys, values)]
    sdpa = partial(F.scaled_dot_product_attention, q[:, :, None], dense[0], dense[1], enable_gqa=True)
    shape |= {"attention": "GQA 32/8, D 128"}
    return Case(row="layer", shape=shape, calls=turns(run, 2), check=check, peers={"dense SDPA": [sdpa] * 2})


def layer_mla(batch: int, length: int) -> Case:
    """As `layer_gqa`, for absorbed MLA with 128 heads against FlashMLA's dense decode."""
    from winnow.kernels.mla_decode import mla_decode, mla_decode_workspace

    choose, table, lengths, chosen, counts, shape = layer_inputs(batch, length)
    cache, q = noise(batch * length // PAGE, PAGE, 576), noise(batch, 128, 576)
    out, lse = torch.empty(batch, 128, 512, dtype=torch.bfloat16, device="cuda"), torch.empty(batch, 128, device="cuda")
    scratch = mla_decode_workspace(batch, 128, 32, q.device)

    def run(i: int) -> None:
        choose(i)
        mla_decode(q, cache, table, lengths, chosen, counts, out=out, lse=lse, workspace=scratch)

    def check() -> float:
        run(0)
        row = slice(0, 1)
        want = reference.mla_decode(q[row], cache, table[row], lengths[row], chosen[row], counts[row])
        return expect(distance(out[row], want[0]), 7e-6, "layer mla")

    theirs = peers.flash_mla_dense(cache, table, lengths, q)
    shape |= {"attention": "MLA, H 128"}
    return Case(
        row="layer", shape=shape, calls=turns(run, 2), check=check, peers={"FlashMLA dense, bf16": every([theirs] * 2)}
    )


def linear(n: int, k: int, tokens: int) -> Case:
    from winnow.kernels.invariant import FULL
    from winnow.kernels.invariant import linear as multiply

    weights = [noise(n, k) * 0.02 for _ in range(max(3, int(2e8 / (n * k * 2))))]
    x = noise(tokens, k)
    arrivals = torch.zeros(FULL, dtype=torch.int32, device="cuda")

    def call(i: int) -> Any:
        return multiply(x, weights[i], arrivals=arrivals)

    def check() -> float:
        return expect(distance(call(0), x.double() @ weights[0].double().T), 7e-6, "linear")

    return Case(
        row="linear", shape={"tokens": tokens, "n": n, "k": k}, calls=turns(call, len(weights)), check=check,
        bytes=2.0 * n * k, flop=2.0 * tokens * n * k, peers={"cuBLAS": [partial(F.linear, x, w) for w in weights]},
    )  # fmt: skip


LAYER = ((128, 8192), (32, 32768), (8, 131072))
LINEAR = ((4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144))

ROWS: dict[str, Callable[[], Iterator[Case]]] = {
    "gqa": lambda: cases(gqa, (*SHAPES[:3], (128, 16384))),
    "mla": lambda: cases(mla, [(*s, heads, fp8) for s in SHAPES for heads in (128, 64) for fp8 in (False, True)]),
    "layer-gqa": lambda: cases(layer_gqa, LAYER),
    "layer-mla": lambda: cases(layer_mla, LAYER),
    "linear": lambda: cases(linear, [(*s, tokens) for s in LINEAR for tokens in (1, 8, 32, 128)]),
}
