"""CUDA graphs, and a second stream for what may run beside the first: in a graph, a branch of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def captured(run: Callable[[], Made], stream: torch.cuda.Stream, pool: Any) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what `run` launches, in the memory of `pool`, and what it returned. Graphs that share memory are captured on one stream.

    Not torch.cuda.graph, which gives all cached memory back first: whoever else is in the process would ask for its own anew, block by block.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            made = run()
        finally:
            graph.capture_end()
    return graph, made


class Branch:
    """`beside` begins after what the present stream was given so far; whoever reads what is made there calls `join` first.

    Memory needs no more care than that: what one stream frees, the other has read before the next `beside` or `join`.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._open = False

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._open = True

    def join(self) -> None:
        """The present stream waits, if anything was begun."""
        if self._open:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._open = False
