"""The process that programs are forked from: it locks itself up first, then forks one confined process per program, in milliseconds.

    sandbox.py ── control socket: limits and descriptors ──> zygote ── fork ──> program   (no network, no files, no other processes, ...)
                                                                    └─ fork ──> tests     (only where there are some; equally confined)

The zygote never sees a program, its input or its tests: they travel over descriptors that it hands to its children unread, so nothing of
one program, or of its tests, is in the memory of the next. It enforces the wall clock, kills, cleans up and reports how a child ended.

Each program gets a new PID namespace, whose end ends all that lives in it; a fresh scratch folder in memory; no capabilities,
no_new_privs, Landlock, a seccomp list of allowed calls, and rlimits. What the host refuses of this decides which `mechanism` runs; the
first message says what is in force. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from winnow.rewards import sandbox_asserts, sandbox_program, sandbox_seccomp
from winnow.rewards import sandbox_kernel as kernel

SCRATCH = "/tmp"
WARM = """
abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath collections contextlib copy csv dataclasses datetime decimal
difflib enum fnmatch fractions functools glob graphlib hashlib heapq html inspect io itertools json keyword locale logging lzma math
numbers operator os pathlib pickle pprint queue random re secrets select shlex shutil signal socket statistics string struct subprocess
sys tempfile textwrap threading time traceback types typing unicodedata unittest urllib.parse uuid weakref zlib
"""  # imported before the fork
ISOLATED = ("namespaces", "bubblewrap")  # mechanisms with PID and mount namespaces
FAR = 200  # descriptors from here on are in nobody's way
KILL = b"kill"
TICK_S = 0.05  # between looks at a scratch folder that the kernel does not bound
LAST_WORDS_S = 0.2  # for a program to end after its tests did
SETUP_S = 10.0  # confining a child


def main() -> None:
    """`python -c ... FOLDER SPEC FD`; FD is a SOCK_SEQPACKET socket. First message: what is in force, or the error."""
    spec = json.loads(sys.argv[2])
    control = socket.socket(fileno=int(sys.argv[3]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in WARM.split():
        with contextlib.suppress(ImportError):  # this interpreter was built without it: programs will be told the same
            importlib.import_module(name)
    try:
        zygote = Zygote(spec, control)
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    control.send(json.dumps({"mechanism": spec["mechanism"], "layers": zygote.layers}).encode())
    zygote.serve()


class Zygote:
    """One program at a time. Raises OSError when the mechanism cannot be had here."""

    def __init__(self, spec: dict[str, Any], control: socket.socket) -> None:
        self.mechanism: str = spec["mechanism"]
        self.readable: list[str] = spec["readable"]
        self.control = control
        self.isolated = self.mechanism in ISOLATED
        if self.mechanism == "namespaces":
            enter_namespaces(spec["root"], self.readable)
        elif self.mechanism == "bubblewrap":
            kernel.unshare(kernel.CLONE_NEWNS, "mount")
            for path in spec["hidden"]:
                kernel.mount("tmpfs", path, "tmpfs", kernel.MS_RDONLY, "size=4k")
        self.confined = self.mechanism != "unsafe"
        self.layers = self.probe_layers()
        self.self_fd = os.pidfd_open(os.getpid())
        gc.collect()
        gc.freeze()  # forks share the heap: collections must not write to it

    def probe_layers(self) -> list[str]:
        """What each program is held by. Raises OSError when a layer that this mechanism stands on is missing."""
        if not self.confined:
            return ["rlimits"]
        sandbox_seccomp.make_filter(
            False, False
        )  # raises on a machine without a table; what it reads stays for the forks
        landlock = kernel.landlock_version()
        if self.mechanism == "landlock" and not landlock:
            raise OSError("this kernel has no Landlock")
        spaces = ["user, mount, PID, network, IPC and UTS namespaces"] if self.isolated else []
        return [*spaces, *([f"Landlock {landlock}"] if landlock else []), "seccomp", "no capabilities", "rlimits"]

    def serve(self) -> None:
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
            if not message:
                os._exit(0)  # the owner is gone; whatever runs in our namespaces goes with us
            if message == KILL:
                continue  # it came too late: that program had ended
            try:
                report = self.run(json.loads(message), list(descriptors))
            except OSError as error:
                report = {"error": str(error)}
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            self.control.send(json.dumps(report).encode())

    def run(self, job: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Runs one program, and its tests where there is a descriptor for them; how the program ended. Raises OSError."""
        scratch = self.make_scratch(job["limits"]["scratch"])
        ours, theirs = socket.socketpair()
        children: list[Child] = []
        try:
            if len(descriptors) > 4:
                children.append(self.start(job, scratch, [*descriptors[:4], ours.fileno()], lambda: run_served(4, 3)))
                tests = [*descriptors[:3], descriptors[4], theirs.fileno()]
                children.append(self.start(job, None, tests, lambda: run_judged(4, 3)))
            else:
                children.append(self.start(job, scratch, descriptors[:4], lambda: run_alone(3)))
            ours.close()
            theirs.close()
            return self.watch(children, scratch, job["limits"])
        finally:
            ours.close()
            theirs.close()
            for child in children:
                child.end()
            self.remove_scratch(scratch)

    def watch(self, children: Sequence[Child], scratch: str, limits: dict[str, Any]) -> dict[str, Any]:
        """Waits for the last child (the tests, else the program), the deadline, or a word on the control socket."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        for child in children:
            poll.register(child.descriptor, select.POLLIN)
        wall_s = limits["wall"]
        started, reason = time.monotonic(), "ended"
        tick = wall_s if self.isolated else TICK_S
        while children[-1].status is None:
            left = started + wall_s - time.monotonic()
            ready = [descriptor for descriptor, _ in poll.poll(max(0.0, min(tick, left)) * 1000)] if left > 0 else []
            for child in children:
                if child.descriptor in ready:
                    poll.unregister(child.descriptor)
                    child.reap()
            if self.control.fileno() in ready:
                if not self.control.recv(1 << 16):
                    os._exit(0)
                reason = "killed"  # the only thing that is said during a run is KILL
                break
            if not ready and left <= 0:
                reason = "timeout"
                break
            if not self.isolated and folder_size(scratch) > limits["scratch"]:
                reason = "scratch"
                break
        program = children[0]
        # Either the tests are done, and so is the program in a moment; or they ended because it had ended: then how?
        if len(children) > 1 and reason == "ended":
            select.select([program.descriptor], [], [], LAST_WORDS_S)
            program.look()
        by_itself = program.status is not None
        for child in children:
            child.end()
        return {
            "reason": reason,
            "ended": by_itself,  # not by us
            "status": program.status,
            "wall": time.monotonic() - started,
            "cpu": program.usage.ru_utime + program.usage.ru_stime,
            "memory": program.usage.ru_maxrss * 1024,
        }

    def start(
        self, job: dict[str, Any], scratch: str | None, descriptors: Sequence[int], body: Callable[[], int]
    ) -> Child:
        """A confined child that runs `body` with `descriptors` as its 0, 1, 2, ... Raises OSError when it cannot be confined."""
        news, said = os.pipe()
        if self.isolated:
            kernel.unshare(kernel.CLONE_NEWPID, "PID")
        pid = os.fork()
        if pid == 0:
            code, say = 70, len(descriptors)
            try:
                renumber([*descriptors, said])
                self.confine(job["limits"], scratch)
                os.write(say, b"+")
                os.close(say)
                code = body()
            except OSError as error:
                with contextlib.suppress(OSError):  # closed already: then the program runs, and its end says the rest
                    os.write(say, str(error).encode())
            finally:
                os._exit(code)
        if self.isolated:
            kernel.checked("returning to the own PID namespace", kernel.libc().setns(self.self_fd, kernel.CLONE_NEWPID))
        os.close(said)
        child = Child(pid)
        heard = b""
        if select.select([news], [], [], SETUP_S)[0]:
            heard = os.read(news, 4096)
        os.close(news)
        if heard != b"+":
            child.end()
            raise OSError(f"a program could not be confined: {heard.decode(errors='replace') or 'it gave no sign'}")
        return child

    def confine(self, limits: dict[str, Any], scratch: str | None) -> None:
        """The child's way into its cage; the order matters: each step takes away what the ones before it needed."""
        kernel.die_with_parent()
        os.setsid()
        home = scratch or "/"
        os.chdir(home)
        os.environ.clear()
        os.environ.update({"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.mechanism == "landlock" and os.getuid() == 0:
            kernel.become_nobody()
            kernel.die_with_parent()  # a change of user forgets it
        if self.confined:
            kernel.drop_capabilities()
            if kernel.landlock_version():
                readable = ["/"] if self.isolated else [*self.readable, "/dev/null", "/dev/zero", "/dev/urandom"]
                kernel.landlock(readable, [scratch] if scratch else [])
        kernel.set_limits(limits["rlimits"])
        if self.confined:
            sandbox_seccomp.install(limits["processes"] > 0, only_self=not self.isolated)

    def make_scratch(self, size: int) -> str:
        if self.isolated:
            kernel.mount_scratch(SCRATCH, size)
            return SCRATCH
        folder = tempfile.mkdtemp(prefix="winnow-scratch-", dir="/tmp")
        if self.mechanism == "landlock" and os.getuid() == 0:
            os.chown(folder, kernel.NOBODY, kernel.NOBODY)
        return folder

    def remove_scratch(self, scratch: str) -> None:
        if self.isolated:
            kernel.unmount(scratch)
        else:
            shutil.rmtree(scratch, ignore_errors=True)  # does not follow links


def renumber(descriptors: Sequence[int]) -> None:
    """Makes these descriptors 0, 1, 2, ... and closes all others."""
    for place, descriptor in enumerate([fcntl.fcntl(d, fcntl.F_DUPFD, FAR) for d in descriptors]):
        os.dup2(descriptor, place)
    os.closerange(len(descriptors), 1 << 16)


class Child:
    """A forked process, watched through a pidfd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.descriptor = os.pidfd_open(pid)
        self.status: int | None = None
        self.usage: Any = None

    def reap(self) -> None:
        _, self.status, self.usage = os.wait4(self.pid, 0)

    def look(self) -> None:
        """Reaps it if it has ended."""
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status, self.usage = status, usage

    def end(self) -> None:
        """Kills it, and with it everything in its PID namespace, and waits for that. Safe to call twice."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def folder_size(path: str) -> int:
    """Bytes on disk below a folder, links not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def enter_namespaces(root: str, readable: Sequence[str]) -> None:
    """Moves this process into namespaces of its own and goes on as their first process; the one before waits for its end.

    Root builds the file tree while it still may read everything, then becomes nobody. Anyone else needs a user namespace first.
    """
    proc = os.open("/proc", os.O_DIRECTORY)
    if os.getuid() == 0:
        kernel.unshare(kernel.CLONE_NEWNS, "mount")
        kernel.make_root(root, readable, SCRATCH)
        kernel.become_nobody()
        kernel.new_user(proc)
        kernel.unshare(kernel.CLONE_NEWNS, "mount")
    else:
        kernel.new_user(proc)
        kernel.unshare(kernel.CLONE_NEWNS, "mount")
        kernel.make_root(root, readable, SCRATCH)
    os.close(proc)
    others = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
    kernel.unshare(others | kernel.CLONE_NEWPID, "network, IPC, UTS, cgroup and PID")
    pid = os.fork()
    if pid:
        os.closerange(0, 1 << 16)
        os.waitpid(pid, 0)
        os._exit(0)
    kernel.die_with_parent()


def run_alone(channel: int) -> int:
    """The body of a program with its own standard streams; its source comes over `channel`."""
    with socket.socket(fileno=channel) as source:
        job = sandbox_program.receive(source)
    sandbox_program.write_files(job["files"])
    return sandbox_program.run_program(job["source"])


def run_served(calls: int, channel: int) -> int:
    """The body of a program that tests call over `calls`."""
    with socket.socket(fileno=channel) as source:
        job = sandbox_program.receive(source)
    sandbox_program.write_files(job["files"])
    return sandbox_program.serve_program(job["source"], socket.socket(fileno=calls))


def run_judged(calls: int, channel: int) -> int:
    """The body of the tests: they come over `channel`, and the report goes back there."""
    with socket.socket(fileno=channel) as owner, socket.socket(fileno=calls) as program:
        report = sandbox_asserts.run_tests(sandbox_program.receive(owner), program)
        sandbox_program.send(owner, report)
    return 0
