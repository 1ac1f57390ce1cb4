"""One zygote of the sandbox, as its owner sees it: started, spoken to, replaced; and what a program's end is called.

    Slot.run ── limits, descriptors ──> zygote (sandbox_zygote.py)          Slot.run <── status ── zygote
             ── source ──> program      ── tests ──> tests                           <── output ── program      <── report ── tests

Everything that a program is given, and everything that it says, goes over pipes of its own; the zygote only hears the limits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from winnow.rewards.sandbox_program import HEADER, send

START_S = 60.0  # a zygote's start on a busy machine
GRACE_S = 15.0  # beyond a program's wall time, for the zygote's answer
KILL = b"kill"
NOBODY = 65534
ISOLATED = ("namespaces", "bubblewrap")  # a program's user has no other processes there
THREADS = 64
STACK_BYTES = 64 << 20
DETAIL = 300
BOOT = """
import sys, types
for name, path in (("winnow", []), ("winnow.rewards", [sys.argv[1]])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from winnow.rewards.sandbox_zygote import main
main()
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed: this says nothing about the program."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    wall_s: float = 10.0
    cpu_s: float = 5.0  # of one process
    memory_bytes: int = 512 << 20  # address space of one process
    output_bytes: int = 1 << 20  # stdout and stderr together
    scratch_bytes: int = 16 << 20  # all files together, and each of them
    processes: int = 0  # 0: threads only; above: so many more may be forked, and exec is allowed
    open_files: int = 64

    def as_job(self, count_processes: bool) -> dict[str, Any]:
        """For the zygote. `count_processes`: the user has no other processes, so RLIMIT_NPROC counts the program's own."""
        rlimits = {
            "cpu": math.ceil(self.cpu_s),
            "as": self.memory_bytes,
            "fsize": self.scratch_bytes,
            "nofile": self.open_files,
            "stack": STACK_BYTES,
            "core": 0,
            "memlock": 0,
            "msgqueue": 0,
        }
        if count_processes:
            rlimits["nproc"] = THREADS + self.processes
        return {"wall": self.wall_s, "scratch": self.scratch_bytes, "processes": self.processes, "rlimits": rlimits}


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a program ended. `results`: one word per test (`sandbox_asserts.run_tests`); empty where there were none, or it never got there."""

    outcome: str
    detail: str = ""
    stdout: str = ""
    stderr: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0  # largest resident size
    results: tuple[str, ...] = ()


@dataclass
class Traffic:
    """What goes to and comes from one program, pumped between polls."""

    limit: int
    stdin: memoryview
    heard: dict[int, bytearray] = field(default_factory=dict)  # by descriptor

    @property
    def over(self) -> bool:
        return sum(map(len, self.heard.values())) > self.limit


class Slot:
    """One zygote and the conversation with it. Used by one thread at a time."""

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism
        self.child: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.layers: tuple[str, ...] = ()

    def start(self) -> None:
        """Raises SandboxError with the reason when the mechanism does not work here."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = tempfile.mkdtemp(prefix="winnow-sandbox-")
        try:
            with theirs:
                command, options = zygote_command(self.mechanism, root, theirs.fileno())
                self.child = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"},
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    **options,
                )
            self.control = ours
            ours.settimeout(START_S)
            said = json.loads(ours.recv(1 << 16) or b"{}")
        except TimeoutError:
            said = {"error": f"no sign of life within {START_S:g} s"}
        finally:
            with contextlib.suppress(OSError):
                os.rmdir(root)
        assert self.child is not None and self.child.stderr is not None
        if "mechanism" not in said:
            self.child.kill()
            complaint = self.child.stderr.read().decode(errors="replace").strip().splitlines()
            self.stop()
            raise SandboxError(said.get("error") or (complaint[-1] if complaint else "its process ended at once"))
        self.layers = tuple(said["layers"])

    def stop(self) -> None:
        """Kills the zygote and all that it runs. Safe to call twice."""
        if self.control is not None:
            self.control.close()
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
            if self.child.stderr is not None:
                self.child.stderr.close()
        self.child = self.control = None

    def run(self, job: dict[str, Any], stdin: str, tests: dict[str, Any] | None, limits: Limits) -> Run:
        """Raises SandboxError; the zygote is then started anew at the next run."""
        try:
            if self.child is None or self.child.poll() is not None:
                self.stop()
                self.start()
            with contextlib.ExitStack() as stack:
                return self._converse(stack, job, stdin, tests, limits)
        except SandboxError:
            raise  # said in good order: the zygote lives
        except (OSError, EOFError, ValueError) as error:
            self.stop()
            raise SandboxError(f"{self.mechanism}: {type(error).__name__}: {error}") from None
        except BaseException:
            self.stop()
            raise

    def _converse(
        self, stack: contextlib.ExitStack, job: dict[str, Any], stdin: str, tests: dict[str, Any] | None, limits: Limits
    ) -> Run:
        assert self.control is not None
        deadline = time.monotonic() + limits.wall_s + GRACE_S
        pipes = [os.pipe() for _ in range(3)]  # stdin, stdout, stderr
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        mine = [pipes[0][1], pipes[1][0], pipes[2][0]]
        open_ends = {*theirs, *mine}
        stack.callback(close_all, open_ends)
        pairs = [socket.socketpair() for _ in range(1 if tests is None else 2)]
        for one in (one for pair in pairs for one in pair):
            stack.enter_context(one)
        message = json.dumps({"limits": limits.as_job(self.mechanism in ISOLATED)})
        self.control.settimeout(GRACE_S)
        socket.send_fds(self.control, [message.encode()], [*theirs, *(pair[1].fileno() for pair in pairs)])
        for end in theirs:
            os.close(end)
            open_ends.discard(end)
        for (ours, other), value in zip(pairs, (job, tests), strict=False):
            other.close()
            ours.settimeout(limits.wall_s + GRACE_S)
            with contextlib.suppress(ConnectionError):  # it is dead already: the report will say so
                send(ours, value)
        for end in mine:
            os.set_blocking(end, False)
        text = stdin.encode("utf-8", "surrogateescape")
        traffic = Traffic(limits.output_bytes, memoryview(text), {mine[1]: bytearray(), mine[2]: bytearray()})
        report = self._pump(traffic, mine[0], open_ends, deadline)
        if "error" in report:
            raise SandboxError(report["error"])
        verdict = None if tests is None else read_verdict(pairs[1][0])
        stdout, stderr = (bytes(traffic.heard[end][: limits.output_bytes]) for end in mine[1:])
        run = Run(
            outcome="ok",
            stdout=stdout.decode("utf-8", "surrogateescape"),
            stderr=stderr.decode("utf-8", "replace"),
            wall_s=report["wall"],
            cpu_s=report["cpu"],
            memory_bytes=report["memory"],
        )
        return judge(run, report, verdict, traffic.over, limits, tests is not None)

    def _pump(self, traffic: Traffic, writer: int, open_ends: set[int], deadline: float) -> dict[str, Any]:
        """Feeds stdin and collects output until the zygote reports. Raises TimeoutError past the deadline, EOFError when it died."""
        assert self.control is not None
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        for end in traffic.heard:
            poll.register(end, select.POLLIN)
        poll.register(writer, select.POLLOUT)
        killed = False
        while True:
            if time.monotonic() > deadline:
                raise TimeoutError("the zygote did not report")
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if writer in ready and not feed(traffic, writer):
                poll.unregister(writer)
                os.close(writer)
                open_ends.discard(writer)
            for end in traffic.heard:
                if end in ready and not collect(traffic, end):
                    poll.unregister(end)
            if traffic.over and not killed:
                self.control.send(KILL)
                killed = True
            if self.control.fileno() in ready:
                said = self.control.recv(1 << 16)
                if not said:
                    raise EOFError("the zygote died")
                while sum(collect(traffic, end) for end in traffic.heard) and not traffic.over:
                    pass  # what was written before the end
                return dict(json.loads(said))


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def feed(traffic: Traffic, writer: int) -> bool:
    """Writes what fits of stdin; False when there is no more to write."""
    try:
        traffic.stdin = traffic.stdin[os.write(writer, traffic.stdin[: 1 << 16]) :] if traffic.stdin else traffic.stdin
        return bool(traffic.stdin)
    except BlockingIOError:
        return True
    except BrokenPipeError:
        return False


def collect(traffic: Traffic, end: int) -> bool:
    """Reads what there is; False at the end, or when there is nothing. Past the limit it is thrown away."""
    try:
        chunk = os.read(end, 1 << 16)
    except BlockingIOError:
        return False
    if not traffic.over:
        traffic.heard[end] += chunk
    return bool(chunk)


def read_verdict(connection: socket.socket) -> dict[str, Any] | None:
    """The tests' report, if they got as far as writing all of it."""
    connection.settimeout(GRACE_S)
    data = bytearray()
    with contextlib.suppress(OSError):
        while chunk := connection.recv(1 << 16):
            data += chunk
    complete = len(data) >= HEADER.size and len(data) == HEADER.size + HEADER.unpack(data[: HEADER.size])[0]
    return json.loads(data[HEADER.size :]) if complete else None


def judge(
    run: Run, report: Mapping[str, Any], verdict: Mapping[str, Any] | None, over: bool, limits: Limits, tested: bool
) -> Run:
    """The run with its outcome."""
    results = tuple((verdict or {}).get("results", ()))
    run = replace(run, results=results)
    if over:
        return replace(run, outcome="output", detail=f"more than {limits.output_bytes} bytes of output")
    if report["reason"] == "timeout":
        return replace(run, outcome="timeout", detail=f"not done after {limits.wall_s:g} s")
    if report["reason"] == "scratch":
        return replace(run, outcome="output", detail=f"more than {limits.scratch_bytes} bytes of files")
    if verdict is not None and verdict["end"] == "broken":
        raise SandboxError(f"the tests are broken: {verdict['detail']}")
    if verdict is not None and verdict["end"] == "complete":
        return run
    if verdict is not None and verdict["loaded"]:
        name, message = verdict["loaded"]["raised"][0], verdict["loaded"]["message"]
        outcome = {"SystemExit": "exit", "MemoryError": "memory"}.get(name, "exception")
        return replace(run, outcome=outcome, detail=f"{name}: {message}"[:DETAIL])
    outcome, detail = ending(report["status"], report["cpu"], run.stderr, limits)
    ended = replace(run, outcome=outcome, detail=detail)
    if tested and (
        ended.outcome == "ok" or not report["ended"]
    ):  # it left with status 0, or answered nonsense, before the tests were done
        why = (verdict or {}).get("detail") or "the program ended before its tests did"
        return replace(ended, outcome="exit", detail=why)
    return ended


def ending(status: int, cpu_s: float, stderr: str, limits: Limits) -> tuple[str, str]:
    """Outcome and detail of a wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= limits.cpu_s - 0.5):
            return "cpu", f"more than {limits.cpu_s:g} s of processor time"
        names = {int(known): known.name for known in signal.Signals}
        return "signal", names.get(number, f"signal {number}")
    code = os.WEXITSTATUS(status)
    if code == 0:
        return "ok", ""
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "")
    if last.startswith("MemoryError"):
        return "memory", f"more than {limits.memory_bytes} bytes of address space"
    if code == 1 and last and not last.startswith(" "):
        return "exception", last[:DETAIL]
    return "exit", f"exit status {code}"


def zygote_command(mechanism: str, root: str, descriptor: int) -> tuple[list[str], dict[str, Any]]:
    """The command that starts a zygote, and further arguments of Popen. Raises SandboxError when a tool is missing."""
    here = str(Path(__file__).resolve().parent)
    readable = readable_paths()
    spec = {"mechanism": mechanism, "root": root, "readable": readable, "hidden": [here]}
    arguments = ["-s", "-S", "-P", "-c", BOOT, here, json.dumps(spec), str(descriptor)]
    if mechanism != "bubblewrap":
        return [sys.executable, *arguments], {}
    tool = shutil.which("bwrap")
    if tool is None:
        raise SandboxError("bwrap is not installed")
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    binds: list[str] = []
    for path in [*readable, python, here]:
        binds += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    inner = [
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--uid",
        "1000",
        "--gid",
        "1000",
    ]
    devices = [word for name in ("null", "zero", "random", "urandom") for word in ("--dev-bind", *[f"/dev/{name}"] * 2)]
    places = [*devices, "--dir", "/tmp"]  # not --dev: it costs the zygote its rights over its own PID namespace
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    return [tool, *inner, *binds, *places, "--", python, *arguments], user


def readable_paths() -> list[str]:
    """What a program may read: the standard library and the system's shared libraries, nothing else. Outer folders first."""
    paths = [
        sysconfig.get_path("stdlib"),
        *(f"{prefix}/{sys.platlibdir}" for prefix in (sys.base_prefix, sys.base_exec_prefix)),
    ]
    kept: list[str] = []
    for path in sorted(
        {os.path.abspath(p) for p in [*paths, "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64"]}, key=len
    ):
        if os.path.isdir(path) and not any(path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept
