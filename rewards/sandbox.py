"""A real sandbox for Python programs: no network, no files but a scratch folder, no other processes, every resource bounded.

    box = shared()                                           one zygote a core, started when first used; or Sandbox(slots=4)
    run = box.run("print(input())", stdin="4")               run.outcome == "ok", run.stdout == "4\\n"
    run = box.test("def f(x): return x", ["assert f(2) == 2"])   run.results == ("pass",)
    box.describe()                                           which mechanism is in use, and its layers

The strongest mechanism that the host offers is chosen: bubblewrap where installed, else namespaces made by ourselves, else Landlock; all
with seccomp, no capabilities, an unprivileged user and rlimits (sandbox_zygote.py). Where none works, SandboxUnavailable says why each
did not. WINNOW_SANDBOX=NAME asks for one; WINNOW_SANDBOX=unsafe runs programs with limits alone, as whoever runs this.

Every outcome has a name: ok, exception, exit, signal, timeout, cpu, memory, output. Trouble of the sandbox itself is a SandboxError, never
an outcome. Thread-safe; no alarms and no signal handlers; nothing is left running.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.rewards.sandbox_slot import Limits, Run, SandboxError, Slot

MECHANISMS = ("bubblewrap", "namespaces", "landlock")  # strongest first; "unsafe" only by name
SETTING = "WINNOW_SANDBOX"
WAIT_S = 600.0  # for a free slot


class SandboxUnavailable(ValueError):
    """No mechanism works here."""


class Sandbox:
    """`slots` programs at a time (None: one a core). `mechanism`: a name, or "auto". Started by the first run, or by `describe`."""

    def __init__(self, slots: int | None = None, mechanism: str | None = None, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.slots = slots or os.cpu_count() or 1
        self.asked = mechanism or os.environ.get(SETTING) or "auto"
        if self.asked not in ("auto", *MECHANISMS, "unsafe"):
            raise ValueError(
                f"sandbox mechanism {self.asked!r} is unknown: set {SETTING} to auto, {', '.join(MECHANISMS)} or unsafe"
            )
        self.lock = threading.Lock()
        self.mechanism = ""
        self.layers: tuple[str, ...] = ()
        self.idle: queue.LifoQueue[Slot] = queue.LifoQueue()
        self.all: list[Slot] = []

    def start(self) -> None:
        """Chooses the mechanism and makes the slots. Raises SandboxUnavailable, saying of each mechanism why it does not work here."""
        with self.lock:
            if self.mechanism:
                return
            reasons = []
            for name in MECHANISMS if self.asked == "auto" else (self.asked,):
                first = Slot(name)
                try:
                    first.start()
                    tried = first.run({"source": "print(6 * 7)", "files": {}}, "", None, self.limits)
                    if tried.stdout != "42\n":
                        raise SandboxError(f"a trial program ended as {tried.outcome} {tried.detail}")
                except (SandboxError, OSError) as error:
                    first.stop()
                    reasons.append(f"{name}: {error}")
                    continue
                self.layers = first.layers
                self.all = [first, *(Slot(name) for _ in range(self.slots - 1))]
                for slot in reversed(self.all):
                    self.idle.put(slot)
                self.mechanism = name
                return
        raise SandboxUnavailable(
            "programs cannot be run safely here: "
            + "; ".join(reasons)
            + f". Install bubblewrap or allow user namespaces, or set {SETTING}=unsafe to run them without a sandbox"
        )

    def describe(self) -> str:
        """One line for the user: the mechanism in use."""
        self.start()
        return f"sandbox: {self.mechanism} ({', '.join(self.layers)})" + (
            "; programs can read and write what you can" if self.mechanism == "unsafe" else ""
        )

    def run(
        self, source: str, stdin: str = "", files: Mapping[str, str] | None = None, limits: Limits | None = None
    ) -> Run:
        """Runs a program as `python program.py` would, with these files in its scratch folder. Raises SandboxError, SandboxUnavailable."""
        return self._with_slot({"source": source, "files": dict(files or {})}, stdin, None, limits)

    def test(
        self,
        source: str,
        tests: Sequence[str],
        setup: str = "",
        names: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> Run:
        """Judges a program by asserts that it never sees: they are evaluated in another process and call it with plain values.

        `setup`: trusted source that runs before the tests; `names`: what the program must define (names that the tests use and nobody
        defines are looked for in it anyway). Outcome "ok" means that every test was reached; `results` says how each went.
        """
        judged = {"tests": list(tests), "setup": setup, "names": list(names)}
        return self._with_slot({"source": source, "files": {}}, "", judged, limits)

    def _with_slot(self, job: dict[str, Any], stdin: str, tests: dict[str, Any] | None, limits: Limits | None) -> Run:
        self.start()
        try:
            slot = self.idle.get(timeout=WAIT_S)
        except queue.Empty:
            raise SandboxError(f"none of {self.slots} slots was free in {WAIT_S:g} s") from None
        try:
            return slot.run(job, stdin, tests, limits or self.limits)
        finally:
            self.idle.put(slot)

    def close(self) -> None:
        """Ends all zygotes. The sandbox starts them again when it is used again."""
        for slot in self.all:
            slot.stop()


_shared: dict[int, Sandbox] = {}
_shared_lock = threading.Lock()


def shared() -> Sandbox:
    """This process's sandbox. A fork of this process gets one of its own."""
    with _shared_lock:
        if os.getpid() not in _shared:
            _shared[os.getpid()] = Sandbox()
        return _shared[os.getpid()]
