"""math-verify in a process of its own that can be killed, with a hard bound on every comparison.

math-verify bounds itself with `signal.alarm`, which raises in threads (every score silently 0 in threaded actors) and cancels the
caller's own alarm. Here its timeouts are off and the child is killed instead: `9^{9^9}` costs the bound, never the run. The child lives
on between calls (its import takes 0.5 s, a comparison 3 ms); it ends when its input closes, so nothing survives the parent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from functools import cache

START_S = 60.0  # import of math-verify and sympy on a busy machine
BOUND_S = 5.0  # one comparison
MEMORY_BYTES = 4 << 30  # address space of the child

CHILD = """
import json, os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not look like an answer
from math_verify import parse, verify
print(json.dumps(["ready", ""]), file=replies)
for line in sys.stdin:
    gold, reply = json.loads(line)
    try:
        wanted, found = parse(gold, parsing_timeout=None), parse(reply, parsing_timeout=None)
        if not wanted:
            answer = ["error", "the gold answer cannot be parsed: " + gold[-80:]]
        else:
            answer = ["equal" if found and verify(wanted, found, timeout_seconds=None) else "different", ""]
    except MemoryError:
        answer = ["error", "out of memory"]
    except Exception as error:
        answer = ["error", type(error).__name__ + ": " + str(error)[:200]]
    print(json.dumps(answer), file=replies)
"""


class MathProcess:
    """One child, one comparison at a time; threads wait for their turn, each for at most its own bound per comparison before it."""

    def __init__(self, bound_s: float = BOUND_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self.bound_s, self.memory_bytes = bound_s, memory_bytes
        self.lock = threading.Lock()
        self.child: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def equal(self, wanted: str, reply: str) -> tuple[str, str]:
        """("equal" | "different" | "timeout" | "error", detail). Never raises for what the reply holds."""
        with self.lock:
            if self.child is None or self.child.poll() is not None:
                problem = self.start()
                if problem:
                    return problem
            assert self.child is not None and self.child.stdin is not None
            try:
                self.child.stdin.write(json.dumps([wanted, reply]).encode() + b"\n")
                self.child.stdin.flush()
            except OSError as error:
                self.stop()
                return "error", f"the math process is gone: {error}"
            return self.receive(self.bound_s)

    def start(self) -> tuple[str, str] | None:
        """Starts the child and waits until it is ready; what went wrong, or None."""
        command = [sys.executable, "-c", CHILD, str(self.memory_bytes)]
        self.buffer = b""
        self.child = subprocess.Popen(  # the session of its own keeps a Ctrl-C for the parent to handle
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        kind, detail = self.receive(START_S)
        return None if kind == "ready" else ("error", f"the math process did not start ({kind} {detail})".strip())

    def receive(self, bound_s: float) -> tuple[str, str]:
        """One line of the child, or its end: past the bound it is killed, and the next call starts another."""
        assert self.child is not None and self.child.stdout is not None
        deadline, pipe = time.monotonic() + bound_s, self.child.stdout.fileno()
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.stop()
                return "timeout", f"no verdict within {bound_s:g} s"
            chunk = os.read(pipe, 65536)
            if not chunk:
                self.stop()
                return "error", "the math process died (out of memory, or math-verify is not installed)"
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        kind, detail = json.loads(line)
        return kind, detail

    def stop(self) -> None:
        """Kills the child and waits for its end. Safe to call twice."""
        child, self.child = self.child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


@cache
def shared() -> MathProcess:
    """This process's child. One for all threads."""
    return MathProcess()


def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None
