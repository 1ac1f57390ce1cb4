"""Generators of the package reasoning-gym as tasks: `load_tasks("reasoning-gym:leg_counting")`. An extra: `pip install reasoning-gym`.

Splits are made by a hash of the question: the package draws task i of seed s from s + i, so that seeds alone would share most of their
tasks. Answers are graded by the generator itself, which is made again from the name in the task.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from winnow.rewards.extraction import boxed
from winnow.rewards.language import digest, in_split
from winnow.rollout.schema import Score, Task

PREFIX = "reasoning-gym:"
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
TRIES = 20  # tasks drawn for each one wanted: one in five is held out
SUFFIX = "\nGive your final answer in <answer></answer> tags."


@cache
def package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"tasks of reasoning-gym need that package ({error}): pip install reasoning-gym, or choose another source"
        ) from error
    return reasoning_gym


@cache
def generator(name: str, size: int, seed: int) -> Any:
    """A data set of the package. Raises ValueError for a name that it does not know."""
    try:
        return package().create_dataset(name, size=size, seed=seed)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"reasoning-gym has no generator {name!r}, or it refuses: {error}") from error


def gym_tasks(source: str, count: int, seed: int, split: str, domain: str | None = None) -> list[Task]:
    """At most `count` different tasks of `reasoning-gym:NAME`. The same arguments give the same tasks."""
    name = source.removeprefix(PREFIX)
    data = generator(name, TRIES * count, 10_000_000 * seed)
    tasks: dict[str, Task] = {}
    for index in range(TRIES * count):
        entry = data[index]
        question = str(entry["question"])
        if not in_split(question, split):
            continue
        tasks[question] = Task(
            id=f"{name}-{digest(question):016x}",
            domain=domain or "reasoning",
            messages=({"role": "user", "content": question + SUFFIX},),
            reward="reasoning_gym",
            answer=str(entry["answer"]),
            metadata={"generator": name, "entry": plain(entry)},
        )
        if len(tasks) == count:
            break
    if not tasks:
        raise ValueError(f"reasoning-gym's {name!r} gave no task of split {split!r}: raise count")
    return list(tasks.values())


def plain(entry: Any) -> Any:
    """JSON values only, as task metadata must be."""
    return json.loads(json.dumps(entry, default=str))


def score_answer(task: Task, reply: str) -> Score:
    tagged = TAGGED.findall(reply)
    lines = reply.strip().splitlines()
    found = tagged[-1].strip() if tagged else (boxed(reply) or (lines[-1].strip() if lines else ""))
    value = float(generator(task.metadata["generator"], 1, 0).score_answer(found, task.metadata["entry"]))
    return Score(value=value, parts={"right": float(value == 1), "answered": float(bool(tagged))})
