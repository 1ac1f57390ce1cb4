"""The groups of one `generate` call as they come: an iterator that can also be asked what is there by now."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable

from winnow.rollout.ledger import Call
from winnow.rollout.schema import Group

_LOOK_S = 1.0  # how often a waiting caller looks whether the pool still lives


class Arrivals:
    """Each group once. `close` (or losing the last reference) cancels what has not come.

    check: raises where nothing can come any more; cancel: tells the pool that nobody waits for the rest of the call.
    """

    def __init__(self, call: Call, check: Callable[[int], None], cancel: Callable[[], None]) -> None:
        self._call, self._check, self._cancel = call, check, cancel
        self._missing = set(call.open)
        self._early: deque[Group | Exception] = deque()  # seen by `ready`, not handed over yet

    def __iter__(self) -> Arrivals:
        return self

    def __next__(self) -> Group:
        if not self._missing:
            raise StopIteration
        result = self._early.popleft() if self._early else self._wait()
        if isinstance(result, Exception):
            self.close()
            raise result
        self._missing.discard(result.request.request_id)
        return result

    def ready(self) -> list[Group]:
        """The groups that have come and were not handed over yet, without waiting. They are still handed over."""
        while True:
            try:
                self._early.append(self._call.outbox.get_nowait())
            except queue.Empty:
                return [found for found in self._early if isinstance(found, Group)]

    def close(self) -> None:
        if self._missing:
            self._missing = set()
            self._cancel()

    def __del__(self) -> None:
        self.close()

    def _wait(self) -> Group | Exception:
        while True:
            try:
                return self._call.outbox.get(timeout=_LOOK_S)
            except queue.Empty:
                try:
                    self._check(len(self._missing))
                except Exception:
                    self.close()
                    raise
