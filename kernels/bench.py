"""`winnow bench kernels`: times of the kernels on this machine beside their nearest relatives in the same run. No claim beyond the shape.

On a GPU the rows of the design's bench set (bench_decode.py): each is compared with its reference first, and a wrong kernel is not
timed. On a CPU the public operations on small shapes, beside torch's own nearest operation where there is one: milliseconds per call,
median with minimum and maximum, after a warm-up call; an anchor that does less work (dense attention selects nothing) says so by its name.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from winnow.kernels import ops
from winnow.kernels.bench_timing import Case, WrongKernelError, measure


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One sequence of `length` tokens; decode has `batch` of them."""

    length: int
    top_k: int
    batch: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    index_heads: int = 4
    index_dim: int = 64
    page: int = 16


CPU = Shape(length=1024, top_k=128)
GPU = Shape(length=16384, top_k=2048, batch=32, heads=32, kv_heads=8, head_dim=128, index_dim=128, page=64)


def rows() -> dict[str, Callable[[], Iterator[Case]]]:
    """What `--only` may name on a GPU."""
    from winnow.kernels.bench_decode import ROWS
    from winnow.kernels.bench_index import ROWS as INDEX_ROWS

    return {**ROWS, **INDEX_ROWS}


def measure_kernels(only: Sequence[str] = (), seconds: float = 1.0, timed: bool = True) -> dict[str, Any]:
    """{"device": ..., "rows": [...]} on a GPU, `measure_ops` on a CPU. only: names of groups, or parts of names. A row that fails its
    check holds "wrong" and no time. Each row is also a line on standard error as soon as it is there: a run that is cut off has lost
    nothing. Raises ValueError where `only` names nothing."""
    if not torch.cuda.is_available():
        return measure_ops(seconds, only=only)
    from winnow.kernels.bench_train import TRAINING, training_results

    known = rows()
    names = (*known, *TRAINING)
    chosen = choose(names, only)
    if not chosen:
        raise ValueError(f"bench kernels --only {' '.join(only)} names no row: known are {', '.join(names)}")
    results: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        results.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    for name in chosen:
        if name in TRAINING:
            for row in training_results(name):
                keep(row)
            continue
        for case in known[name]():
            try:
                keep(measure(case, timed))
            except WrongKernelError as error:
                keep({"row": case.row, **case.shape, "wrong": str(error)})
            del case  # its tensors go before the next ones come
    import triton

    return {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "rows": results}


def choose(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """The names that `only` picks: a whole name picks itself alone, any other word all names that contain it; nothing picks all."""
    return [
        name for name in names if not only or any(part == name or (part not in names and part in name) for part in only)
    ]


def measure_ops(seconds: float = 1.0, shape: Shape | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """{operation: {"ms": ..., "min_ms", "max_ms", "runs", "shape"}} for what this device is meant to run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape or (GPU if device == "cuda" else CPU)
    cases = {**prefill_cases(shape, device), **decode_cases(shape, device)}
    cases = {name: call for name, call in cases.items() if not only or any(part in name for part in only)}
    if not cases:
        raise ValueError(f"bench kernels --only {' '.join(only)} names no operation of a CPU run: try topk or decode")
    with torch.no_grad():
        figures = {name: clock(call, seconds, device) for name, call in cases.items()}
    return {"shape": vars(shape), "device": device, "operations": figures}


def prefill_cases(shape: Shape, device: str) -> dict[str, Callable[[], Any]]:
    """One packed sequence: selection and attention over it."""
    s, dtype = shape, torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q, k, v = (
        draw(s.length, s.heads, s.head_dim),
        draw(s.length, s.kv_heads, s.head_dim),
        draw(s.length, s.kv_heads, s.head_dim),
    )
    iq, ik = draw(s.length, s.index_heads, s.index_dim), draw(s.length, s.index_dim)
    w = draw(s.length, s.index_heads).float()
    bounds = torch.tensor([0, s.length], dtype=torch.int32, device=device)
    positions = torch.arange(s.length, device=device)
    lengths = (positions + 1).int()
    chosen = ops.select_packed(iq, ik, w, bounds, positions, s.top_k)
    scores = ops.indexer_logits(iq, ik, w)
    scale = s.head_dim**-0.5
    repeat = s.heads // s.kv_heads
    dq, dk, dv = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
    return {
        "indexer_logits": lambda: ops.indexer_logits(iq, ik, w),
        "topk": lambda: ops.topk(scores, lengths, s.top_k),
        "topk anchor: torch.topk (unordered ties, no causal mask)": lambda: torch.topk(scores, s.top_k),
        "select_packed": lambda: ops.select_packed(iq, ik, w, bounds, positions, s.top_k),
        "sparse_attention": lambda: ops.sparse_attention(q, k, v, bounds, chosen, scale),
        "sparse_attention, dense (selection None)": lambda: ops.sparse_attention(q, k, v, bounds, None, scale),
        "attention anchor: torch SDPA, dense causal": lambda: F.scaled_dot_product_attention(
            dq, dk, dv, is_causal=True, scale=scale
        ),
    }


def decode_cases(shape: Shape, device: str) -> dict[str, Callable[[], Any]]:
    """`batch` sequences of `length` cached tokens, one query each."""
    s, dtype = shape, torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(1)
    pages = -(-s.length // s.page)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    q = draw(s.batch, s.heads, s.head_dim)
    k, v = (draw(s.batch * pages, s.page, s.kv_heads, s.head_dim) for _ in range(2))
    index, iq = draw(s.batch * pages, s.page, s.index_dim), draw(s.batch, s.index_heads, s.index_dim)
    w = draw(s.batch, s.index_heads).float()
    table = torch.arange(s.batch * pages, dtype=torch.int32, device=device).view(s.batch, pages)
    lengths = torch.full((s.batch,), s.length, dtype=torch.int32, device=device)
    chosen = ops.select_paged(iq, index, w, table, lengths, s.top_k)
    scale = s.head_dim**-0.5
    return {
        "select_paged": lambda: ops.select_paged(iq, index, w, table, lengths, s.top_k),
        "sparse_decode": lambda: ops.sparse_decode(q, k, v, table, lengths, chosen, scale),
        "sparse_decode, dense (selection None)": lambda: ops.sparse_decode(q, k, v, table, lengths, None, scale),
    }


def clock(call: Callable[[], Any], seconds: float, device: str) -> dict[str, Any]:
    """Milliseconds of `call`: at least 3 runs and at least `seconds` in all, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    ordered = sorted(times)
    middle = ordered[len(ordered) // 2]
    return {
        "ms": round(middle * 1e3, 4),
        "min_ms": round(ordered[0] * 1e3, 4),
        "max_ms": round(ordered[-1] * 1e3, 4),
        "runs": len(times),
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
