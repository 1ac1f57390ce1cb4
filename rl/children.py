"""Processes that a command starts to measure something: what keeps them from outliving it.

start ─> a session of its own ─ end: the whole session is killed        in the child: watch_parent, for a parent that was killed itself
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

WATCH_S = 1.0
WAIT_S = 30.0  # for a killed process


def start(
    command: Sequence[str], log: Path, *, piped: bool = False, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """The command as the leader of a session. Its errors go to `log`, its output too unless `piped`; env: over the own environment."""
    with log.open("w") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE if piped else errors, stderr=errors, text=True, start_new_session=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Kills the process, and those that it started, also where they outlived it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=WAIT_S)


def watch_parent(parent: int | None = None) -> None:
    """Ends this process's session once its parent is gone: nobody would be left to end it, and a GPU's memory would stay taken."""
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        end_together()

    threading.Thread(target=watch, name="winnow-watch-parent", daemon=True).start()


def end_together() -> None:
    """This process and those that it started, where `start` made it the leader of their session."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)  # started by hand: the group is somebody else's
