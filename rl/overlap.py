"""Stages side by side: jobs that wait for other jobs, and the lanes that they take turns on.

    jobs, each naming those it waits for ─ run_jobs(width) ─> at most `width` at work ─ Lanes.lane ─> a learner and a pool of its own

A lane is opened when a job needs one and none is free: the first always, a further one only where the cluster has room for it at that
moment. So `width` is a wish: with less room fewer stages run at a time, and a node that joins later makes room for one more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

from winnow.rl.cluster import Cluster
from winnow.rl.config import Config
from winnow.rl.remote_learner import LearnerDied

STOP_S = 60.0  # that a stage has to reach a point where it can stop
END_S = 30.0  # and, once its processes were ended, to notice
NO_ROOM_S = 30.0  # until a cluster that could not place another lane is asked again
_TICK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """`work()` is called once every job named in `after` is done; its result is kept under `name`."""

    name: str
    work: Callable[[], Any]
    after: tuple[str, ...] = ()


class Lanes:
    """At most `width` clusters, each opened once and lent to one job at a time."""

    def __init__(
        self,
        width: int,
        connect: Callable[[Config], AbstractContextManager[Cluster]],
        room: Callable[[Config], bool],
        say: Callable[[str], object],
    ) -> None:
        self.width, self._connect, self._room, self._say = width, connect, room, say
        self._changed = threading.Condition()
        self._open: dict[int, tuple[Cluster, ExitStack]] = {}
        self._free: list[int] = []
        self._opening = self.stopping = False
        self._count = 0  # lanes ever opened: their names
        self._full_until = 0.0

    @contextmanager
    def lane(self, config: Config) -> Iterator[Cluster]:
        """A cluster for as long as the block lasts. One that is lost within it is closed and not lent again."""
        number = self._take(config)
        try:
            yield self._open[number][0]
        except LearnerDied:
            self._drop(number)
            raise
        finally:
            with self._changed:
                if number in self._open:
                    self._free.append(number)
                self._changed.notify_all()

    def stop(self) -> None:
        """From now on a job that waits for a lane raises KeyboardInterrupt."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ends every lane's processes; a job that still works on one fails."""
        self.stop()
        with self._changed:
            numbers = list(self._open)
        for number in numbers:
            self._drop(number)

    def _take(self, config: Config) -> int:
        while True:
            with self._changed:
                if self.stopping:
                    raise KeyboardInterrupt
                if self._free:
                    return self._free.pop(0)
                wanted = not self._opening and len(self._open) < self.width
                if not (wanted and (not self._open or (time.monotonic() > self._full_until and self._room(config)))):
                    self._changed.wait(_TICK_S)
                    continue
                self._opening = True
            try:
                return self._start(config)
            except TimeoutError as error:
                with self._changed:
                    if not self._open:
                        raise
                    self._full_until = time.monotonic() + NO_ROOM_S
                self._say(f"no room for another stage beside the others: {error}")
            finally:
                with self._changed:
                    self._opening = False
                    self._changed.notify_all()

    def _start(self, config: Config) -> int:
        number = self._count
        name = f"lane {number + 1}: " if self.width > 1 else ""
        self._say(f"{name}starting the learner and the rollout workers")
        stack = ExitStack()
        cluster = stack.enter_context(self._connect(config))
        with self._changed:
            self._count += 1
            self._open[number] = (cluster, stack)
        self._say(f"{name}ready")
        return number

    def _drop(self, number: int) -> None:
        with self._changed:
            _, stack = self._open.pop(number, (None, None))
            self._free = [n for n in self._free if n != number]
        if stack is not None:
            stack.close()


def run_jobs(
    jobs: Sequence[Job],
    width: int,
    done: MutableMapping[str, Any],
    stop: Callable[[], object],
    end: Callable[[], object],
) -> None:
    """Runs every job, results into `done`; of those that are ready the first goes first. With width 1 in order, in this thread.

    After the first failure, or Ctrl-C, no job is started any more: `stop` tells those at work to stop, `end` takes their processes away
    where that did not help, and the failure is raised.
    """
    if width == 1:
        for job in jobs:
            done[job.name] = job.work()
        return
    waiting, working = list(jobs), 0
    outcomes: Queue[tuple[str, Any, BaseException | None]] = Queue()
    try:
        while waiting or working:
            ready = [job for job in waiting if all(name in done for name in job.after)]
            for job in ready[: width - working]:
                waiting.remove(job)
                working += 1
                threading.Thread(target=_work, args=(job, outcomes), name=f"stage {job.name}", daemon=True).start()
            assert working, f"jobs {[job.name for job in waiting]} wait for jobs that there are not"
            try:
                name, result, error = outcomes.get(timeout=_TICK_S)  # short: a signal is seen in between
            except Empty:
                continue
            working -= 1
            if error is not None:
                raise error
            done[name] = result
    except BaseException:
        _wind_up(working, outcomes, stop, end)
        raise


def _wind_up(working: int, outcomes: Queue, stop: Callable[[], object], end: Callable[[], object]) -> None:
    stop()
    for ask, seconds in ((None, STOP_S), (end, END_S)):
        if ask is not None and working:
            ask()
        deadline = time.monotonic() + seconds
        while working and time.monotonic() < deadline:
            try:
                outcomes.get(timeout=_TICK_S)
                working -= 1
            except Empty:
                continue


def _work(job: Job, outcomes: Queue) -> None:
    try:
        outcomes.put((job.name, job.work(), None))
    except BaseException as error:
        outcomes.put((job.name, None, error))
