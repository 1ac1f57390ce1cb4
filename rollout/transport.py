"""Weights that travel as a stream of buckets, from a learner's process straight into the engines': what both ends agree on.

    learner: Layout ──────── checked by every engine against its own model: an unknown, missing or misshapen tensor ends it here
             tensors -> one stream of bytes, cut into buckets -> checksum, bucket -> engine: staging -> checksum -> switch to `version`

A bucket travels by CUDA IPC (ipc.py) or by a broadcast (broadcast.py); everything said beside it goes through a `Channel`. An engine stages
a whole update in memory of its own and compares the checksums before its model sees a byte: a transfer that breaks or arrives damaged
leaves it with the weights it has. Every wait is bounded; whoever gives up says why, and the others stop waiting for it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, TypeVar

import torch
from torch import Tensor

from winnow.rollout.weights import Kept, WeightError

Result = TypeVar("Result")
ALIGN = 16  # bytes: a view of any dtype can start at every offset
GRACE_S = 5.0  # for the others' last words, once something has gone wrong
_LISTEN_S = 0.5  # between two looks whether somebody has given up
_FIRST_PAUSE_S, _LAST_PAUSE_S = (
    1e-4,
    1e-2,
)  # between two looks for what is waited for: a tenth of the wait so far, within these
_ROW = 512  # 8-byte words of a row of the checksum's matrix


class LinkBroken(RuntimeError):
    """A transfer that ended early through no fault of the weights: whoever did not get them may be sent them again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One tensor of the stream, contiguous: `nbytes` bytes at `offset`, a multiple of 16. dtype: a torch dtype's name."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int

    def of(self, typed: Mapping[str, Tensor], begin: int) -> Tensor:
        """The tensor whose bytes begin at `begin`, of memory as `Layout.typed` shows it: a view, made in one call, for there are hundreds."""
        data = typed[self.dtype]
        if not self.nbytes:
            return data.new_empty(self.shape)
        return data.as_strided(self.shape, self.strides, begin // data.dtype.itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the tensors of one version lie in a stream of `nbytes` bytes that travels in buckets of `bucket_bytes`."""

    version: int
    pieces: tuple[Piece, ...]
    nbytes: int
    bucket_bytes: int
    announced: str  # the pieces, as text

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], version: int, bucket_bytes: int) -> Layout:
        """Of tensors in their order; those split over ranks count whole."""
        if bucket_bytes < ALIGN or bucket_bytes % ALIGN:
            raise ValueError(f"a bucket of {bucket_bytes} bytes is no multiple of {ALIGN}: set cluster.bucket_mb >= 1")
        rows = tuple((n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items())
        pieces, nbytes, announced = _laid_out(rows)
        return cls(version=version, pieces=pieces, nbytes=nbytes, bucket_bytes=bucket_bytes, announced=announced)

    @classmethod
    def read(cls, text: str) -> Layout:
        head, _, names = text.partition("\n")
        version, bucket_bytes = json.loads(head)
        pieces, nbytes, announced = _laid_out(_rows(names))
        return cls(version=version, pieces=pieces, nbytes=nbytes, bucket_bytes=bucket_bytes, announced=announced)

    def write(self) -> str:
        return f"{json.dumps([self.version, self.bucket_bytes])}\n{self.announced}"

    @property
    def num_buckets(self) -> int:
        return -(-self.nbytes // self.bucket_bytes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {piece.name: piece.shape for piece in self.pieces}

    def span(self, bucket: int) -> slice:
        """The bytes of the stream that the bucket holds."""
        begin = bucket * self.bucket_bytes
        return slice(begin, min(begin + self.bucket_bytes, self.nbytes))

    def inside(self, bucket: int) -> list[str]:
        """The names of the tensors with bytes in the bucket."""
        span = self.span(bucket)
        return [p.name for p in self.pieces if p.nbytes and p.offset < span.stop and p.offset + p.nbytes > span.start]

    def tensors(self, stream: Tensor) -> dict[str, Tensor]:
        """The tensors, as views of the stream (uint8 [nbytes])."""
        typed = self.typed(stream)
        return {piece.name: piece.of(typed, piece.offset) for piece in self.pieces}

    def typed(self, data: Tensor) -> dict[str, Tensor]:
        """uint8 [n], n a multiple of 16, seen in each dtype of the tensors."""
        return {name: data.view(getattr(torch, name)) for name in {piece.dtype for piece in self.pieces}}


# From one version to the next nothing of this changes: a large model's takes milliseconds, once.


@lru_cache(maxsize=8)
def _laid_out(rows: tuple[tuple[str, tuple[int, ...], str], ...]) -> tuple[tuple[Piece, ...], int, str]:
    """(name, shape, dtype) of each tensor -> where it lies, the bytes in all, and the rows as text."""
    pieces, offset = [], 0
    for name, shape, dtype in rows:
        nbytes = prod(shape) * getattr(torch, dtype).itemsize
        strides = (*accumulate(shape[:0:-1], mul, initial=1),)[::-1] if shape else ()
        pieces.append(Piece(name=name, shape=shape, strides=strides, dtype=dtype, offset=offset, nbytes=nbytes))
        offset += -(-nbytes // ALIGN) * ALIGN
    return tuple(pieces), offset, json.dumps(rows)


@lru_cache(maxsize=8)
def _rows(text: str) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((name, tuple(shape), dtype) for name, shape, dtype in json.loads(text))


def fill(
    layout: Layout, tensors: Iterator[Tensor], free: Callable[[int], Tensor], kept: Kept
) -> Iterator[tuple[int, Tensor]]:
    """(number, bytes) of each bucket of the stream, in order. free(number): a uint8 buffer of `bucket_bytes` that may be overwritten now.
    kept: what copying needs, for as long as the sender sends.

    Tensors that lie within a bucket are copied together when it is full; until then a bucket's worth of them is kept.
    """
    number, buffer, size = 0, free(0) if layout.nbytes else torch.empty(0, dtype=torch.uint8), layout.bucket_bytes
    pieces: list[Piece] = []
    sources: list[Tensor] = []

    def settle() -> None:
        offsets = [piece.offset - number * size for piece in pieces]

        def targets() -> list[Tensor]:
            typed = layout.typed(buffer)
            return [piece.of(typed, at) for piece, at in zip(pieces, offsets, strict=True)]

        kept.run(number, buffer, offsets, sources, targets)
        pieces.clear()
        sources.clear()

    for piece, tensor in zip(layout.pieces, tensors, strict=True):
        if tensor.shape != piece.shape or str(tensor.dtype) != f"torch.{piece.dtype}":
            raise WeightError(
                f"weights of version {layout.version}: tensor {piece.name!r} is {tensor.dtype} {tuple(tensor.shape)}, but "
                f"torch.{piece.dtype} {piece.shape} was announced to the engines: nothing of this update is used"
            )
        at = piece.offset
        if piece.nbytes and at // size > number:
            settle()
            yield number, buffer
            number += 1
            buffer = free(number)
        if piece.nbytes and at + piece.nbytes <= (number + 1) * size:
            pieces.append(piece)
            sources.append(tensor.detach())
            continue
        rest = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if piece.nbytes else buffer[:0]
        while rest.numel():  # over the end of one bucket, or of several
            if at // size > number:
                settle()
                yield number, buffer
                number += 1
                buffer = free(number)
            inside = at - number * size
            part = rest[: size - inside]
            buffer[inside : inside + part.numel()].copy_(part)
            at, rest = at + part.numel(), rest[part.numel() :]
    if layout.nbytes:
        settle()
        yield number, buffer[: layout.nbytes - number * size]


def checksum(data: Tensor) -> Tensor:
    """int64 [2] of bytes (uint8 [n], n a multiple of 16): sums modulo 2^64 of its 8-byte words, by rows and by columns of a matrix, each
    weighed by an odd number of its own. Any change within one word changes both, in whatever order the device adds."""
    words = data.view(torch.int64)
    whole = words.numel() // _ROW * _ROW
    matrix, rest = words[:whole].view(-1, _ROW), words[whole:]
    if data.is_cuda:
        from winnow.kernels.byte_copies import row_and_column_sums

        columns, rows = row_and_column_sums(matrix)
    else:
        columns, rows = matrix.sum(0), (matrix.sum(1) * _weights(len(matrix), data.device)).sum().view(1)
    if rest.numel():
        columns[: rest.numel()] += rest * _weights(1, data.device, shift=7)
        rows = rows + rest.sum() * _weights(1, data.device, shift=len(matrix))
    return torch.cat([rows, (columns * _weights(_ROW, data.device)).sum().view(1)])


@lru_cache(maxsize=16)
def _weights(count: int, device: torch.device, shift: int = 0) -> Tensor:
    """`count` odd numbers, well spread over 64 bits. Kept: they are the same for every bucket, and several launches to make."""
    numbers = torch.arange(shift, shift + count, device=device, dtype=torch.int64)
    return (numbers * -0x61C8864680B583EB) ^ (numbers << 17) | 1


def check_sums(layout: Layout, sent: Tensor, arrived: Tensor) -> None:
    """sent, arrived: int64 [num_buckets, 2]. WeightError for the first bucket that differs, with both checksums."""
    bad = (sent.cpu() != arrived.cpu()).any(1).nonzero().flatten().tolist()
    if bad:
        names = layout.inside(bad[0])
        raise WeightError(
            f"weights of version {layout.version}: bucket {bad[0]} of {layout.num_buckets} (tensors {names[0]!r} to {names[-1]!r}) arrived "
            f"with checksum {written(arrived[bad[0]])}, sent with {written(sent[bad[0]])} ({len(bad)} buckets differ); it was damaged on "
            "the way and nothing of this update is used: send it again"
        )


def written(sums: Tensor) -> str:
    """A checksum as 32 hex digits."""
    return "".join(f"{value % (1 << 64):016x}" for value in sums.tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One worker that takes part in a transfer. name: as errors call it; key: of this incarnation; device: a GPU's uuid, or cpu."""

    number: int
    name: str
    key: str
    host: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """What one engine must know to take part: the channel's address, its `rank` among `world` (0 is the learner), and how long to wait."""

    kind: str  # ipc | nccl
    version: int
    address: str  # host:port
    session: str  # of this transfer
    group: str  # of the processes that stay together over transfers
    rank: int
    world: int
    wait_s: float  # until everybody is there
    stall_s: float  # without progress from then on, before the transfer is given up


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What one sending rank of the learner must do. members: of ranks 1, 2, ..."""

    ticket: Ticket
    members: tuple[Member, ...]


def within(seconds: float, what: str, function: Callable[[], Result]) -> Result:
    """The function's result, computed by a thread that is left behind where it takes longer: LinkBroken then, and for any error of it."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = function()
        except Exception as error:
            box["error"] = error

    thread = threading.Thread(target=run, name="winnow-bounded", daemon=True)
    thread.start()
    thread.join(seconds + 1.0)  # the function's own limits come first, and say more
    if "error" in box:
        error = box["error"]
        raise error if isinstance(error, LinkBroken) else LinkBroken(f"{what}: {error}") from error
    if "result" not in box:
        raise LinkBroken(f"{what} was not complete within {seconds:.0f} s")
    return box["result"]


class Channel:
    """Short texts between the ends of a transfer, over a TCP store that the learner's process keeps. Not for two threads at once.

    A store whose process is stopped, or whose machine is gone without a word, answers nothing and ends no call: so they are made by a thread
    that is left behind then, and with it the channel.
    """

    def __init__(self, address: str, host: bool = False, connect_s: float = 20.0) -> None:
        name, _, port = address.rpartition(":")
        self._host, self._mute = host, False

        def connect() -> Any:
            return torch.distributed.TCPStore(
                name, int(port), is_master=host, wait_for_workers=False, timeout=timedelta(seconds=connect_s)
            )

        self.store = within(connect_s, f"no connection to the learner at {address}", connect)
        self.address = f"{name}:{self.store.port}"

    def say(self, key: str, text: str) -> None:
        if self._mute:
            raise LinkBroken(f"{key!r} could not be said: {self.address} does not answer")
        try:
            self.store.set(key, text)
        except Exception as error:
            raise LinkBroken(f"{key!r} could not be said at {self.address}: {error}") from error

    def hear(self, key: str, seconds: float, who: str, session: str = "") -> str:
        """The text, once `who` has said it. LinkBroken when it does not come within `seconds`, or somebody has stopped the session."""
        if self._host:
            return self._hear(key, seconds, who, session)

        def answered() -> str:
            try:
                return self._hear(key, seconds, who, session)
            finally:
                self._mute = False

        self._mute = True  # for as long as the thread is there
        return within(seconds, f"an answer of {self.address}, where {who} was waited for ({key}),", answered)

    def _hear(self, key: str, seconds: float, who: str, session: str) -> str:
        begin, looked = time.monotonic(), 0.0
        while not self._said(key):  # a blocking wait of the store's would write a warning at every timeout
            now = time.monotonic()
            if session and now - looked > _LISTEN_S:
                looked = now
                self._check(session)
            if now - begin > seconds:
                raise LinkBroken(f"{who} said nothing for {seconds:.0f} s ({key})")
            time.sleep(min(max((now - begin) / 10, _FIRST_PAUSE_S), _LAST_PAUSE_S))
        return self.store.get(key).decode()

    def check(self, session: str) -> None:
        """LinkBroken where somebody has given the session up, or nobody answers."""
        within(GRACE_S, f"an answer of {self.address}", lambda: self._check(session))

    def _check(self, session: str) -> None:
        if self._said(f"{session}/stop"):
            raise LinkBroken(self.store.get(f"{session}/stop").decode())

    def forget(self, keys: list[str]) -> None:
        """Drops what was said, where this process keeps the store."""
        for key in keys:
            self.store.delete_key(key)

    def _said(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except torch.distributed.DistError as error:
            raise LinkBroken(f"the channel at {self.address} is gone: {error}") from error


def own_device(device: Any) -> str:
    """What tells this process's device from others of its host: a GPU's uuid, or cpu."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return str(torch.cuda.get_device_properties(torch.device(device)).uuid)
