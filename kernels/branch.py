"""A second stream for what may run beside the first: in a CUDA graph, a branch of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
