"""Runs tests/data/attacks.txt through a sandbox and reports what happened, as JSON. Needs neither pytest nor numpy: also run as another user.

python tests/attack_suite.py MECHANISM [SLOTS]
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from winnow.rewards.sandbox import Limits, Sandbox

ANSWER = "7919-answer-of-the-grader"
TESTS = [
    "assert f(3) == 7919",
    "import math\nassert math.isclose(f(3), 7919)",
    "assert f([1, 2]) == [2, 4, 7919]",
    "assert all(map(lambda x: f(x) == 7919, [3]))",
]
SHORT_S = 2.0  # by the clock, where a timeout is an allowed end
LIMITS = Limits(wall_s=10.0, cpu_s=1.0, memory_bytes=256 << 20, output_bytes=1 << 16, scratch_bytes=4 << 20)


def read_attacks(path: Path) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(name, kind, allowed outcomes, program) of each section."""
    for section in path.read_text(encoding="utf-8").split("\n### ")[1:]:
        head, _, program = section.partition("\n")
        name, kind, outcomes = (part.strip() for part in head.split("|"))
        yield name, kind, tuple(outcomes.split(",")), program


def serve(listener: socket.socket) -> None:
    """Gives the answer to whoever connects."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.sendall(ANSWER.encode())


def descendants(pid: int) -> set[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    below: set[int] = {pid}
    while new := {child for child, parent in parents.items() if parent in below} - below:
        below |= new
    return below - {pid}


def run_suite(mechanism: str, slots: int = 2) -> dict[str, Any]:
    """`attacks`: per attack its outcome and whether it escaped or got credit; `before` and `after`: processes of the sandbox."""
    listener = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0winnow-attack-suite-{os.getpid()}-{mechanism}")  # the last suite's may be open still
    abstract.listen()
    for server in (listener, abstract):
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    os.environ["SECRET_OF_THE_GRADER"] = ANSWER
    others = descendants(os.getpid())
    box = Sandbox(slots, mechanism, LIMITS)
    described = box.describe()
    with (
        tempfile.NamedTemporaryFile("w", suffix=".canary", dir="/var/tmp") as canary,
        ThreadPoolExecutor(slots) as threads,
    ):
        canary.write(ANSWER)
        canary.flush()
        os.chmod(canary.name, 0o666)  # only the sandbox stands between
        names = {
            "@CANARY@": canary.name,
            "@PORT@": str(listener.getsockname()[1]),
            "@SOCKET@": f"winnow-attack-suite-{os.getpid()}-{mechanism}",
            "@DRIVER@": str(os.getpid()),
        }

        def attack(case: tuple[str, str, tuple[str, ...], str]) -> dict[str, Any]:
            name, kind, allowed, program = case
            for key, value in names.items():
                program = program.replace(key, value)
            limits = replace(LIMITS, wall_s=SHORT_S) if "timeout" in allowed else LIMITS
            if kind == "run":
                run = box.run(program, "7\n", limits=limits)
            else:
                run = box.test(program, TESTS, names=["f"], limits=limits)
            credit = run.stdout.strip() == ANSWER if kind == "run" else "pass" in run.results
            outcome = run.outcome
            if outcome == "ok":
                raised = kind == "test" and any(result.startswith("raised") for result in run.results)
                outcome = "passed" if credit else "exception" if raised else "wrong"
            escaped = any(word in run.stdout + run.stderr for word in ("ESCAPED\n", "ESCAPED ", ANSWER))
            return {
                "name": name, "outcome": outcome, "allowed": allowed, "credit": credit and run.outcome == "ok", "escaped": escaped,
                "detail": run.detail, "stderr": run.stderr[-300:], "stdout": run.stdout[-200:], "wall": run.wall_s,
            }  # fmt: skip

        before = warm(box)
        attacks = list(threads.map(attack, read_attacks(Path(__file__).parent / "data" / "attacks.txt")))
        after = warm(box)
        intact = Path(canary.name).read_text() == ANSWER
    box.close()
    time.sleep(0.1)
    return {
        "described": described, "attacks": attacks, "before": before, "after": after, "left": len(descendants(os.getpid()) - others), "intact": intact,
    }  # fmt: skip


def warm(box: Sandbox) -> int:
    """Starts every slot, sees that each works, and counts the processes below this one."""
    runs = [slot.run({"source": f"print({i})", "files": {}}, "", None, LIMITS) for i, slot in enumerate(box.all)]
    assert [run.stdout for run in runs] == [f"{i}\n" for i in range(len(runs))], runs
    return len(descendants(os.getpid()))


if __name__ == "__main__":
    print(json.dumps(run_suite(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)))
