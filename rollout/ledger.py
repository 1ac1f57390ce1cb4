"""What the pool owes: requests in line, the calls they belong to, and how often each was tried.

    open -> line -> (take) a worker's job -> deliver | lost: first in line again, or its call fails
                                        call dropped: its requests are forgotten, late results of them ignored

Generation is at least once, delivery exactly once: a call keeps the names that are still open, and a group is handed over only while its
name is. Not locked: the pool calls it under its own lock.
"""

from __future__ import annotations

import logging
import queue
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from winnow.rollout.schema import Group, Request

log = logging.getLogger("winnow.rollout")


@dataclass(eq=False, slots=True)
class Call:
    """One `generate`: results arrive in `outbox`, an exception ends it."""

    outbox: queue.SimpleQueue[Group | Exception] = field(default_factory=queue.SimpleQueue)
    open: set[str] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way. `attempts`: how often it failed or was lost; `sent`: when a worker last got it, monotonic seconds."""

    request: Request
    call: Call
    attempts: int = 0
    sent: float = 0.0


class Ledger:
    """Every request between `open` and its delivery."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.line: deque[Job] = deque()
        self.names: set[str] = set()  # of all calls
        self._calls: set[Call] = set()

    def open(self, requests: Sequence[Request]) -> Call:
        """Puts the requests in line. ValueError, taking none, for a name that is in use."""
        counts = Counter(request.request_id for request in requests)
        repeated = sorted(name for name, count in counts.items() if count > 1 or name in self.names)
        if repeated:
            raise ValueError(f"request id {repeated[0]!r} is used more than once: every request needs an id of its own")
        call = Call(open=set(counts))
        if counts:
            self._calls.add(call)
        self.names |= call.open
        self.line.extend(Job(request, call) for request in requests)
        return call

    def deliver(self, job: Job, group: Group) -> None:
        """Hands a group over, unless its call has been dropped."""
        name = job.request.request_id
        if name in job.call.open:
            self._close(job)
            job.call.outbox.put(group)

    def lost(self, job: Job, error: Exception, how: str) -> Call | None:
        """Puts a request first in line again; returns its call, failed, where that makes no sense: a ValueError (the request itself is
        wrong), or too many attempts."""
        job.attempts += 1
        name = job.request.request_id
        if name not in job.call.open:
            return None
        if not isinstance(error, ValueError):
            if job.attempts < self.max_attempts:
                log.warning("request %r %s (attempt %d of %d): %r", name, how, job.attempts, self.max_attempts, error)
                self.line.appendleft(job)
                return None
            attempt = f"attempt {job.attempts} of {self.max_attempts}"
            error = RuntimeError(f"request {name!r} {how}, {attempt}: {error!r}")
        self.drop(job.call)
        job.call.outbox.put(error)
        return job.call

    def drop(self, call: Call) -> None:
        """Forgets what is left of a call; what workers still do for it is the pool's to cancel."""
        self.names -= call.open
        call.open = set()
        self._calls.discard(call)
        self.line = deque(job for job in self.line if job.call is not call)

    def fail(self, error: Exception) -> None:
        """Ends every call with `error`."""
        for call in list(self._calls):
            self.drop(call)
            call.outbox.put(error)

    def _close(self, job: Job) -> None:
        name = job.request.request_id
        job.call.open.remove(name)
        self.names.discard(name)
        if not job.call.open:
            self._calls.discard(job.call)
