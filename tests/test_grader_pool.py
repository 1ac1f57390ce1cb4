"""The pool of killable graders, the reward contract over it, and TRL's form: whatever a grader does, every sample gets its own verdict."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from winnow.rewards import grader_pool, programs, sandbox
from winnow.rewards.baseline import play
from winnow.rewards.contract import check_failures, grade
from winnow.rewards.grader_pool import GraderPool
from winnow.rewards.registry import get_reward
from winnow.rewards.trl_functions import BatchReward, WeightedRewards
from winnow.rollout.schema import Failure, Group, Request, Sampling, Score, Task

LAST = "winnow.rewards.reasoning:last_number"
GRADERS = '''
import os, signal, sys, time
from winnow.rollout.schema import Failure, Score

def grade(task, trajectory):
    reply = trajectory.reply
    if reply == "hang": time.sleep(600)
    if reply == "spin":
        while True: pass
    if reply == "exit": os._exit(0)
    if reply == "leave": sys.exit(0)
    if reply == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if reply == "memory": return len("x" * (1 << 40))
    if reply == "raise": raise RuntimeError("poison")
    if reply == "nan": return float("nan")
    if reply == "odd": return lambda: 1
    if reply == "none": return None
    return Score(value=float(reply == task.answer))
grade.seconds = 2.0

def by_length(completions, answer, **columns):
    if "hang" in completions: time.sleep(600)
    if "short" in completions: return [1.0]
    return [float(len(c)) if c else None for c in completions]
by_length.seconds = 0.5

async def later(completions):
    return [0.5] * len(completions)

def here(completions):
    return [float(os.getpid())] * len(completions)
here.in_process = True

def alarm(task, trajectory):
    """What math-verify does, and what scores everything 0 in threads and actors."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    return 1.0
'''
POISON = {"hang": "timeout", "spin": "timeout", "exit": "crash", "kill": "crash", "leave": "error", "memory": "memory", "raise": "error",
          "nan": "invalid", "odd": "error", "none": "not_applicable"}  # fmt: skip


@pytest.fixture(scope="module")
def own_graders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A user's module with graders, importable here and in the pool of this process."""
    folder = tmp_path_factory.mktemp("graders")
    (folder / "own_graders.py").write_text(GRADERS)
    sys.path.insert(0, str(folder))
    grader_pool.shared().close()  # its nursery, if there is one, does not know the folder
    yield "own_graders"
    grader_pool.shared().close()
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    made = GraderPool(2, seconds=20)
    yield made
    made.close()


def group_of(replies: list[str], reward: str, number: int = 0, answer: str = "18", **metadata: Any) -> Group:
    task = Task(
        id=f"t{number}",
        domain="d",
        messages=({"role": "user", "content": "?"},),
        reward=reward,
        answer=answer,
        metadata=metadata,
    )
    name = f"r{number}"
    samples = tuple(play(task, lambda _, r=reply: r, request_id=name, sample=i) for i, reply in enumerate(replies))
    return Group(
        request=Request(request_id=name, task=task, num_samples=len(replies), sampling=Sampling(max_tokens=8)),
        trajectories=samples,
    )


# --------------------------------------------------------------------------------------------------------------------------------- pool


def test_results_come_back_in_order(pool: GraderPool) -> None:
    assert pool.map("operator:mul", [(i, 2) for i in range(200)]) == [2 * i for i in range(200)]


@pytest.mark.parametrize(
    ("function", "arguments", "kind", "detail"),
    [
        ("time:sleep", (60,), "timeout", "0.5 s"),
        ("os:_exit", (0,), "crash", "died"),
        ("os:abort", (), "crash", "died"),
        ("sys:exit", (0,), "error", "SystemExit"),
        ("operator:truediv", (1, 0), "error", "ZeroDivisionError"),
        ("operator:mul", (b"x", 1 << 40), "memory", "memory limit"),
        ("no_such_module:f", (), "error", "No module named"),
        ("os:no_such_function", (), "error", "no attribute"),
        ("threading:Lock", (), "error", "pickle"),
        ("os:getpid", (lambda: 1,), "error", "cannot be pickled"),
    ],
)
def test_every_failure_has_its_kind_and_the_pool_lives_on(
    pool: GraderPool, function: str, arguments: tuple[Any, ...], kind: str, detail: str
) -> None:
    failure = pool.call(function, *arguments, seconds=0.5 if kind == "timeout" else None)
    assert isinstance(failure, Failure) and failure.kind == kind and detail in failure.detail, failure
    assert pool.map("operator:add", [(i, 1) for i in range(4)]) == [1, 2, 3, 4]


def test_a_hang_costs_its_own_worker_its_own_limit() -> None:
    pool = GraderPool(2, seconds=30)
    try:
        pool.map("operator:add", [(1, 1)] * 4)
        with ThreadPoolExecutor(4) as threads:
            started = time.monotonic()
            hang = threads.submit(pool.call, "time:sleep", 60, seconds=2)
            assert list(threads.map(lambda i: pool.call("operator:add", i, 1), range(50))) == list(range(1, 51))
            assert time.monotonic() - started < 2, "one worker hangs, the other does all the rest meanwhile"
            assert hang.result().kind == "timeout"
    finally:
        pool.close()


def running(pid: int) -> bool:
    """Whether the process is there and is no zombie that only waits for its adoptive parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_outlives_the_pool_or_its_process() -> None:
    script = (
        "import os, sys, threading, time\nfrom winnow.rewards.grader_pool import GraderPool\npool = GraderPool(1, seconds=60)\n"
        "print(pool.call('os:getpid'), pool.call('os:getppid'), flush=True)\n"
        "threading.Thread(target=pool.call, args=('time:sleep', 60), daemon=True).start()\ntime.sleep(0.3)\nos.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(running(pid) for pid in pids):
        time.sleep(0.05)
    assert not [pid for pid in pids if running(pid)]
    pool = GraderPool(1)
    pid = pool.call("os:getpid")
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
    assert pool.call("operator:add", 1, 1) == 2, "a closed pool starts again"
    pool.close()


def test_graders_work_in_threads_and_asyncio_and_leave_the_callers_alarm_alone(own_graders: str) -> None:
    """The alarm trap: `signal.alarm` raises outside of the main thread, so that each score was silently 0."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        reward = get_reward(f"{own_graders}:alarm")
        group = group_of(["18"], f"{own_graders}:alarm")
        task, trajectory = group.request.task, group.trajectories[0]
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(reward(task, trajectory)))
        thread.start()
        thread.join(60)

        async def several() -> list[Any]:
            shared = grader_pool.shared()
            calls = [shared.call_async(f"{own_graders}:alarm", task, trajectory) for _ in range(4)]
            ticks = 0
            gathered = asyncio.gather(*calls)
            while not gathered.done():
                await asyncio.sleep(0.001)
                ticks += 1
            assert ticks > 0, "the loop went on meanwhile"
            return list(await gathered)

        assert found == [Score(value=1.0)] and asyncio.run(several()) == [1.0] * 4
        time.sleep(0.3)
        assert rung == [1], "the caller's own alarm rang, once"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_graders_and_the_sandbox_work_in_ray_actors() -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:

        @ray.remote(num_cpus=0, max_concurrency=4)
        class Actor:
            def grade(self, number: int) -> tuple[Any, str, str]:
                from winnow.rewards.grader_pool import GraderPool
                from winnow.rewards.sandbox import Sandbox, SandboxUnavailable

                pool = GraderPool(1, seconds=20)
                try:
                    box = Sandbox(1)
                    printed = box.run(f"print({number})").stdout
                    box.close()
                except SandboxUnavailable:
                    printed = f"{number}\n"
                result = str(pool.call(LAST, f"it is {number}")), pool.call("time:sleep", 9, seconds=0.3).kind, printed
                pool.close()
                return result

        actor = Actor.remote()
        results = ray.get([actor.grade.remote(number) for number in range(3)], timeout=120)
        assert results == [(str(number), "timeout", f"{number}\n") for number in range(3)]
    finally:
        ray.shutdown()


# ----------------------------------------------------------------------------------------------------------------------------- contract


def test_poison_costs_its_own_sample_only(own_graders: str) -> None:
    replies = ["18", "17", *POISON, "18"]
    (graded,) = grade(get_reward, [group_of(replies, f"{own_graders}:grade")])
    verdicts = dict(zip(replies, graded.scores, strict=True))
    assert graded.scores[0] == graded.scores[-1] == Score(value=1.0) and verdicts["17"] == Score(value=0.0)
    assert {reply: getattr(verdicts[reply], "kind", None) for reply in POISON} == POISON


def soak(own_graders: str, samples: int, group: int = 10) -> Counter[str]:
    """Grades so many samples, every twentieth of them poison, and checks each verdict against the one that its reply must get."""
    kinds = list(POISON)
    groups, wanted, poison = [], [], 0
    for number in range(samples // group):
        replies = []
        for i in range(group):
            place = number * group + i
            if place % 20 == 7:
                replies.append(kinds[poison % len(kinds)])
                poison += 1
            else:
                replies.append("18" if place % 3 else "17")
        groups.append(group_of(replies, f"{own_graders}:grade", number))
        wanted += [POISON.get(reply, float(reply == "18")) for reply in replies]
    graded = grade(get_reward, groups)
    found = [score.value if isinstance(score, Score) else score.kind for g in graded for score in g.scores]
    assert found == wanted, "a verdict was lost or went to another sample"
    return Counter(str(value) for value in found)


def test_a_twentieth_of_poison_loses_nothing(own_graders: str) -> None:
    counts = soak(own_graders, 400)
    assert sum(counts.values()) == 400 and counts["timeout"] == 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_gradings_with_a_twentieth_of_poison_lose_nothing(own_graders: str) -> None:
    counts = soak(own_graders, 10_000)
    assert sum(counts.values()) == 10_000 and sum(counts[kind] for kind in set(POISON.values())) == 500


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thousands_of_programs_with_a_twentieth_of_poison_lose_nothing() -> None:
    limits = sandbox.Limits(wall_s=1, cpu_s=1, memory_bytes=128 << 20, output_bytes=1 << 16)
    box = sandbox.Sandbox(2, limits=limits)
    try:
        box.start()
    except sandbox.SandboxUnavailable as error:
        pytest.skip(str(error))
    bad = {"import time; time.sleep(60)": "timeout", "while True: print('x' * 999)": "output", "b'x' * (1 << 40)": "memory",
           "import os; os.abort()": "signal", "import sys; sys.exit(0)": "wrong"}  # fmt: skip
    sources = [list(bad)[(i // 20) % 5] if i % 20 == 7 else f"print({i})" for i in range(2000)]
    task = [Task(id=f"{i}", domain="d", messages=({"role": "user", "content": "?"},), reward="code",
                 metadata={"cases": [{"input": "", "output": str(i)}], "seconds": 1}) for i in range(2000)]  # fmt: skip
    try:
        with ThreadPoolExecutor(4) as threads:
            verdicts = list(threads.map(lambda i: programs.judge_reply(task[i], sources[i], box=box), range(2000)))
    finally:
        box.close()
    assert [v.outcome for v in verdicts] == [bad.get(source, "passed") for source in sources]


def test_too_many_failures_stop_the_run_by_name() -> None:
    group = group_of(["18"] * 10, "number")
    few = Group(
        request=group.request,
        trajectories=group.trajectories,
        scores=(Failure(kind="timeout"),) * 2 + (Score(value=1.0),) * 8,
    )
    check_failures([few], 0.25)
    many = Group(
        request=group.request, trajectories=group.trajectories,
        scores=(Failure(kind="timeout", detail="no verdict"),) * 3 + (Failure(kind="crash"),) + (Score(value=1.0),) * 6,
    )  # fmt: skip
    with pytest.raises(
        RuntimeError,
        match=r"4 of 10 samples of domain 'd' have no score \(3 timeout, 1 crash; e.g. 'no verdict'\).*25%",
    ):
        check_failures([many], 0.25)
    check_failures([many], 0.4)
    expected = Group(
        request=group.request,
        trajectories=group.trajectories,
        scores=(Failure(kind="not_applicable"),) * 5 + (Failure(kind="abort"),) * 5,
    )
    check_failures([expected], 0.0)


# ---------------------------------------------------------------------------------------------------------------------------------- TRL


def test_trl_functions_are_taken_as_they_are(own_graders: str) -> None:
    (graded,) = grade(get_reward, [group_of(["abc", ""], f"{own_graders}:by_length", level=3)])
    assert graded.scores[0] == Score(value=3.0) and graded.scores[1].kind == "not_applicable"
    (graded,) = grade(get_reward, [group_of(["abc", "hang"], f"{own_graders}:by_length")])
    assert [score.kind for score in graded.scores] == ["timeout", "timeout"]
    with pytest.raises(ValueError, match="returned 1 values for 2 samples"):
        grade(get_reward, [group_of(["abc", "short"], f"{own_graders}:by_length")])
    (graded,) = grade(get_reward, [group_of(["a"], f"{own_graders}:later")])
    assert graded.scores == (Score(value=0.5),)
    (graded,) = grade(get_reward, [group_of(["a"], f"{own_graders}:here")])
    assert graded.scores == (Score(value=float(os.getpid())),)


def test_several_trl_functions_are_weighed_and_summed() -> None:
    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def polite(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0 if "please" in text else None for text in completions]

    def broken(completions: list[str]) -> list[float]:
        return [float("nan")] * len(completions)

    both = WeightedRewards([length, polite], [0.5, 2.0])
    (graded,) = grade({"r": both}, [group_of(["ab", "please"], "r")])
    assert graded.scores == (
        Score(value=1.0, parts={"length": 2.0}),
        Score(value=5.0, parts={"length": 6.0, "polite": 1.0}),
    )
    (graded,) = grade({"r": WeightedRewards([polite])}, [group_of(["ab"], "r")])
    assert graded.scores[0].kind == "not_applicable"
    (graded,) = grade({"r": WeightedRewards([length, broken])}, [group_of(["ab"], "r")])
    assert graded.scores[0].kind == "invalid"
    with pytest.raises(ValueError, match="2 reward functions have 1 weights"):
        WeightedRewards([length, polite], [1.0])
    with pytest.raises(ValueError, match="share a name"):
        WeightedRewards([length, BatchReward(polite, "length")])
