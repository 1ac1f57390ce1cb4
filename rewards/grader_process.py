"""The far side of `grader_pool`: a nursery that forks workers, and the loop of a worker. Standard library only, so that it starts fast.

    pool ── control socket ──> nursery (imports graders once) ── fork ──> worker <── a socket of its own ── pool

The nursery has one thread and never grades: a fork of it is a warm worker in milliseconds, however the one before it died. Workers end
with their socket, with the nursery, or by SIGKILL; nothing of them survives the pool's process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

HEADER = struct.Struct(">I")
MAX_FRAME = 1 << 30  # bytes
PR_SET_PDEATHSIG = 1
DETAIL = 300  # characters of an exception that are kept


def send_frame(connection: socket.socket, payload: bytes, deadline: float | None = None) -> None:
    """Sends one frame. Raises TimeoutError past the deadline (`time.monotonic()`), OSError when the other side is gone."""
    connection.settimeout(left(deadline))
    connection.sendall(HEADER.pack(len(payload)) + payload)


def receive_frame(connection: socket.socket, deadline: float | None = None) -> bytes:
    """The next frame. Raises TimeoutError past the deadline, EOFError when the other side is gone."""
    (length,) = HEADER.unpack(receive_exactly(connection, HEADER.size, deadline))
    if length > MAX_FRAME:
        raise EOFError(f"a frame of {length} bytes is none of ours")
    return receive_exactly(connection, length, deadline)


def receive_exactly(connection: socket.socket, length: int, deadline: float | None) -> bytes:
    chunks = bytearray()
    while len(chunks) < length:
        connection.settimeout(left(deadline))
        chunk = connection.recv(min(length - len(chunks), 1 << 20))
        if not chunk:
            raise EOFError("the other side closed its socket")
        chunks += chunk
    return bytes(chunks)


def left(deadline: float | None) -> float | None:
    """Seconds until the deadline, for `settimeout`. Raises TimeoutError when there are none."""
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def find_function(name: str) -> Any:
    """`package.module:attribute.of.it`. Raises ImportError or AttributeError."""
    module, _, attributes = name.partition(":")
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def nursery(control: socket.socket, memory_bytes: int) -> None:
    """Serves the control socket until it closes: `load NAME` imports, `fork` with a socket attached gives a worker its life."""
    children: set[int] = set()
    while True:
        reap(children)
        if not select.select([control], [], [], 0.5)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not message:
            for pid in children:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            return
        verb, _, name = message.decode().partition(" ")
        if verb == "load":
            control.send(load(name).encode())
            continue
        pid = os.fork()
        if pid == 0:
            run_worker(control, descriptors[0], memory_bytes)
        children.add(pid)
        os.close(descriptors[0])
        control.send(str(pid).encode())


def load(name: str) -> str:
    """Imports a grader; "ok", or what went wrong."""
    try:
        find_function(name)
        return "ok"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:DETAIL]


def reap(children: set[int]) -> None:
    for pid in list(children):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        children.discard(pid)


def run_worker(control: socket.socket, descriptor: int, memory_bytes: int) -> None:
    """A forked worker's whole life. Never returns."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        control.close()
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with socket.socket(fileno=descriptor) as connection:
            while True:
                send_frame(connection, answer(receive_frame(connection)))
    except (EOFError, OSError):
        pass  # the pool closed the socket
    finally:
        os._exit(0)


def answer(request: bytes) -> bytes:
    """(kind, value) pickled: ("ok", result), ("memory", detail) or ("error", detail)."""
    try:
        name, arguments = pickle.loads(request)
        return pickle.dumps(("ok", find_function(name)(*arguments)))
    except MemoryError:
        return pickle.dumps(("memory", "the grader ran out of its memory limit"))
    except BaseException as error:  # SystemExit too: a grader that exits must not look like a crash of the pool
        return pickle.dumps(("error", f"{type(error).__name__}: {error}"[:DETAIL]))


def main() -> None:
    """Entry of the nursery: `python -c ... FD MEMORY_BYTES`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool's process to handle
    sys.stdout = sys.stderr
    with socket.socket(fileno=int(sys.argv[1])) as control:
        nursery(control, int(sys.argv[2]))
    os._exit(0)
