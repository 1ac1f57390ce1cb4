"""torch's own threads, for as long as a stage in this process runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """`count` of them; 0: as many as torch takes by itself, which is one a core. A small model's operations wait for each other more than
    they compute then: on 32 cores, with two such programs beside it, a warm-up batch of the demo's took 55 s."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
