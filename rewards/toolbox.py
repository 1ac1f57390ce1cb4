"""Environments made of tools: calls read from a reply, checked against JSON schemas, run in order, answered one message each.

    reply ─ parse_calls ─> calls ─ check_arguments ─> Tool.run ─> one `tool` message a call ─> the model
              none: the reply is the final answer, the episode is done, `score` grades what the world has become

A call is `<tool_call>{"name": "...", "arguments": {...}}</tool_call>`, several in one reply are answered in their order (parallel calls).
Whatever is wrong with a call, its answer is a text that starts with `error:` and says what to write instead: never an exception, never
silence. An exception that is our own fault ends the episode as a Failure, not as a reward of 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.rollout.schema import Failure, Message, Score, Step, Task, Trajectory

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
FORM = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
MAX_CALL_CHARS = 20_000
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,),
}  # fmt: skip


class ToolError(ValueError):
    """A call that cannot be answered; its text goes to the model."""


@dataclass(frozen=True)
class Tool:
    """`parameters` is the JSON schema of the arguments (an object); `run` takes them by name and returns the answer's text."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., str]

    def schema(self) -> dict[str, Any]:
        """As chat templates and APIs write it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tool(name: str, description: str, run: Callable[..., str], /, **parameters: Any) -> Tool:
    """A Tool whose parameters are given as `city="string: where to"` or as schemas; all are required but those with a `default`."""
    properties = {}
    for key, what in parameters.items():
        kind, _, text = what.partition(": ") if isinstance(what, str) else ("", "", "")
        properties[key] = {"type": kind, "description": text} if isinstance(what, str) else dict(what)
    required = [key for key, schema in properties.items() if "default" not in schema]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Tool(name, description, schema, run)


def instructions(tools: Sequence[Tool]) -> str:
    """The text that tells a model of its tools: part of the task's system message."""
    lines = "\n".join(json.dumps(one.schema()["function"]) for one in tools)
    return (
        f"You can call tools. Write a call as {FORM}. Several calls in one reply are answered in order. "
        f"When you are done, reply without a call: that is your final answer.\nTools:\n{lines}"
    )


def parse_calls(reply: str) -> list[tuple[str, dict[str, Any]] | ToolError]:
    """The calls in a reply, in order; a malformed one as the error to answer it with. An empty list: the reply is no call."""
    return [parse_call(found.group(1)) for found in CALL.finditer(reply)]


def parse_call(text: str) -> tuple[str, dict[str, Any]] | ToolError:
    if len(text) > MAX_CALL_CHARS:
        return ToolError(f"the call has {len(text)} characters, at most {MAX_CALL_CHARS} are read")
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolError(f"the call is not JSON ({type(error).__name__}: {str(error)[:80]}); write {FORM}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolError(f'the call has no "name"; write {FORM}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # as some models write it
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return ToolError('"arguments" is a text that is not JSON; it must be an object')
    if not isinstance(arguments, dict):
        return ToolError(f'"arguments" is a {type(arguments).__name__}, but it must be an object')
    return call["name"], arguments


def check_arguments(schema: Mapping[str, Any], arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments with their defaults. Raises ToolError naming the first one that the JSON schema does not allow."""
    properties: Mapping[str, Any] = schema.get("properties", {})
    for name in arguments:
        if name not in properties:
            raise ToolError(f"{where} has no argument {name[:40]!r}, only {', '.join(properties) or 'none'}")
    for name in schema.get("required", ()):
        if name not in arguments:
            raise ToolError(f"{where} needs the argument {name!r} ({properties[name].get('type', 'any')})")
    defaults = {name: rule["default"] for name, rule in properties.items() if "default" in rule}
    for name, value in arguments.items():
        check_value(properties[name], value, f"{where}: {name!r}")
    return {**defaults, **arguments}


def check_value(rule: Mapping[str, Any], value: Any, where: str) -> None:
    kind = rule.get("type")
    if kind is not None and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        raise ToolError(f"{where} is {json.dumps(value)[:40]}, but it must be of type {kind}")
    if "enum" in rule and value not in rule["enum"]:
        raise ToolError(f"{where} is {json.dumps(value)[:40]}, but it must be one of {json.dumps(rule['enum'])}")
    if "minimum" in rule and value < rule["minimum"]:
        raise ToolError(f"{where} is {value}, but it must be at least {rule['minimum']}")
    if "maximum" in rule and value > rule["maximum"]:
        raise ToolError(f"{where} is {value}, but it must be at most {rule['maximum']}")
    if kind == "array" and "items" in rule:
        for place, item in enumerate(value):
            check_value(rule["items"], item, f"{where}[{place}]")


class Toolbox:
    """Base of the environments with tools: a subclass gives `tools`, `begin` and `score`. Its state ends up in the trajectory.

    Budgets: `max_calls` in an episode (the request's own bounds turns and tokens), `max_chars` of one answer.
    """

    max_calls = 24
    max_chars = 2000
    slow = False  # whether a call may take long: then the engine goes on with other samples meanwhile

    def __init__(self) -> None:
        self.task: Task | None = None
        self.answer: str | None = None
        self.calls = self.errors = 0
        self.failure: Failure | None = None

    def tools(self) -> Sequence[Tool]:
        raise NotImplementedError

    def begin(self, task: Task) -> None:
        """Builds the world of the task. Raises ValueError for a task without the metadata that it needs."""

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        """The reward of the world as it is now, and its parts. `self.answer` is the final reply, None where there is none yet."""
        raise NotImplementedError

    def reset(self, task: Task) -> tuple[Message, ...]:
        Toolbox.__init__(self)  # nothing of another episode may stay
        self.task = task
        self.begin(task)
        return ()

    def step(self, reply: str) -> Step:
        calls = parse_calls(reply)
        if not calls:
            self.answer = reply
            return Step(done=True)
        messages: list[Message] = []
        for call in calls:
            if self.calls >= self.max_calls:
                messages.append({"role": "tool", "content": f"error: the limit of {self.max_calls} calls is reached"})
                break
            messages.append({"role": "tool", "content": self.respond(call)})
        return Step(messages=tuple(messages), done=self.failure is not None or self.calls >= self.max_calls)

    def respond(self, call: tuple[str, dict[str, Any]] | ToolError) -> str:
        """The text that answers one call."""
        self.calls += 1
        try:
            if isinstance(call, ToolError):
                raise call
            known = {one.name: one for one in self.tools()}
            name, arguments = call
            if name not in known:
                raise ToolError(f"there is no tool {name[:40]!r}, only {', '.join(known)}")
            text = known[name].run(**check_arguments(known[name].parameters, arguments, name))
        except ToolError as error:
            self.errors += 1
            return f"error: {error}"
        except Exception as error:  # ours, not the model's: the sample is dropped and counted
            self.failure = Failure(
                kind="environment", detail=f"{type(self).__name__}: {type(error).__name__}: {error}"[:300]
            )
            return "error: the environment failed"
        return text if len(text) <= self.max_chars else f"{text[: self.max_chars]} ... ({len(text)} characters in all)"

    def state(self) -> dict[str, Any]:
        """JSON values: the reward with its parts, or the failure; how many calls and errors; the final answer."""
        assert self.task is not None, "reset comes first"
        state: dict[str, Any] = {"calls": self.calls, "errors": self.errors, "answer": self.answer}
        if self.failure is None:
            value, parts = self.score(self.task)
            return state | {"reward": value, "parts": parts}
        return state | {"failure": {"kind": self.failure.kind, "detail": self.failure.detail}}


def environment_reward(task: Task, trajectory: Trajectory) -> Score | Failure:
    """What the environment itself found at the episode's end. Parts: its own, `clean` (no malformed call), `calls`."""
    state = trajectory.environment_state
    if "failure" in state:
        return Failure(**state["failure"])
    if "reward" not in state:
        raise ValueError(
            f"trajectory {trajectory.key} has no reward of its environment: task {task.id!r} runs in {task.environment!r}, and reward "
            "'environment' needs one that grades its own state"
        )
    counts = {"clean": float(state.get("errors", 0) == 0), "calls": float(state.get("calls", 0))}
    return Score(value=float(state["reward"]), parts={**state.get("parts", {}), **counts})


def metadata(task: Task, key: str, environment: str) -> Any:
    """An entry of the task's metadata. Raises ValueError where it is missing."""
    if key not in task.metadata:
        raise ValueError(f"task {task.id!r} has no metadata {key!r}, which environment {environment!r} needs")
    return task.metadata[key]


def call_text(name: str, **arguments: Any) -> str:
    """A well-formed call, as an expert writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
