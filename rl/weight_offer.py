"""Weights that go from the learner's processes straight into the engines: one version's transfer, as the pool starts and watches it.

    Learner.weights(version) -> StreamOffer ─ begin ─> an order for every sending rank, a ticket for every worker ─> (transfer.py)

By broadcast the first rank sends to all workers; by mapped memory each rank sends to the workers on its own GPU, or machine. All ranks
gather the weights either way. A worker that comes late gets them through the object store, while the learner still has them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Protocol

from winnow.rollout.transport import Channel, LinkBroken, Member, Order, Ticket

log = logging.getLogger("winnow.rl")
WAIT_S = 50.0  # until every engine is there: one that hangs is noticed by the pool before that
_numbers = count()


class Sending(Protocol):
    """What is needed of the learner: `RemoteLearner`."""

    transport: str
    cluster: Any
    group: tuple[tuple[str, ...], str] | None

    def submit(self, method: str, *arguments: Any) -> list[Any]: ...
    def results(self, method: str, references: Sequence[Any]) -> list[Any]: ...


class StreamOffer:
    """One version. ends: a sending end (address, host, device) for each rank of the learner."""

    def __init__(self, learner: Sending, ends: Sequence[Any], version: int) -> None:
        self.learner, self.ends, self.version = learner, list(ends), version
        self.report: dict[int, str] = {}
        self._sending: list[Any] | None = None
        self._session = f"{version}.{next(_numbers)}"
        self._ranks: dict[int, int] = {}  # worker -> the rank that sends to it

    def begin(self, members: Sequence[Member]) -> Mapping[int, Ticket]:
        """Sets the learner's ranks to work. A ticket for each worker. ValueError for one that no rank can reach."""
        tickets: dict[int, Ticket] = {}
        orders: list[Order | None] = []
        keys = tuple(member.key for member in members)
        if self.learner.group is None or self.learner.group[0] != keys:
            self.learner.group = (keys, f"{self._session}.{len(keys)}")
        name = self.learner.group[1]
        for rank, end in enumerate(self.ends):
            mine = [member for member in members if self._sender_of(member) == rank]
            common: dict[str, Any] = {
                "kind": self.learner.transport, "version": self.version, "address": end.address, "session": self._session, "group": name,
                "world": len(mine) + 1, "wait_s": WAIT_S, "stall_s": self.learner.cluster.stall_timeout_s,
            }  # fmt: skip
            tickets |= {member.number: Ticket(rank=place, **common) for place, member in enumerate(mine, 1)}
            orders.append(Order(ticket=Ticket(rank=0, **common), members=tuple(mine)) if mine else None)
            self._ranks |= {member.number: rank for member in mine}
        self._sending = self.learner.submit("send", self.version, orders, self.learner.cluster.bucket_mb << 20)
        return tickets

    def late(self) -> Any:
        return self.learner.submit("late", self.version)[0]

    def lost(self, number: int, why: str) -> None:
        """Tells the sending rank, and through it everybody, not to wait for a worker that is gone."""
        if self._sending is None or number not in self._ranks:
            return
        self.learner.group = None
        address, stop = self.ends[self._ranks[number]].address, f"{self._session}/stop"

        def tell() -> None:
            with suppress(LinkBroken):  # the learner is gone too
                Channel(address).say(stop, why)

        threading.Thread(target=tell, name="winnow-offer-stop", daemon=True).start()

    def finished(self) -> bool:
        """Whether every rank is through with it. Raises LearnerDied, or what a rank raised."""
        import ray

        if not self._sending:
            return True
        done, waiting = ray.wait(self._sending, num_returns=len(self._sending), timeout=0, fetch_local=False)
        if waiting and not self._failed(done):
            return False
        reports = self.learner.results("send", self._sending)
        self._sending = []
        self.report = {number: said for report in reports for number, said in report.items()}
        if any(said != "ok" for said in self.report.values()):
            self.learner.group = None  # whoever is left makes a new one
        return True

    def _failed(self, done: Sequence[Any]) -> bool:
        """Whether a rank that has ended has failed: the others may never end."""
        import ray

        for reference in done:
            try:
                ray.get(reference, timeout=self.learner.cluster.stall_timeout_s)
            except ray.exceptions.RayError:
                return True
        return False

    def _sender_of(self, member: Member) -> int:
        if self.learner.transport == "nccl":
            return 0
        for rank, end in enumerate(self.ends):
            if (end.host, end.device) == (member.host, member.device):
                return rank
        places = ", ".join(f"rank {rank} on {end.device} of {end.host}" for rank, end in enumerate(self.ends))
        raise ValueError(
            f"cluster.transport is ipc, but {member.name} is on {member.device} of {member.host}, and no learner rank is ({places}): set "
            "cluster.transport to nccl or store"
        )
