"""Warm, killable processes for graders: every call bounded in time and memory, from threads, Ray actors and asyncio alike.

    pool = shared()                                                    one for this process; or GraderPool(workers=4, seconds=2)
    pool.call("winnow.rewards.reasoning:last_number", "it is 4")       the function's result, or a Failure
    pool.map("package.module:function", [(a, b), ...])                 results and Failures in the order of the calls
    await pool.call_async("package.module:function", a, b)

A function is named `package.module:function`; arguments and results are pickled. There are no alarms and no signal handlers anywhere: a
call past its time is ended by killing its process, and a fork of the warm nursery (grader_process.py) takes its place in milliseconds.
What can go wrong is a typed Failure, never an exception and never a 0:

    timeout  no result within `seconds`          memory  over `memory_bytes` of address space
    crash    the process died (exit, signal)     error   the function raised, or cannot be imported or pickled
    busy     no process became free within WAIT_S
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from winnow.rewards.grader_process import receive_frame, send_frame
from winnow.rollout.schema import Failure

SECONDS = 5.0  # one call
MEMORY_BYTES = 4 << 30  # address space of one worker
START_S = 60.0  # the nursery's start, and one import in it, on a busy machine
WAIT_S = 600.0  # for a free worker
BOOT = "import sys; sys.path[:] = sys.argv[3:]; from winnow.rewards.grader_process import main; main()"


class GraderPool:
    """`workers` processes (None: one a core). Thread-safe; started by the first call; `close` or the end of this process ends them."""

    def __init__(self, workers: int | None = None, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self.workers = workers or os.cpu_count() or 1
        if self.workers < 1 or not seconds > 0:
            raise ValueError(
                f"a grader pool of {workers} workers and {seconds} s a call cannot work: both must be above 0"
            )
        self.seconds = seconds
        self.nursery = Nursery(memory_bytes)
        self.idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # last in, first out: the warm ones are used first
        for _ in range(self.workers):
            self.idle.put(Worker(self.nursery))
        self.executor = ThreadPoolExecutor(self.workers, thread_name_prefix="grader")

    def load(self, function: str) -> Failure | None:
        """Imports a function where workers are forked from, so that they have it; why that failed, or None. `call` does so by itself."""
        return self.nursery.load(function)

    def call(self, function: str, *arguments: Any, seconds: float | None = None) -> Any | Failure:
        """The function's result, or a Failure. Waits for a free worker first, which does not count as the call's time."""
        try:
            request = pickle.dumps((function, arguments))
        except Exception as error:
            return Failure(
                kind="error", detail=f"{function}: the arguments cannot be pickled: {type(error).__name__}: {error}"
            )
        try:
            worker = self.idle.get(timeout=WAIT_S)
        except queue.Empty:
            return Failure(kind="busy", detail=f"{function}: none of {self.workers} workers was free in {WAIT_S:g} s")
        try:
            return worker.call(function, request, seconds or self.seconds)
        finally:
            self.idle.put(worker)

    def map(self, function: str, calls: Iterable[Sequence[Any]], seconds: float | None = None) -> list[Any | Failure]:
        """One result or Failure per call, in order, `workers` at a time."""
        return list(self.executor.map(lambda arguments: self.call(function, *arguments, seconds=seconds), calls))

    async def call_async(self, function: str, *arguments: Any, seconds: float | None = None) -> Any | Failure:
        """As `call`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, lambda: self.call(function, *arguments, seconds=seconds))

    def close(self) -> None:
        """Ends all processes. Calls under way end as Failure("crash"); the pool starts again when it is used again."""
        self.nursery.stop()


class Worker:
    """One forked process and our end of its socket. Used by one thread at a time."""

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery
        self.connection: socket.socket | None = None
        self.process: Handle | None = None
        self.generation = 0

    def call(self, function: str, request: bytes, seconds: float) -> Any | Failure:
        problem = self.nursery.load(function)
        if self.generation != self.nursery.generation:
            self.stop()  # it died with its nursery
        if problem is None and self.connection is None:
            problem = self.start()
        if problem is not None:
            return problem
        assert self.connection is not None
        try:
            deadline = time.monotonic() + seconds
            send_frame(self.connection, request, deadline)
            kind, value = pickle.loads(receive_frame(self.connection, deadline))
        except TimeoutError:
            self.stop()
            return Failure(kind="timeout", detail=f"{function}: no result within {seconds:g} s")
        except (EOFError, OSError):
            self.stop()
            return Failure(
                kind="crash", detail=f"{function}: its process died (an exit, a signal, or the memory limit)"
            )
        except Exception as error:  # a result that does not unpickle here
            self.stop()
            return Failure(
                kind="error", detail=f"{function}: the result cannot be read: {type(error).__name__}: {error}"
            )
        return value if kind == "ok" else Failure(kind=kind, detail=f"{function}: {value}")

    def start(self) -> Failure | None:
        """A new process out of the nursery; what went wrong, or None."""
        ours, theirs = socket.socketpair()
        try:
            self.process = self.nursery.fork(theirs)
        except (OSError, EOFError, ValueError) as error:
            ours.close()
            return Failure(kind="crash", detail=f"no grader process can be started: {type(error).__name__}: {error}")
        finally:
            theirs.close()
        self.connection, self.generation = ours, self.nursery.generation
        return None

    def stop(self) -> None:
        """Kills the process, if there is one."""
        if self.process is not None:
            self.process.kill()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None


class Handle:
    """A process that is not our child, killed without the risk of hitting another that got its number (pidfd, where there is one)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.descriptor: int | None = None
        with contextlib.suppress(OSError, AttributeError):
            self.descriptor = os.pidfd_open(pid)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            if self.descriptor is None:
                os.kill(self.pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Nursery:
    """The process that workers are forked from. It imports every grader once, whoever asks first."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.generation = 0  # grows with every start: workers of an earlier one are dead
        self.lock = threading.Lock()
        self.loaded: dict[str, Failure | None] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None

    def load(self, function: str) -> Failure | None:
        """Imports the function there; why that failed, or None."""
        with self.lock:
            if function not in self.loaded or self.child is None or self.child.poll() is not None:
                try:
                    said = self.ask(f"load {function}")
                except (OSError, EOFError) as error:
                    self.end()
                    return Failure(
                        kind="crash", detail=f"{function}: its import failed: {type(error).__name__} {error}"
                    )
                self.loaded[function] = None if said == "ok" else Failure(kind="error", detail=f"{function}: {said}")
            return self.loaded[function]

    def fork(self, connection: socket.socket) -> Handle:
        """A new worker that serves `connection`. Raises OSError, EOFError or ValueError when the nursery is gone."""
        with self.lock:
            return Handle(int(self.ask("fork", connection)))

    def ask(self, message: str, connection: socket.socket | None = None) -> str:
        if self.child is None or self.child.poll() is not None:
            self.start()
        assert self.control is not None
        self.control.settimeout(START_S)
        socket.send_fds(self.control, [message.encode()], [] if connection is None else [connection.fileno()])
        said = self.control.recv(1 << 16)
        if not said:
            raise EOFError("the nursery is gone")
        return said.decode()

    def start(self) -> None:
        self.end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", BOOT, str(theirs.fileno()), str(self.memory_bytes), *sys.path]
        with theirs:
            self.child = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # its forks must not inherit a broken thread pool
                start_new_session=True,
            )
        self.control, self.generation = ours, self.generation + 1

    def end(self) -> None:
        """Ends the nursery, which kills its workers first. Needs the lock."""
        self.loaded.clear()
        if self.control is not None:
            self.control.close()
        if self.child is not None:
            try:
                self.child.wait(2.0)
            except subprocess.TimeoutExpired:  # it hangs in an import; its workers die with it
                self.child.kill()
                self.child.wait()
        self.child = self.control = None

    def stop(self) -> None:
        with self.lock:
            self.end()


_shared: dict[int, GraderPool] = {}
_shared_lock = threading.Lock()


def shared() -> GraderPool:
    """This process's pool. A fork of this process gets one of its own."""
    with _shared_lock:
        if os.getpid() not in _shared:
            _shared[os.getpid()] = GraderPool()
        return _shared[os.getpid()]
