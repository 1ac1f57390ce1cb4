"""Environments of the package `verifiers` (its classic API: MultiTurnEnv, ToolEnv, ...) in this project's loop.

    reset ─ init_state, setup_state ─> step(reply) ─ is_completed? env_response ─> messages ─> state() ─ rubric ─> reward

`verifiers` brings its own loop around an API client. Only the world is taken from it: our engine stays the one that draws tokens. A reply
reaches it as an assistant message, with the calls in it (`<tool_call>`, as everywhere here) under `tool_calls`. Its rubric gives the
reward. `pip install verifiers` and the environment's own package; tasks: `verifiers_tasks("package-of-the-environment", count)`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from winnow.rewards.toolbox import ToolError, parse_calls
from winnow.rollout.schema import Message, Step, Task

WAIT_S = 300.0  # one call into an environment
PREFIX = "verifiers:"


class EventLoop:
    """One asyncio loop in a thread of its own: environments keep locks and clients that must not change loops."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="verifiers", daemon=True).start()

    def run(self, value: Any) -> Any:
        """Awaits what is awaitable, for at most WAIT_S; hands on anything else."""
        if not inspect.isawaitable(value):
            return value

        async def waited() -> Any:
            return await value

        return asyncio.run_coroutine_threadsafe(waited(), self.loop).result(WAIT_S)


@cache
def event_loop() -> EventLoop:
    return EventLoop()


@cache
def load_environment(name: str) -> Any:
    """The environment of this name, as `verifiers.load_environment` finds it. Raises ValueError where it cannot be had."""
    try:
        import verifiers
    except ImportError as error:
        raise ValueError(
            f"environment {PREFIX}{name} needs the package verifiers ({error}): pip install verifiers"
        ) from error
    try:
        return verifiers.load_environment(name)
    except Exception as error:  # it raises what the environment's own package raises
        raise ValueError(f"verifiers cannot load environment {name!r}: {type(error).__name__}: {error}") from error


class VerifiersEnvironment:
    """One episode of a verifiers environment. `source` gives that environment; it is shared, its state is this episode's."""

    slow = True  # environments may ask servers

    def __init__(self, source: Callable[[], Any]) -> None:
        self.source = source
        self.state_of: Any = {}  # a State, or what the installed version makes of it
        self.messages: list[Any] = []

    def reset(self, task: Task) -> tuple[Message, ...]:
        self.world, self.run = self.source(), event_loop().run
        row = dict(task.metadata.get("row", {}))
        prompt = [dict(message) for message in task.messages]
        self.state_of = {
            **row, "prompt": prompt, "answer": task.answer or "", "input": {**row, "prompt": prompt}, "trajectory": [], "completion": [],
            "turn": 0, "error": None, "is_completed": False, "info": row.get("info", {}), "task": row.get("task", "default"),
        }  # fmt: skip
        self.state_of = State(self.state_of)
        setup = self.run(self.world.setup_state(self.state_of))
        self.state_of = setup if isinstance(setup, Mapping) else self.state_of  # older versions return it
        self.messages = prompt
        self.before = len(prompt)
        return ()

    def step(self, reply: str) -> Step:
        calls = parse_calls(reply)
        wrong = next((call for call in calls if isinstance(call, ToolError)), None)
        message: dict[str, Any] = {"role": "assistant", "content": reply}
        if calls and wrong is None:
            named = [
                (f"call-{len(self.messages)}-{n}", call)
                for n, call in enumerate(calls)
                if not isinstance(call, ToolError)
            ]
            message["tool_calls"] = [
                {"id": key, "type": "function", "name": name, "function": {"name": name, "arguments": json.dumps(arguments)},
                 "arguments": json.dumps(arguments)}
                for key, (name, arguments) in named
            ]  # fmt: skip
        typed = as_typed(message)
        turn = {"prompt": list(self.messages), "completion": [typed], "response": None, "tokens": None, "reward": None}
        self.state_of["trajectory"].append(turn)
        self.messages.append(typed)
        self.state_of["completion"] = self.messages[self.before :]
        self.state_of["turn"] = int(self.state_of["turn"]) + 1
        if wrong is not None:
            text = f"error: {wrong}"
            self.said([as_typed({"role": "user", "content": text})])  # a tool message would need the id of a call
            return Step(messages=({"role": "tool", "content": text},))
        if self.run(self.world.is_completed(self.state_of)):
            return Step(done=True)
        answered = self.run(self.world.env_response(self.messages, self.state_of))
        if isinstance(answered, tuple):  # older versions: messages and state
            answered, self.state_of = answered
        step = self.said([as_typed(m) if isinstance(m, dict) else m for m in answered])
        done = self.state_of.get("final_env_response") is not None or bool(
            self.run(self.world.is_completed(self.state_of))
        )
        return Step(messages=step.messages, done=done)

    def said(self, answered: list[Any]) -> Step:
        self.messages += answered
        self.state_of["completion"] = self.messages[self.before :]
        return Step(messages=tuple({"role": text_of(m, "role"), "content": text_of(m, "content")} for m in answered))

    def state(self) -> dict[str, Any]:
        """The rubric's reward with its metrics as parts."""
        rubric = self.world.rubric
        score = getattr(rubric, "score_rollout", None)
        given = self.run(score(self.state_of)) if score is not None else self.run(rubric.score(self.state_of))
        value = given.get("reward") if isinstance(given, Mapping) else self.state_of.get("reward")
        if value is None:
            return {"failure": {"kind": "environment", "detail": f"{type(rubric).__name__} gave no reward"}}
        parts = {
            str(k): float(v) for k, v in (self.state_of.get("metrics") or {}).items() if isinstance(v, int | float)
        }
        return {"reward": float(value), "parts": parts}


class State(dict[str, Any]):
    """verifiers reads its state by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def as_typed(message: Mapping[str, Any]) -> Any:
    """The message as the installed verifiers wants it: its own classes where it has them, else the dict."""
    try:
        from verifiers.utils.message_utils import maybe_normalize_messages
    except ImportError:
        return dict(message)
    calls = [{key: call[key] for key in ("id", "name", "arguments")} for call in message.get("tool_calls", [])]
    plain = {**message, "tool_calls": calls} if calls else dict(message)
    return maybe_normalize_messages([plain], field_name="reply")[0]


def text_of(message: Any, name: str) -> str:
    value = message.get(name) if isinstance(message, Mapping) else getattr(message, name)
    if isinstance(value, list):  # parts of a content
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in value)
    return str(value or "")


def verifiers_tasks(name: str, count: int, domain: str | None = None, world: Any = None) -> list[Task]:
    """At most `count` rows (-1: all) of the environment's own data set as tasks of reward `environment`."""
    world = world or load_environment(name)
    rows = list(world.get_dataset(n=count))
    return [
        Task(
            id=f"{name}-{number}",
            domain=domain or "agent",
            messages=tuple({"role": text_of(m, "role"), "content": text_of(m, "content")} for m in row["prompt"]),
            reward="environment",
            answer=str(row["answer"]) if row.get("answer") is not None else None,
            environment=f"{PREFIX}{name}",
            metadata={"row": json.loads(json.dumps({k: v for k, v in row.items() if k != "prompt"}, default=str))},
        )
        for number, row in enumerate(rows if count < 0 else rows[:count])
    ]
