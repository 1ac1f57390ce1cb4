"""Processes that a command starts to measure something end with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from winnow.rl import children

CHILD = """
import subprocess, sys, time
from winnow.rl import children
children.watch_parent(int(sys.argv[1]))
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(grandchild.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import os, sys, time
from pathlib import Path
from winnow.rl import children
process = children.start([sys.executable, "-c", sys.argv[2], str(os.getpid())], Path(sys.argv[1]))
print(process.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids: int) -> bool:
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def first_line(log: Path) -> int:
    deadline = time.monotonic() + 30
    while not (text := log.read_text() if log.exists() else "").endswith("\n"):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    return int(text)


def test_a_child_and_its_own_do_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log), CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child, grandchild = int(parent.stdout.readline()), first_line(log)
    assert alive(child) and alive(grandchild)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert gone(child, grandchild)


def test_the_end_of_a_child_is_that_of_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = children.start([sys.executable, "-c", CHILD, "0"], log, env={"A": "b"})
    grandchild = first_line(log)
    process.kill()  # itself only
    process.wait(10)
    assert alive(grandchild)
    children.end(process)
    assert gone(grandchild) and process.returncode == -signal.SIGKILL
