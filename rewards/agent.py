"""The agent domain: an environment with one tool, and the reward that asks for its use.

The environment knows a code for every key of its task. `call red` at the end of a reply (or a JSON call in <tool_call> tags, as real models write it) is
answered with `red is 4`; anything else that tries to call gets an error text; a reply without a call is the final answer and ends the
episode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from winnow.rewards.reasoning import gold_number, last_number
from winnow.rollout.schema import Failure, Message, Score, Step, Task, Trajectory

TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
TOOL_NAME = "lookup"
MAX_CALLS = 8  # per episode, beside the request's own bound on turns
USAGE = "error : write call and one key"
ANSWER_RESERVE = 64


def parse_call(reply: str) -> tuple[str | None, str | None]:
    """(key, None) for a well-formed call, (None, error) for a malformed one, (None, None) for a reply that is none."""
    tagged = TAGGED.search(reply)
    if tagged:
        return parse_json_call(tagged.group(1))
    words = reply.split()
    if len(words) > 2 and words[-2].lower() == "call":  # reasoning first, the call at the end
        return words[-1], None
    if not words or words[0].lower() != "call":
        return None, None
    return (words[1], None) if len(words) == 2 else (None, USAGE)


def parse_json_call(text: str) -> tuple[str | None, str | None]:
    """The key of `{"tool": "lookup", "arguments": {"key": ...}}`; `name` is accepted for `tool`, as chat templates write it."""
    try:
        call = json.loads(text)
        tool, arguments = call.get("tool", call.get("name")), call.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        key = arguments.get("key")
    except (ValueError, AttributeError, RecursionError):
        return None, 'error : a call is {"tool": "lookup", "arguments": {"key": "..."}}'
    if tool != TOOL_NAME:
        return None, f"error : there is no tool {str(tool)[:ANSWER_RESERVE]} , only {TOOL_NAME}"
    if not isinstance(key, str) or not key.strip():
        return None, "error : lookup needs the argument key , a text"
    return key.strip(), None


class ToolEnvironment:
    """Answers calls for the keys in `task.metadata["codes"]`. Its state: the keys asked, which of them were known, errors, the answer."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.called: list[str] = []
        self.errors = 0
        self.answer: str | None = None

    def reset(self, task: Task) -> tuple[Message, ...]:
        if "codes" not in task.metadata:
            raise ValueError(f"task {task.id!r} has no metadata 'codes', which environment 'tool' answers from")
        self.__init__()  # type: ignore[misc]  # nothing of another episode may stay
        self.codes = dict(task.metadata["codes"])
        return ()

    def step(self, reply: str) -> Step:
        key, error = parse_call(reply)
        if key is None and error is None:
            self.answer = reply
            return Step(done=True)
        if key is not None and key in self.codes:
            self.called.append(key)
            text = f"{key} is {self.codes[key]}"
        else:
            self.errors += 1
            text = error or f"error : there is no key {key[:ANSWER_RESERVE] if key else ''}"
        done = len(self.called) + self.errors >= MAX_CALLS
        return Step(messages=({"role": "tool", "content": text},), done=done)

    def state(self) -> Mapping[str, Any]:
        return {"called": list(self.called), "errors": self.errors, "answer": self.answer}


def tool_answer(task: Task, trajectory: Trajectory) -> Score | Failure:
    """1 where every needed key was called with success and the final answer is right. Parts: called, answer, clean (no malformed call)."""
    state = trajectory.environment_state
    if "failure" in state:
        return Failure(**state["failure"])
    if "called" not in state:
        raise ValueError(
            f"trajectory {trajectory.key} has no environment state: task {task.id!r} must run in environment 'tool'"
        )
    needed = list(task.metadata["keys"])
    called = sum(key in state["called"] for key in needed) / len(needed)
    final = state["answer"]
    right = final is not None and last_number(final) == gold_number(task.answer or "")
    return Score(
        value=float(called == 1 and right),
        parts={"called": called, "answer": float(right), "clean": float(state["errors"] == 0)},
    )
