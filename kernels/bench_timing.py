"""How kernels are timed: cold cache, CUDA graphs, medians; on a CPU plain calls.

A case runs on several input sets in turn, larger together than the 50 MB second-level cache, all in one CUDA graph, so that launch
gaps inside a graph are part of every figure and the host is not. Nothing is timed before its check has passed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]


class WrongKernelError(RuntimeError):
    """A kernel's output differs from its reference: there is nothing to time."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    calls: the same work on different inputs; check: raises WrongKernelError, or returns the error found; bytes or flop: the least one
    call must move or do; peers: what else does this work, each a list of calls, or a text saying why it is not here.
    """

    row: str
    shape: dict[str, Any]
    calls: Sequence[Call]
    check: Callable[[], float]
    bytes: float = 0.0
    flop: float = 0.0
    peers: dict[str, Sequence[Call] | str] = field(default_factory=dict)


READ_CEILING = 4.55e12  # bytes a second that an H200 reads, measured (docs/experiments.md); other chips print a share of the same number
WARM_UP = 0.03  # seconds of replays before the first that counts: clocks rise under load


def median_us(calls: Sequence[Call], repeats: int = 15) -> float:
    """Microseconds of one call: the median over `repeats` rounds through all of `calls`."""
    if not torch.cuda.is_available():
        return _median_us_cpu(calls, min(repeats, 3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times: list[float] = []
        awake = time.perf_counter() + WARM_UP
        while len(times) < repeats:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if time.perf_counter() > awake:
                times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def _median_us_cpu(calls: Sequence[Call], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) * 1e6 / len(calls))
    return statistics.median(times)


def measure(case: Case, timed: bool = True) -> dict[str, Any]:
    """The row's figures: check, microseconds, rate, share of the floor, and every peer with ours / theirs from the same run."""
    result: dict[str, Any] = {"row": case.row, **case.shape, "error": case.check()}
    if not timed:
        for calls in case.peers.values():
            if not isinstance(calls, str):
                calls[0]()  # compiles what compiles on its first call
        return result
    us = median_us(case.calls)
    result["us"] = round(us, 2)
    if case.bytes:
        result |= {
            "tb_per_s": round(case.bytes / us / 1e6, 3),
            "of_floor": round(case.bytes / READ_CEILING * 1e6 / us, 3),
        }
    if case.flop:
        result |= {"tflop_per_s": round(case.flop / us / 1e6, 1)}
    for name, calls in case.peers.items():
        if isinstance(calls, str):
            result.setdefault("absent", {})[name] = calls
            continue
        try:
            theirs = median_us(calls)
        except RuntimeError as error:  # a peer that refuses the shape is reported, not fatal
            result.setdefault("absent", {})[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        result.setdefault("peers", {})[name] = {"us": round(theirs, 2), "ratio": round(us / theirs, 3)}
    return result


def expect(error: float, limit: float, what: str) -> float:
    """The error, or WrongKernelError where it passes the limit (NaN passes nothing)."""
    if not error <= limit:
        raise WrongKernelError(f"{what}: error {error:.3g}, allowed {limit:.3g}; a wrong kernel is not timed")
    return error
