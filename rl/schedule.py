"""How far the rollout runs ahead of the learner: sync, one step off, or asynchronous within a bound on staleness.

    take(step):  send the requests of every step up to step + lead  ->  wait for the groups of `step`  ->  check their versions

When step s is taken the pool has the weights of step s-1, and the requests of s + lead go out: they are trained when version
s + lead - 1 is the newest, so no token is more than `lead` versions behind (sync: sync_every - 1). The pool serves the oldest requests first; weights pushed
while a sequence is under way are used from its next token on, and each token keeps the version it was drawn with.

What is under way belongs to a checkpoint: the groups of later steps that are finished are kept in it and trained by the resumed run as
they are; of the unfinished ones nothing is kept, they are asked for again under the same ids and seeds. So no prompt is lost and none is
trained twice, and with every group finished the resumed run is bit for bit the uninterrupted one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.rl.config_sections import ScheduleConfig
from winnow.rollout.schema import Group, Request

IN_FLIGHT = "in_flight.pkl"


def lead_of(schedule: ScheduleConfig) -> int:
    """How many steps the rollout may be ahead, which is the bound on staleness."""
    return {"sync": 0, "one_step_off": 1, "async": schedule.max_staleness}[schedule.kind]


@dataclass(slots=True)
class Sent:
    """The requests of one step: their ids in order, the groups that have come, and the iterator that brings the others."""

    order: list[str]
    groups: list[Group]
    arriving: Iterator[Group]


@dataclass(slots=True)
class Rollouts:
    """The groups of each step, asked for as early as the schedule allows. Steps are taken in order, from any first one.

    kept: finished groups of a checkpoint (`read_in_flight`); one whose request is no longer what the run asks for is drawn again.
    """

    requests: Callable[[int], Sequence[Request]]
    schedule: ScheduleConfig
    kept: Iterable[Group] = ()
    _sent: dict[int, Sent] = field(default_factory=dict)
    _next: int = 0  # the first step whose requests have not been sent
    _kept: dict[str, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept = {group.request.request_id: group for group in self.kept}

    @property
    def lead(self) -> int:
        return lead_of(self.schedule)

    @property
    def bound(self) -> int:
        """How many versions behind a token may be when it is trained: `lead`, or what `sync_every` leaves between two updates."""
        return self.lead + self.schedule.sync_every - 1

    def take(self, step: int, pool: Any) -> list[Group]:
        """The groups of `step` from the pool in the order of their requests, whatever the order of arrival. RuntimeError for a token that is too old."""
        for ahead in range(max(step, self._next), min(step + self.lead, self.schedule.steps) + 1):
            self._sent[ahead] = self._send(list(self.requests(ahead)), pool)
            self._next = ahead + 1
        for earlier in [number for number in self._sent if number < step]:
            del self._sent[earlier]
        sent = self._sent[step]
        for group in sent.arriving:
            sent.groups.append(group)  # noted one by one: an interrupted wait forgets none
        groups = sorted(sent.groups, key=lambda group: sent.order.index(group.request.request_id))
        self._check(groups, step - 1)
        return groups

    def in_flight(self, step: int) -> list[Group]:
        """The finished groups of the steps after `step`, of a schedule that runs ahead. Waits for nothing."""
        found = []
        for number in sorted(self._sent) if self.lead else ():
            if number > step:
                ready = getattr(
                    self._sent[number].arriving, "ready", list
                )  # a pool in this process finishes nothing in between
                found += [*self._sent[number].groups, *ready()]
        return found

    def save(self, folder: Path, step: int) -> None:
        """Writes the groups in flight beside a checkpoint's other files; no file where there are none."""
        if groups := self.in_flight(step):
            (Path(folder) / IN_FLIGHT).write_bytes(pickle.dumps(groups))

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancels what is under way."""
        for sent in self._sent.values():
            getattr(sent.arriving, "close", lambda: None)()
        self._sent.clear()

    def _send(self, made: list[Request], pool: Any) -> Sent:
        kept = [self._kept[r.request_id] for r in made if r.request_id in self._kept]
        kept = [group for group in kept if group.request in made]
        have = {group.request.request_id for group in kept}
        missing = [request for request in made if request.request_id not in have]
        arriving = pool.generate(missing) if missing else iter(())
        return Sent(order=[request.request_id for request in made], groups=kept, arriving=arriving)

    def _check(self, groups: Sequence[Group], version: int) -> None:
        for group in groups:
            for trajectory in group.trajectories:
                drawn = trajectory.policy_versions[trajectory.loss_mask]
                if len(drawn) and version - int(drawn.min()) > self.bound:
                    raise RuntimeError(
                        f"{trajectory.key} has tokens of version {int(drawn.min())}, {version - int(drawn.min())} behind version "
                        f"{version} that is trained, and the schedule allows {self.bound}: the pool did not take the weights pushed to it"
                    )


def read_in_flight(folder: Path | None) -> list[Group]:
    """The finished groups that a checkpoint holds; none for None or a checkpoint of a run that was not ahead. ValueError: not ours."""
    file = None if folder is None else Path(folder) / IN_FLIGHT
    if file is None or not file.is_file():
        return []
    with file.open("rb") as stream:
        return list(_Groups(stream).load())


class _Groups(pickle.Unpickler):
    """Reads rollout types and arrays and nothing else: a checkpoint that somebody sends must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.split(".")[0] == "numpy" and name in (
            "_reconstruct",
            "_frombuffer",
            "ndarray",
            "dtype",
            "scalar",
        )
        if arrays or module in ("winnow.rollout.schema", "winnow.rollout.index_codec"):
            found = super().find_class(module, name)
            if arrays or isinstance(found, type):
                return found
        raise ValueError(f"{IN_FLIGHT} names {module}.{name}, which is no rollout type: the file is not winnow's")
