"""`winnow bench rewards`: gradings per second of each kind with warm pools, as a run grades them (through `grade`), and what a hang costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from winnow.rewards import grader_pool, sandbox
from winnow.rewards.baseline import play
from winnow.rewards.contract import grade
from winnow.rewards.registry import get_reward
from winnow.rollout.schema import Failure, Group, Request, Sampling, Task

SAMPLES = 8  # a group
HANG_S = 1.0
LATEX = (
    ("\\frac{1}{2}+\\sqrt{x}", "so it is \\boxed{x^{1/2} + 0.5}"),
    ("(x-1)(x+1)", "\\boxed{x^2 - 1}"),
    ("\\sin^2 x", "\\boxed{1 - \\cos^2 x}"),
    ("\\{1, 2, 3\\}", "\\boxed{\\{3, 2, 1\\}}"),
)


def bench_rewards(seconds: float) -> dict[str, Any]:
    """The figures, with the sandbox that was in use. Without one, its rows say why."""
    pool = grader_pool.shared()
    figures: dict[str, Any] = {}
    numeric = [task_of("number", i, answer=str(i)) for i in range(64)]
    figures["numeric"] = rate(lambda: graded(numeric, [f"so it is {i}" for i in range(64)]), seconds)
    calls = [("operator:add", i) for i in range(512)]
    figures["pool_calls"] = rate(lambda: len(pool.map("operator:add", [(i, 1) for _, i in calls])), seconds)
    tasks = [task_of("math", i, answer=LATEX[i % len(LATEX)][0]) for i in range(16)]
    figures["latex"] = rate(lambda: graded(tasks, [LATEX[i % len(LATEX)][1] for i in range(16)]), seconds)
    try:
        figures["sandbox"] = sandbox.shared().describe()
    except sandbox.SandboxUnavailable as error:
        return figures | {"sandbox": str(error)}
    cases = [task_of("code", i, cases=[{"input": f"{i}", "output": f"{i + 1}"}]) for i in range(8)]
    program = "```python\nprint(int(input()) + 1)\n```"
    figures["programs"] = rate(lambda: graded(cases, [program] * 8), seconds)
    asserts = [task_of("code", i, tests=[f"assert f({i}) == {i + 1}"], names=["f"]) for i in range(8)]
    figures["function_tests"] = rate(lambda: graded(asserts, ["```python\ndef f(x): return x + 1\n```"] * 8), seconds)
    hang = task_of("code", 9, cases=[{"input": "", "output": "1"}], seconds=HANG_S / 2)
    alone = timed(lambda: graded(cases, [program] * 8))
    beside = timed(lambda: graded([hang, *cases], ["```python\nimport time\ntime.sleep(60)\n```", *[program] * 8]))
    return figures | {
        "hang": {
            "hangs": SAMPLES,
            "limit_s": HANG_S,
            "slots": sandbox.shared().slots,
            "without_s": round(alone, 3),
            "with_s": round(beside, 3),
        }
    }


def task_of(reward: str, number: int, answer: str | None = None, **metadata: Any) -> Task:
    message = ({"role": "user", "content": "?"},)
    return Task(id=str(number), domain="bench", messages=message, reward=reward, answer=answer, metadata=metadata)


def graded(tasks: Sequence[Task], replies: Sequence[str]) -> int:
    """Grades a group of SAMPLES equal replies per task. Raises RuntimeError when a sample has no score: a failure is not speed."""
    groups = [group_of(f"bench/{i}", task, reply) for i, (task, reply) in enumerate(zip(tasks, replies, strict=True))]
    scores = [score for group in grade(get_reward, groups) for score in group.scores]
    failures = [score for score in scores if isinstance(score, Failure)]
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(scores)} gradings failed, the first: {failures[0]}")
    return len(scores)


def group_of(name: str, task: Task, reply: str) -> Group:
    request = Request(request_id=name, task=task, num_samples=SAMPLES, sampling=Sampling(max_tokens=8))
    samples = (play(task, lambda _: reply, 1, name, sample) for sample in range(SAMPLES))
    return Group(request=request, trajectories=tuple(samples))


def timed(once: Callable[[], int]) -> float:
    started = time.perf_counter()
    once()
    return time.perf_counter() - started


def rate(once: Callable[[], int], seconds: float) -> dict[str, float]:
    """Gradings per second: one round to warm up, then rounds until `seconds` have passed, at least three."""
    once()
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - begin < seconds:
        started = time.perf_counter()
        rates.append(once() / (time.perf_counter() - started))
    rates.sort()
    return {"per_s": round(rates[len(rates) // 2], 1), "slowest": round(rates[0], 1), "rounds": len(rates)}
