"""The environments by name, their tasks, and two agents to test them with: one that knows how, one that does not.

    calculator   exact arithmetic              search       a corpus with BM25, up to three steps
    database     SQLite, verified by query     booking      find, hold, pay; the state is checked
    files        a folder in memory            interpreter  Python in the sandbox

`load_tasks("database", count=256)` gives tasks; a row of your own file needs `environment: database` and the metadata that the
environment names. Tasks are split by a hash of their text; the same arguments give the same tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from winnow.rewards import (
    environments_booking,
    environments_calculator,
    environments_database,
    environments_files,
    environments_interpreter,
    environments_search,
)
from winnow.rewards.language import check_split, digest, in_split
from winnow.rewards.toolbox import Toolbox, call_text, instructions
from winnow.rollout.schema import Message, Task

LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Kind:
    """An environment with its tasks: `generate(rng, level)` gives text, answer and metadata; `expert(task, messages)` the next reply."""

    make: Callable[[], Toolbox]
    generate: Callable[[Random, int], dict[str, Any]]
    expert: Callable[[Task, Sequence[Message]], str]


KINDS: dict[str, Kind] = {
    "calculator": Kind(
        environments_calculator.Calculator, environments_calculator.generate, environments_calculator.expert
    ),
    "database": Kind(environments_database.Database, environments_database.generate, environments_database.expert),
    "files": Kind(environments_files.Files, environments_files.generate, environments_files.expert),
    "search": Kind(environments_search.Search, environments_search.generate, environments_search.expert),
    "booking": Kind(environments_booking.Booking, environments_booking.generate, environments_booking.expert),
    "interpreter": Kind(
        environments_interpreter.Interpreter, environments_interpreter.generate, environments_interpreter.expert
    ),
}


def environment_tasks(
    kind: str, level: int = 1, count: int = 256, seed: int = 0, split: str = "train", domain: str | None = None
) -> list[Task]:
    """`count` different tasks of an environment. Raises ValueError for an unknown kind, level or split."""
    if kind not in KINDS:
        raise ValueError(f"environment {kind!r} is unknown: known are {', '.join(KINDS)}")
    if level not in LEVELS:
        raise ValueError(f"level of {kind!r} tasks is {level!r}, but it must be one of {LEVELS}")
    check_split(split)
    rng = Random(f"winnow environment {kind} {level} {split} {seed}")
    tasks: dict[str, Task] = {}
    for _ in range(100 * count):
        fields = KINDS[kind].generate(rng, level)
        text = fields["text"]
        name = f"{kind}-{level}-{digest(text + str(sorted(fields['metadata'].items()))):016x}"
        if not in_split(name, split):
            continue
        tasks[name] = with_tools(
            Task(
                id=name,
                domain=domain or "agent",
                messages=({"role": "user", "content": text},),
                reward="environment",
                answer=fields.get("answer"),
                environment=kind,
                metadata={"kind": kind, "level": level, **fields["metadata"]},
            )
        )
        if len(tasks) == count:
            return list(tasks.values())
    raise ValueError(f"environment {kind!r} has no {count} different tasks of level {level}: lower count")


def with_tools(task: Task) -> Task:
    """The task with its environment's tools named in the system message; as it is where the environment has none of ours."""
    if task.environment not in KINDS:
        return task
    text = instructions(KINDS[task.environment].make().tools())
    first, rest = task.messages[0], task.messages[1:]
    if first["role"] != "system":
        return replace(task, messages=({"role": "system", "content": text}, *task.messages))
    if text in first["content"]:
        return task
    return replace(task, messages=({"role": "system", "content": f"{first['content']}\n\n{text}"}, *rest))


def expert(task: Task) -> Callable[[Sequence[Message]], str]:
    """The agent that solves the task."""
    assert task.environment in KINDS
    kind = KINDS[task.environment]
    return lambda messages: kind.expert(task, messages[len(task.messages) - 1 :])


def random_agent(task: Task, rng: Random, answer_rate: float = 0.2) -> Callable[[Sequence[Message]], str]:
    """Well-formed calls of random tools with random arguments out of what was said, then a random answer: what luck is worth."""
    assert task.environment in KINDS
    tools = KINDS[task.environment].make().tools()

    def draw(schema: dict[str, Any], said: list[str]) -> Any:
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if schema.get("type") == "integer":
            return rng.randint(schema.get("minimum", 0), schema.get("maximum", 9))
        return " ".join(rng.sample(said, min(len(said), rng.randint(1, 3))))

    def reply(messages: Sequence[Message]) -> str:
        said = [word.strip('.,;:?"{}') for m in messages[1:] for word in m["content"].split()] or ["nothing"]
        if rng.random() < answer_rate:
            return rng.choice(said)
        calls = []
        for one in rng.choices(tools, k=rng.randint(1, 2)):
            properties = one.parameters["properties"]
            calls.append(call_text(one.name, **{name: draw(rule, said) for name, rule in properties.items()}))
        return " ".join(calls)

    return reply


MALFORMED = (
    "<tool_call>",
    "<tool_call>{</tool_call>",
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"name": "fly", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "NAME", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "NAME", "arguments": "{"}</tool_call>',
    '<tool_call>{"name": "NAME", "arguments": {"wrong": 1}}</tool_call>',
    '<tool_call>{"name": "NAME", "arguments": {"no": 1}}</tool_call><tool_call>{"name": "NAME",',
    '<tool_call>{"name": "NAME", "arguments": {"ARGUMENT": {"a": [null]}}}</tool_call>',
    "<tool_call>" + "[" * 15_000 + "</tool_call>",
    '<tool_call>{"name": "NAME", "arguments": ' + "9" * 30_000 + "}</tool_call>",
)


def malformed_agent(task: Task, rng: Random) -> Callable[[Sequence[Message]], str]:
    """Calls that are wrong in every way we know, over and over."""
    assert task.environment in KINDS
    tools = KINDS[task.environment].make().tools()

    def reply(messages: Sequence[Message]) -> str:
        one = rng.choice(tools)
        argument = next(iter(one.parameters["properties"]))
        return rng.choice(MALFORMED).replace("NAME", one.name).replace("ARGUMENT", argument)

    return reply
