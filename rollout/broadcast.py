"""Buckets by a broadcast: one process group of the learner's first rank and the engines, apart from every other group of theirs.

On GPUs its backend is NCCL, on CPUs gloo; the code is the same. A group stays together over transfers until one breaks or a member is
replaced. NCCL does not notice a member's death: so every wait looks at the clock, and a group that is given up is aborted. Until that
is through the device may still read and write what was under way: the group holds on to it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from winnow.rollout.transport import Channel, LinkBroken, Ticket, within

_POLL_S = 5e-5
AHEAD = 4  # buckets


class Group:
    """Rank 0 sends, the others receive. Raises LinkBroken unless all `world` members come within `stall_s`."""

    def __init__(self, name: str, address: str, rank: int, world: int, device: torch.device, stall_s: float) -> None:
        self.name, self.device, self.stall_s = name, device, stall_s
        self._under_way: dict[Any, Tensor] = {}  # broadcast -> what it reads or writes
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._group = within(
            stall_s, f"group {name} of {world}", lambda: make_group(name, address, rank, world, device, stall_s)
        )
        try:
            first = torch.zeros(1, dtype=torch.int64, device=device)
            within(stall_s, f"group {name} of {world}", lambda: self.wait(self.start(first)))
        except LinkBroken:
            self.abort()
            raise

    def start(self, data: Tensor) -> Any:
        """Begins a broadcast of `data` from rank 0. Nobody touches `data` before `wait`."""
        try:
            work = self._group.broadcast(data, 0)
        except RuntimeError as error:
            raise LinkBroken(f"the broadcast of group {self.name} failed: {error}") from error
        self._under_way[work] = data
        return work

    def wait(self, work: Any) -> None:
        """Returns when the broadcast is done. LinkBroken when that takes longer than `stall_s`, or a member is gone."""
        try:
            if self._aside is None:
                work.wait(timedelta(seconds=self.stall_s))
            else:
                self._wait_for_device(work, self._aside)
        except RuntimeError as error:
            if isinstance(error, LinkBroken):
                raise
            text = str(error).splitlines()[0]
            raise LinkBroken(f"the broadcast of group {self.name} failed: {text}") from error
        self._under_way.pop(work, None)

    def _wait_for_device(self, work: Any, aside: torch.cuda.Stream) -> None:
        """Looks whether the device is through. What NCCL itself calls completed may be an error, and it raises none here; and a stream
        that waits for a broadcast that hangs would hang with it, so that is a stream of the group's own."""
        deadline = time.monotonic() + self.stall_s
        with torch.cuda.stream(aside):
            work.wait()
            done = aside.record_event()
        while not done.query():
            if time.monotonic() > deadline:
                raise LinkBroken(f"the broadcast of group {self.name} made no progress for {self.stall_s:.0f} s")
            time.sleep(_POLL_S)
        torch.cuda.current_stream(self.device).wait_event(done)

    def abort(self) -> None:
        """Ends it at once, whatever runs. Its destruction may wait for what it has under way: a thread of its own does that."""
        group, self._group = self._group, None
        held, self._under_way = self._under_way, {}

        def end(group: Any, held: dict[Any, Tensor]) -> None:
            with suppress(Exception):  # there is nobody left to tell
                group.abort()
            held.clear()

        threading.Thread(target=end, args=(group, held), name="winnow-group-end", daemon=True).start()


def make_group(name: str, address: str, rank: int, world: int, device: torch.device, stall_s: float) -> Any:
    """The bare process group, on a connection of its own: a group may use it from other threads."""
    store = torch.distributed.PrefixStore(f"group/{name}", Channel(address).store)
    limit = timedelta(seconds=stall_s)
    if device.type == "cpu":
        return torch.distributed.ProcessGroupGloo(store, rank, world, limit)
    no_multicast()
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = limit
    with environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"):
        return torch.distributed.ProcessGroupNCCL(store, rank, world, options)


def no_multicast() -> None:
    """Before a process's first NCCL group of any kind, since NCCL reads this once: without NVLink multicast, a fault in which can take a
    host's GPUs from everybody on it. NCCL_NVLS_ENABLE=1 in the environment asks for it."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """For torch, which reads it when a group is made: neither an error of this group's nor a wait for its end may end the process, as both
    do by default. Every other group of this process keeps its settings."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Membership:
    """The group that a process is in, over transfers, until a ticket names another or it breaks."""

    def __init__(self) -> None:
        self._group: Group | None = None

    def of(self, ticket: Ticket, device: torch.device) -> Group:
        if self._group is None or self._group.name != ticket.group:
            self.leave()
            self._group = Group(ticket.group, ticket.address, ticket.rank, ticket.world, device, ticket.stall_s)
        return self._group

    def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class BroadcastSender:
    """The sending end of one transfer: two buffers, one is filled while the other travels."""

    def __init__(self, group: Group, num_buckets: int) -> None:
        self.group = group
        self.sums = torch.zeros(max(num_buckets, 1), 2, dtype=torch.int64, device=group.device)
        self._works: dict[int, Any] = {}

    def free(self, number: int) -> None:
        """Waits until the buffer of bucket `number` may be filled."""
        if number - 2 in self._works:
            self.group.wait(self._works.pop(number - 2))

    def send(self, number: int, bucket: Tensor, sums: Callable[[Tensor], Tensor]) -> None:
        self._works[number] = self.group.start(bucket)
        self.sums[number] = sums(bucket)

    def finish(self) -> None:
        for number in sorted(self._works):
            self.group.wait(self._works.pop(number))
        self.group.wait(self.group.start(self.sums))


def receive(
    group: Group, buckets: list[Tensor], sums: Callable[[Tensor], Tensor], meanwhile: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Fills the buckets. Checksums as they were sent and as they arrived, int64 [num_buckets, 2] each. meanwhile: what this process does once
    the first bucket is under way."""
    sent = torch.zeros(max(len(buckets), 1), 2, dtype=torch.int64, device=group.device)
    arrived = torch.zeros_like(sent)
    # Each bucket has memory of its own here, so some are always asked for ahead: the learner waits for none of what this process does.
    works = [group.start(bucket) for bucket in buckets[:AHEAD]]
    meanwhile()
    for number, bucket in enumerate(buckets):
        if number + AHEAD < len(buckets):
            works.append(group.start(buckets[number + AHEAD]))
        group.wait(works[number])
        arrived[number] = sums(bucket)
    group.wait(group.start(sent))
    return sent, arrived
