"""The sandbox: what a program may do works, what it may not has a named outcome, and nothing of it is left, whatever it tries."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from winnow.rewards import sandbox
from winnow.rewards.sandbox import Limits, Sandbox, SandboxError, SandboxUnavailable
from winnow.rewards.sandbox_values import NotPlain, decode, encode

SUITE = Path(__file__).parent / "attack_suite.py"
NOBODY = 65534
LIMITS = Limits(wall_s=5, cpu_s=2, memory_bytes=256 << 20, output_bytes=1 << 16, scratch_bytes=4 << 20)


def opened(mechanism: str | None = None, slots: int = 2) -> Sandbox:
    box = Sandbox(slots, mechanism, LIMITS)
    try:
        box.start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return box


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    opened_box = opened()
    yield opened_box
    opened_box.close()


# ------------------------------------------------------------------------------------------------------------- what a program may do


def test_a_program_reads_writes_and_ends_as_it_would_alone(box: Sandbox) -> None:
    run = box.run("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nprint('e', file=sys.stderr)", "1 2\n3")
    assert (
        (run.outcome, run.stdout, run.stderr) == ("ok", "6\n", "e\n") and run.wall_s < 5 and run.memory_bytes > 1 << 20
    )
    big = "7" * 300_000
    assert box.run("print(len(input()))", big).stdout == "300000\n"
    assert box.run("print(input())", "naïve \udcff 😀").stdout == "naïve \udcff 😀\n"
    assert box.run("pass", big).outcome == "ok", "stdin that nobody reads must not block"
    text = "import threading\nfound = []\nt = threading.Thread(target=found.append, args=(1,))\nt.start()\nt.join()\nprint(found)"
    assert box.run(text).stdout == "[1]\n"
    assert (
        box.run("if __name__ == '__main__':\n    print(open('in/a.txt').read())", files={"in/a.txt": "x"}).stdout
        == "x\n"
    )
    assert box.run("import atexit\natexit.register(print, 'bye')").stdout == "bye\n"
    dataclass = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(1))"
    assert box.run(dataclass).stdout == "P(x=1)\n"


def test_the_hash_seed_is_fixed_and_nothing_stays_between_programs(box: Sandbox) -> None:
    source = (
        "import os\nprint(hash('a'), os.listdir('.'))\nopen('left', 'w').write('x')\nimport builtins\nbuiltins.left = 1"
    )
    assert len({box.run(source).stdout for _ in range(4)}) == 1
    assert box.run("print(left)").outcome == "exception"


@pytest.mark.parametrize(
    ("source", "outcome", "detail"),
    [
        ("1 / 0", "exception", "ZeroDivisionError"),
        ("def (", "exception", "SyntaxError"),
        ("import sys; sys.exit(3)", "exit", "exit status 3"),
        ("import sys; sys.exit('no')", "exception", "no"),
        ("b'x' * (1 << 40)", "memory", "bytes of address space"),
        ("while True: print('x' * 1000)", "output", "bytes of output"),
        ("import time; time.sleep(60)", "timeout", "0.5 s"),
        ("import ctypes; ctypes.string_at(0)", "signal", "SIGSEGV"),
    ],
)
def test_every_end_has_a_name(box: Sandbox, source: str, outcome: str, detail: str) -> None:
    limits = Limits(wall_s=0.5, memory_bytes=256 << 20, output_bytes=10_000) if outcome == "timeout" else None
    run = box.run(source, limits=limits)
    assert run.outcome == outcome and detail in run.detail, run


def test_processor_time_counts_apart_from_the_wall(box: Sandbox) -> None:
    run = box.run("while True: pass", limits=Limits(wall_s=20, cpu_s=1))
    assert run.outcome == "cpu" and run.wall_s < 15


def test_processes_only_where_they_are_allowed(box: Sandbox) -> None:
    source = "import subprocess, sys\nprint(subprocess.run([sys.executable or 'python'], input='', capture_output=True).returncode)"
    forks = (
        "import os\npid = os.fork()\nif pid == 0: os._exit(3)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert box.run(forks).outcome == "exception"
    assert box.run(source).outcome == "exception"
    assert box.run(forks, limits=Limits(processes=4)).stdout == "3\n"


# ----------------------------------------------------------------------------------------------------------------------- function tests


def test_tests_see_values_and_nothing_else(box: Sandbox) -> None:
    source = """
import collections, fractions
def echo(*a, **k): return (a, k) if k else a[0] if len(a) == 1 else a
def sort_it(x): x.sort()
def fails(): raise KeyError('k')
def evens(n): return (i for i in range(n) if i % 2 == 0)
def count(t): return collections.Counter(t)
def apply(f, *a): return f(*a)
class Node:
    def __init__(self, v): self.v, self.left = v, None
def total(n): return 0 if n is None else n.v + total(n.left)
"""
    tests = [
        "assert echo((1, [2.5, {'a': {3}}])) == (1, [2.5, {'a': {3}}])",
        "assert echo(2**200) == 2**200 and echo(-0.0) == 0 and echo(float('inf')) == float('inf')",
        "assert echo(1, x=2) == ((1,), {'x': 2})",
        "x = [3, 1, 2]\nsort_it(x)\nassert x == [1, 2, 3]",
        "try:\n    fails()\n    assert False\nexcept KeyError:\n    pass",
        "assert list(evens(5)) == [0, 2, 4] and sum(evens(7)) == 12",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert apply(lambda a, b: a * 10 + b, 3, 4) == 34 and apply(max, 3, 4) == 4",
        "assert apply(lambda v: apply(echo, v) * 10, 3) == 30",
        "n = Node(1)\nn.left = Node(2)\nn.left.left = Node(4)\nassert total(n) == 7 and n.left.v == 2",
        "assert math.isclose(echo(0.1) * 3, 0.3)",
        "assert echo(3) == 4",
        "assert echo(Node(1)) == 1",
        "assert missing(1) == 2",
        "assert 1 / 0",
    ]
    run = box.test(source, tests)
    expected = ["pass"] * 11 + ["wrong", "wrong", "raised:NameError", "error:ZeroDivisionError"]
    assert run.outcome == "ok" and list(run.results) == expected


def test_names_shadow_built_ins_only_where_they_are_the_programs(box: Sandbox) -> None:
    source = "def sum(a, b): return a - b\ndef len(x): return 99\n"
    tests = ["assert sum(5, 3) == 2", "assert len([1]) == 1"]
    assert box.test(source, tests, names=["sum"]).results == ("pass", "pass")


def test_a_program_that_cannot_be_loaded_is_named(box: Sandbox) -> None:
    for source, outcome, detail in (
        ("def f(x: return", "exception", "SyntaxError"),
        ("import sys\nsys.exit(0)", "exit", "SystemExit"),
        ("raise ValueError('at import')", "exception", "ValueError: at import"),
    ):
        run = box.test(source, ["assert f(1) == 1"])
        assert run.outcome == outcome and detail in run.detail and run.results == ()


def test_broken_tests_are_no_verdict_on_the_program(box: Sandbox) -> None:
    for setup, tests in (("1 / 0", ["assert f()"]), ("", ["assert ("])):
        with pytest.raises(SandboxError, match="the tests are broken"):
            box.test("def f(): return 1", tests, setup)
    assert box.run("print(1)").stdout == "1\n"


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**300), 1.5, float("inf"), "a\udc80", [], [1, [2]], (1, (2,)), {1: {2: 3}}, {(1, 2): [3]}, {1, 2}, frozenset({1}),
        b"\x00\xff", bytearray(b"a"), 1 + 2j, range(1, 9, 3), Decimal("0.10"), Fraction(1, 3), int, dict,
    ],
)  # fmt: skip
def test_values_survive_the_journey_with_their_types(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


def test_forged_values_become_what_they_hold() -> None:
    class Text(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    back = decode(encode([Text("a"), {Text("k"): True}]))
    assert type(back[0]) is str and back[0] != "b" and [type(key) for key in back[1]] == [str]
    nested: list[Any] = []
    for _ in range(500):
        nested = [nested]
    for bad in (nested, object(), lambda: 1):
        with pytest.raises(NotPlain):
            encode(bad)
    for malformed in ({"t": 1}, {"x": 1}, {"i": "zz"}, {"B": "print"}, {"t": [], "s": []}, {"d": [[[], 1]]}, {"r": 1}):
        with pytest.raises(NotPlain):
            decode(malformed)


# ------------------------------------------------------------------------------------------------------------------------------ attacks


def check_suite(report: dict[str, Any]) -> None:
    assert len(report["attacks"]) >= 100
    for attack in report["attacks"]:
        assert not attack["escaped"] and not attack["credit"], attack
        assert attack["outcome"] in attack["allowed"], attack
    assert report["intact"], "a file outside was changed"
    assert report["after"] == report["before"], "processes are left"
    assert report["left"] == 0, "processes outlive the sandbox"


def run_suite(mechanism: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("attack_suite", SUITE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_suite(mechanism, slots=6)


def run_suite_as_nobody(mechanism: str) -> dict[str, Any]:
    """The suite by another interpreter, as an ordinary user. Skips, with the reason, where that user cannot run it."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user; the test without a user change has run as an ordinary one")
    as_nobody: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    room = Path(sandbox.__file__).resolve().parent
    boot = "import sys, types\nfor n, p in (('winnow', []), ('winnow.rewards', [sys.argv[1]])):\n    m = types.ModuleType(n)\n    m.__path__ = p\n    sys.modules[n] = m\n"
    probe = boot + "import winnow.rewards.sandbox, sys\nassert sys.version_info >= (3, 11)\nopen(sys.argv[2]).close()"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            subprocess.run(
                [python, "-B", "-c", probe, room, SUITE], check=True, capture_output=True, cwd="/", **as_nobody
            )
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        pytest.skip("no Python of 3.11 or newer, or not this folder, can be read by an ordinary user here")
    script = (
        boot
        + f"sys.argv[:] = [{str(SUITE)!r}, {mechanism!r}, '6']\nimport runpy\nrunpy.run_path({str(SUITE)!r}, run_name='__main__')"
    )
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": "/tmp"}
    done = subprocess.run(
        [python, "-B", "-c", script, room],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment,
        timeout=150,
        **as_nobody,
    )
    if "SandboxUnavailable" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(170)
def test_attacks_on_what_this_host_offers() -> None:
    box = opened(slots=1)
    box.close()
    check_suite(run_suite(box.mechanism))


@pytest.mark.timeout(170)
def test_attacks_as_an_ordinary_user() -> None:
    check_suite(run_suite_as_nobody("namespaces"))


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["bubblewrap", "landlock"])
@pytest.mark.parametrize("user", ["this", "nobody"])
def test_attacks_on_every_mechanism(mechanism: str, user: str) -> None:
    if user == "this":
        opened(mechanism, slots=1).close()
    check_suite(run_suite(mechanism) if user == "this" else run_suite_as_nobody(mechanism))


# ------------------------------------------------------------------------------------------------------------------- choice and custody


def test_without_a_mechanism_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MECHANISMS", ("bubblewrap",))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv(sandbox.SETTING, raising=False)
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap: bwrap is not installed.*set WINNOW_SANDBOX=unsafe"):
        Sandbox(1).run("print(1)")
    with pytest.raises(ValueError, match="unknown: set WINNOW_SANDBOX to auto"):
        Sandbox(1, "docker")
    monkeypatch.setenv(sandbox.SETTING, "unsafe")
    box = Sandbox(1)
    try:
        assert "unsafe" in box.describe() and box.run("print(1)").stdout == "1\n"
    finally:
        box.close()


def test_it_says_what_is_in_use(box: Sandbox) -> None:
    assert box.mechanism in box.describe() and "seccomp" in box.describe() and "rlimits" in box.describe()


def test_a_dead_zygote_is_an_error_once_and_replaced() -> None:
    box = opened(slots=1)
    try:
        child = box.all[0].child
        assert child is not None
        killer = threading.Timer(0.5, child.kill)
        killer.start()
        with pytest.raises(SandboxError, match="zygote"):
            box.run("import time; time.sleep(4)")
        killer.join()
        assert box.run("print(2)").stdout == "2\n"
    finally:
        box.close()
    assert all(slot.child is None for slot in box.all)


def test_programs_run_side_by_side_and_a_hang_holds_up_only_its_own_slot() -> None:
    box = opened(slots=2)
    try:
        started = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            hang = threads.submit(box.run, "import time; time.sleep(60)", limits=Limits(wall_s=2))
            quick = [threads.submit(box.run, f"print({i})") for i in range(20)]
            assert [future.result().stdout for future in quick] == [f"{i}\n" for i in range(20)]
            waited = time.monotonic() - started
            assert hang.result().outcome == "timeout"
        assert waited < 2 or os.getloadavg()[0] > 4, "the other slot went on"
    finally:
        box.close()


def test_programs_run_from_asyncio(box: Sandbox) -> None:
    async def several() -> list[str]:
        runs = await asyncio.gather(*(asyncio.to_thread(box.run, f"print({i})") for i in range(6)))
        return [run.stdout for run in runs]

    assert asyncio.run(several()) == [f"{i}\n" for i in range(6)]


def test_nothing_outlives_the_process_that_ran_it() -> None:
    opened(slots=1).close()
    script = (
        f"import os, sys, threading, time\nsys.path.insert(0, {str(SUITE.parent)!r})\nfrom attack_suite import descendants\n"
        "from winnow.rewards.sandbox import Limits, Sandbox\nbox = Sandbox(1)\nbox.start()\nbefore = descendants(os.getpid())\n"
        "threading.Thread(target=box.run, args=('import time; time.sleep(60)',), kwargs={'limits': Limits(wall_s=60)}, daemon=True).start()\n"
        "while descendants(os.getpid()) == before:\n    time.sleep(0.05)\n"
        "print(*descendants(os.getpid()), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) >= 2, done.stderr
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(running(pid) for pid in pids):
        time.sleep(0.05)
    assert not [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    """Whether the process is there and is no zombie that only waits for its adoptive parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
