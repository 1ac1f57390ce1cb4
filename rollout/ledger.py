"""What the pool owes: requests in line, the calls they belong to, and how often each sample was tried.

    open -> line -> (take) samples at a worker -> deliver, one by one: the last one hands the group over
                                               -> lost: those samples are first in line again, or the call fails
                                        call dropped: its requests are forgotten, late results of them ignored

Samples travel one by one, so what a worker finished before it died is kept and only the rest is generated again. Generation is at least
once, delivery exactly once: a sample counts the first time it comes, a call keeps the names that are still open, and a group is handed
over only while its name is. Not locked: the pool calls it under its own lock.
"""

from __future__ import annotations

import logging
import queue
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from winnow.rollout.schema import Group, Request, Trajectory

log = logging.getLogger("winnow.rollout")


@dataclass(eq=False, slots=True)
class Call:
    """One `generate`: results arrive in `outbox`, an exception ends it."""

    outbox: queue.SimpleQueue[Group | Exception] = field(default_factory=queue.SimpleQueue)
    open: set[str] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way. waiting: numbers of the samples that nobody works on; done: what has come; attempts: how often a sample
    failed or was lost."""

    request: Request
    call: Call
    waiting: list[int]
    done: dict[int, tuple[Trajectory, ...]] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)


class Ledger:
    """Every request between `open` and its delivery."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.line: deque[Job] = deque()
        self.names: set[str] = set()  # of all calls
        self._calls: set[Call] = set()

    def open(self, requests: Sequence[Request]) -> Call:
        """Puts the requests in line. ValueError, taking none, for a name that is in use and a request of no samples."""
        counts = Counter(request.request_id for request in requests)
        repeated = sorted(name for name, count in counts.items() if count > 1 or name in self.names)
        if repeated:
            raise ValueError(f"request id {repeated[0]!r} is used more than once: every request needs an id of its own")
        for request in requests:
            if request.num_samples < 1:
                raise ValueError(
                    f"request {request.request_id!r} asks for {request.num_samples} samples: it must be >= 1"
                )
        call = Call(open=set(counts))
        if counts:
            self._calls.add(call)
        self.names |= call.open
        self.line.extend(Job(request, call, list(range(request.num_samples))) for request in requests)
        return call

    def take(self) -> tuple[Job, list[int]]:
        """The first request in line and its samples that are to be sent."""
        job = self.line.popleft()
        samples, job.waiting = job.waiting, []
        return job, samples

    def deliver(self, job: Job, sample: int, trajectories: tuple[Trajectory, ...]) -> None:
        """Takes one sample in, the first time it comes; the last one of a request hands its group over, unless the call was dropped."""
        if job.request.request_id not in job.call.open or sample in job.done:
            return
        job.done[sample] = trajectories
        if len(job.done) == job.request.num_samples:
            self._close(job)
            ordered = tuple(one for number in sorted(job.done) for one in job.done[number])
            job.call.outbox.put(Group(request=job.request, trajectories=ordered))

    def lost(self, job: Job, samples: Sequence[int], error: Exception, how: str) -> Call | None:
        """Puts samples of a request first in line again; returns its call, failed, where that makes no sense: a ValueError (the request
        itself is wrong), or too many attempts."""
        job.attempts.update(samples)
        name, tried = job.request.request_id, max(job.attempts[sample] for sample in samples)
        if name not in job.call.open:
            return None
        if not isinstance(error, ValueError):
            if tried < self.max_attempts:
                which = f"{len(samples)} of its {job.request.num_samples} samples"
                log.warning(
                    "request %r %s (%s, attempt %d of %d): %r", name, how, which, tried, self.max_attempts, error
                )
                if not job.waiting:
                    self.line.appendleft(job)
                job.waiting = sorted({*job.waiting, *samples})
                return None
            attempt = f"attempt {tried} of {self.max_attempts}"
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
