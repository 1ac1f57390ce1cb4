"""Both ends of a transfer of weights, whatever carries its buckets.

    learner                                        engine
    layout ──────────────────────────────────────> checks it against the model, makes room for it: "ready", or why not
    waits for all ─ "go", or what is wrong ──────> joins
    buckets and their checksums ─────────────────> staging, checksums of what arrived
    waits for all <─────────────────────────────── "ok", or why not: the report

The sender takes part in every gather of the learner's ranks to the end, also after a transfer has broken: the other ranks wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from winnow.rollout import broadcast, ipc
from winnow.rollout.transport import (
    GRACE_S,
    Channel,
    Layout,
    LinkBroken,
    Order,
    Ticket,
    check_sums,
    checksum,
    fill,
)
from winnow.rollout.weights import Kept, Staged, WeightError, check_match, state_of

log = logging.getLogger("winnow.rollout")


class Sender:
    """A sending rank of the learner: the channel it keeps for its life, and what it has set up for the engines it sends to."""

    def __init__(self, host: str, device: torch.device) -> None:
        self.device, self.channel = device, Channel(f"{host}:0", host=True)
        self._membership = broadcast.Membership()
        self._buffers: list[ipc.Bounce] = []
        self._opened: set[str] = set()  # incarnations that have mapped the buffers
        self._kept = Kept()

    @property
    def address(self) -> str:
        return self.channel.address

    def send(self, order: Order, layout: Layout, tensors: Iterator[Tensor]) -> dict[int, str]:
        """{worker: "ok", or what went wrong there}. Goes through `tensors`, in the layout's order, to their end in any case."""
        broken = ""
        try:
            self._make_buffers(layout)
            carrier = self._open(order, layout)

            def free(number: int) -> Tensor:
                carrier.free(number)
                return self._buffers[number % ipc.BUFFERS].data

            for number, bucket in fill(layout, tensors, free, self._kept):
                carrier.send(number, bucket, checksum)
            carrier.finish()
        except LinkBroken as error:
            broken = self._give_up(order.ticket.session, error)
        except Exception as error:  # the learner's own, memory for one: the engines need not find out by waiting
            self._give_up(order.ticket.session, error)
            raise
        finally:
            for _ in tensors:  # the other ranks wait for their gathers; nobody touches a buffer that may still be read
                pass
        return self._report(order, layout, broken)

    def _open(self, order: Order, layout: Layout) -> Any:
        """Tells the engines what comes, waits for all of them and sets up what carries the buckets."""
        ticket, session = order.ticket, order.ticket.session
        self.channel.say(f"{session}/layout", layout.write())
        for rank, member in enumerate(order.members, 1):
            answer = self.channel.hear(f"{session}/ready/{rank}", ticket.wait_s, member.name, session)
            if answer != "ready":
                raise LinkBroken(f"{member.name} takes no part: {answer}")
        self.channel.say(f"{session}/go", "go")
        if ticket.kind == "ipc":
            return ipc.IpcSender(self.channel, order, self._buffers, self._opened)
        return broadcast.BroadcastSender(self._membership.of(ticket, self.device), layout.num_buckets)

    def _make_buffers(self, layout: Layout) -> None:
        """Two buffers of a bucket's size, that stay."""
        size = min(layout.bucket_bytes, max(layout.nbytes, 1))
        if not self._buffers or self._buffers[0].data.numel() < size:
            self._opened.clear()
            self._buffers = [ipc.Bounce(size, self.device) for _ in range(ipc.BUFFERS)]

    def _give_up(self, session: str, error: Exception) -> str:
        """Releases whoever waits for this transfer. Returns why."""
        why = str(error) if isinstance(error, LinkBroken) else f"the learner failed: {type(error).__name__}: {error}"
        self._membership.leave()
        self._opened.clear()  # nobody knows who has mapped what
        self.channel.say(f"{session}/stop", why)
        return why

    def _report(self, order: Order, layout: Layout, broken: str) -> dict[int, str]:
        """What every engine says in the end. What was said is forgotten where all went well: nobody reads it any more."""
        ticket, report = order.ticket, {}
        for rank, member in enumerate(order.members, 1):
            limit = GRACE_S if broken else ticket.stall_s
            try:
                report[member.number] = self.channel.hear(f"{ticket.session}/said/{rank}", limit, member.name)
            except LinkBroken as error:
                report[member.number] = str(error)
        if any(said != "ok" for said in report.values()):
            log.warning("weights of version %d: %s", layout.version, broken or report)
            self._membership.leave()
            self._opened.clear()
            return report
        ranks, numbers = range(1, ticket.world), range(layout.num_buckets)
        keys = ["layout", "go"] + [f"{word}/{rank}" for rank in ranks for word in ("ready", "said")]
        if ticket.kind == "ipc":
            keys += [f"handles/{rank}" for rank in ranks] + [f"filled/{number}" for number in numbers]
            keys += [f"taken/{number}/{rank}" for rank in ranks for number in numbers]
        self.channel.forget([f"{ticket.session}/{key}" for key in keys])
        return report


class Receiver:
    """An engine's end: its connection to the learner, its group, its view of the learner's buffers. For one thread at a time."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._membership = broadcast.Membership()
        self._ipc = ipc.IpcReceiver()
        self._stream: Any = None

    def receive(self, ticket: Ticket, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of a transfer, in memory of their own on the model's device, complete. The model is not touched, and may be at work.

        WeightError: they must not be used; LinkBroken: they did not come.
        """
        device = next(model.parameters()).device
        channel = self._connected(ticket)
        try:
            with self._own_stream(device):
                layout, stream = self._prepare(channel, ticket, model, device)
                staged: list[Staged] = []

                def meanwhile() -> (
                    None
                ):  # hundreds of views, and where each goes: found while the first bucket is on its way
                    staged.append(Staged(model, layout.tensors(stream), layout.version))

                channel.hear(f"{ticket.session}/go", ticket.wait_s + GRACE_S, "the learner", ticket.session)
                buckets = [stream[layout.span(number)] for number in range(layout.num_buckets)]
                if ticket.kind == "ipc":
                    sent, arrived = self._ipc.receive(channel, ticket, buckets, checksum, meanwhile)
                else:
                    sent, arrived = broadcast.receive(self._membership.of(ticket, device), buckets, checksum, meanwhile)
                try:
                    check_sums(layout, sent, arrived)
                except WeightError:
                    channel.check(
                        ticket.session
                    )  # a transfer that was given up meanwhile says nothing about the weights
                    raise
        except Exception as error:
            self._failed(channel, ticket, error)
            raise
        channel.say(f"{ticket.session}/said/{ticket.rank}", "ok")
        return staged[0]

    def _prepare(
        self, channel: Channel, ticket: Ticket, model: nn.Module, device: torch.device
    ) -> tuple[Layout, Tensor]:
        """The layout, checked, and room for the whole stream, which the learner is told."""
        session, ready, targets = ticket.session, f"{ticket.session}/ready/{ticket.rank}", state_of(model)
        try:
            layout = Layout.read(channel.hear(f"{session}/layout", ticket.wait_s, "the learner", session))
            check_match(targets, layout.shapes, layout.version)
            stream = room(layout, device)
        except WeightError as error:
            channel.say(ready, f"refused: {error}")
            raise
        channel.say(ready, "ready")
        return layout, stream

    @contextmanager
    def _own_stream(self, device: torch.device) -> Iterator[None]:
        """A stream beside the engine's own work; done when the block ends."""
        if device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(
            torch.cuda.current_stream(device)
        )  # the model may still read what came last, in the same memory
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _connected(self, ticket: Ticket) -> Channel:
        if self._channel is None or self._channel.address != ticket.address:
            self._membership.leave()
            self._ipc = ipc.IpcReceiver()
            self._channel = Channel(ticket.address)
        return self._channel

    def _failed(self, channel: Channel, ticket: Ticket, error: Exception) -> None:
        """Says what went wrong here, if anybody can still hear it."""
        if not isinstance(error, WeightError):
            self._membership.leave()
        try:
            channel.say(f"{ticket.session}/said/{ticket.rank}", f"{type(error).__name__}: {error}")
        except LinkBroken as gone:
            self._channel = None
            log.warning("%s", gone)


def room(layout: Layout, device: torch.device) -> Tensor:
    """Memory for a whole update, uint8 [nbytes]. WeightError where there is not enough."""
    try:
        return torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise WeightError(
            f"weights of version {layout.version}: no room beside the model for {layout.nbytes / 1e9:.2f} GB until they are checked: lower "
            "rollout.num_pages, or set cluster.transport to store"
        ) from error
