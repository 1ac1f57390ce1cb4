"""Ctrl-C and SIGTERM end a run at a point where it is whole: at once while it generates, after the update while it learns."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside `with Interrupts() as interrupts`, a signal raises KeyboardInterrupt, except inside `with interrupts.held()`, where it
    waits for the end of the block. A second signal does not wait. Outside the main thread signals are left alone."""

    def __init__(self) -> None:
        self.pending = False
        self._held = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.pending:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        second, self.pending = self.pending, True
        if second or not self._held:
            raise KeyboardInterrupt
