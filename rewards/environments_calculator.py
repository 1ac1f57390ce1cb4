"""A calculator: exact arithmetic on expressions too long for the head."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any

from winnow.rewards.latex import Unreadable, names, read
from winnow.rewards.reasoning import gold_number, last_number
from winnow.rewards.toolbox import Tool, Toolbox, ToolError, call_text, tool
from winnow.rewards.values import context, evaluate, number
from winnow.rollout.schema import Message, Task

MAX_CHARS = 200


def calculate(expression: str) -> str:
    """The value as a whole number, a finite decimal, a fraction, or 15 digits. Raises ToolError."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters, at most {MAX_CHARS} are read")
    try:
        tree = read(expression.replace("**", "^"))
        if names(tree):
            raise Unreadable(
                f"it holds the names {', '.join(sorted(names(tree)))}, but only numbers can be computed with"
            )
        value = evaluate(tree, {})
    except Unreadable as error:
        raise ToolError(f"cannot compute {expression[:60]!r}: {error}") from error
    if not isinstance(value, Fraction):
        return str(context().nstr(value, 15))
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return str(context().nstr(number(context(), value), 30)) if rest == 1 else str(value)


class Calculator(Toolbox):
    """One tool, `calculate`; right is the right number in the final answer."""

    def tools(self) -> Sequence[Tool]:
        return (
            tool("calculate", "the value of an arithmetic expression", calculate, expression="string: e.g. (3+4)*5/2"),
        )

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        right = self.answer is not None and last_number(self.answer) == gold_number(task.answer or "")
        return float(right), {"right": float(right), "used": float(self.calls > self.errors)}


def generate(rng: Random, level: int) -> dict[str, Any]:
    """Level 1: two operations on three-digit numbers; each level adds two."""
    expression = str(rng.randint(100, 999))
    for _ in range(2 * level):
        sign = rng.choice("+-*")
        expression = f"({expression})" if sign == "*" and not expression.isdigit() else expression
        expression += f" {sign} {rng.randint(100, 999)}"
    return {"text": f"Compute {expression}.", "answer": calculate(expression), "metadata": {"expression": expression}}


def expert(task: Task, messages: Sequence[Message]) -> str:
    if messages[-1]["role"] == "tool":
        return f"It is {messages[-1]['content']}."
    return call_text("calculate", expression=task.metadata["expression"])
