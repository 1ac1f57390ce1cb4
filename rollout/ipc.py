"""Buckets by memory that both ends map: CUDA IPC, where an engine shares the learner's GPU; without GPUs, memory of the same host.

    learner: bounce buffer <- bucket, checksum, "filled" ─> engine: copy, "taken" ─> the buffer is filled again

Two bounce buffers are enough: one is filled while the other is read. They belong to the learner and stay over transfers, so each engine
maps them once. A buffer is filled again only when every engine has taken it, so none reads what is being written; an engine that dies
keeps the learner waiting for `stall_s` and no longer, and what it had mapped stays the learner's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.rollout.transport import Channel, LinkBroken, Order, Ticket

BUFFERS = 2


class Bounce:
    """A buffer of `size` bytes that other processes of this host can map: `data`, uint8 [size]. Without a name anywhere: it goes with the
    last process that has it, however that ends."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._fd = -1
        if device.type == "cuda":
            self.data = torch.empty(size, dtype=torch.uint8, device=device)
            return
        self._fd = os.memfd_create("winnow-weights")
        os.ftruncate(self._fd, size)
        self.data = _open(f"/proc/self/fd/{self._fd}", size)

    def handle(self) -> str:
        """What another process needs to map it; of one receiver alone (torch counts them). LinkBroken where the allocator refuses."""
        if self._fd >= 0:
            return json.dumps([f"/proc/{os.getpid()}/fd/{self._fd}", self.data.numel()])
        try:
            shared = self.data.untyped_storage()._share_cuda_()
        except RuntimeError as error:  # of segments that can grow, in some versions
            reason = str(error).splitlines()[0]
            raise LinkBroken(
                f"the learner's memory cannot be shared ({reason}): set cluster.transport to store, or leave expandable_segments out of "
                "PYTORCH_CUDA_ALLOC_CONF"
            ) from error
        return json.dumps([{"hex": item.hex()} if isinstance(item, bytes) else item for item in shared])

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def mapped(handle: str, device: torch.device) -> Tensor:
    """The buffer behind a handle, uint8, in this process. LinkBroken where the system refuses it."""
    items: list[Any] = [bytes.fromhex(item["hex"]) if isinstance(item, dict) else item for item in json.loads(handle)]
    try:
        if device.type == "cpu":
            return _open(*items)
        items[0] = device.index or 0  # this process's number of the GPU, which need not be the learner's
        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(*items)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise LinkBroken(
            f"the learner's memory cannot be opened here ({reason}): set cluster.transport to store"
        ) from error


def _open(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class IpcSender:
    """The sending end of one transfer. buffers: BUFFERS of them; opened: keys of the engines that have mapped them already."""

    def __init__(self, channel: Channel, order: Order, buffers: Sequence[Bounce], opened: set[str]) -> None:
        self.channel, self.order, self._session = channel, order, order.ticket.session
        self.last = -1
        for rank, member in enumerate(order.members, 1):
            handles = [] if member.key in opened else [buffer.handle() for buffer in buffers]
            channel.say(f"{self._session}/handles/{rank}", json.dumps(handles))
            opened.add(member.key)

    def free(self, number: int) -> None:
        """Waits until every engine has taken what the buffer of bucket `number` held."""
        self._taken(number - BUFFERS)

    def send(self, number: int, bucket: Tensor, sums: Callable[[Tensor], Tensor]) -> None:
        values = sums(bucket).tolist()  # waits for the device: the bucket is complete
        self.channel.say(f"{self._session}/filled/{number}", json.dumps(values))
        self.last = number

    def finish(self) -> None:
        for number in range(max(0, self.last - BUFFERS + 1), self.last + 1):
            self._taken(number)

    def _taken(self, number: int) -> None:
        if number < 0:
            return
        for rank, member in enumerate(self.order.members, 1):
            who = f"{member.name}, at bucket {number},"
            self.channel.hear(f"{self._session}/taken/{number}/{rank}", self.order.ticket.stall_s, who, self._session)


class IpcReceiver:
    """The engine's end: the learner's buffers, mapped once for each address that they came from."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def receive(
        self,
        channel: Channel,
        ticket: Ticket,
        buckets: list[Tensor],
        sums: Callable[[Tensor], Tensor],
        meanwhile: Callable[[], None],
    ) -> tuple[Tensor, Tensor]:
        """Fills the buckets. Checksums as they were sent and as they arrived, int64 [num_buckets, 2] each, on the CPU. meanwhile: what this
        process does while the learner fills the first."""
        session = ticket.session

        def hear(key: str) -> Any:
            return json.loads(channel.hear(f"{session}/{key}", ticket.stall_s, "the learner", session))

        handles = hear(f"handles/{ticket.rank}")
        if handles:
            self._buffers = [mapped(handle, buckets[0].device) for handle in handles]
        if not self._buffers:
            raise LinkBroken("the learner believes that its buffers are mapped here, and they are not")
        meanwhile()
        sent, arrived = [], []
        for number, bucket in enumerate(buckets):
            sent.append(hear(f"filled/{number}"))
            bucket.copy_(self._buffers[number % BUFFERS][: bucket.numel()])
            arrived.append(sums(bucket).tolist())  # waits for the device: the buffer has been read
            channel.say(f"{session}/taken/{number}/{ticket.rank}", "1")
        return torch.tensor(sent, dtype=torch.int64).view(-1, 2), torch.tensor(arrived, dtype=torch.int64).view(-1, 2)
