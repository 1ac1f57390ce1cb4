"""A Python interpreter: each call runs one program in the sandbox (sandbox.py) and answers with what it printed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from winnow.rewards.reasoning import gold_number, last_number
from winnow.rewards.toolbox import Tool, Toolbox, ToolError, call_text, tool
from winnow.rollout.schema import Message, Task

WALL_S = 5.0
MEMORY_BYTES = 256 << 20

QUESTIONS = (  # text, expression over the numbers n below the bound
    (
        "How many n with 1 <= n <= {bound} have a digit sum divisible by {k}?",
        "sum(sum(map(int, str(n))) % {k} == 0 for n in N)",
    ),
    (
        "What is the sum of all n with 1 <= n <= {bound} whose square ends in the digit {d}?",
        "sum(n for n in N if n * n % 10 == {d})",
    ),
    (
        "How many primes are there with {k} < p <= {bound}?",
        "sum(n > {k} and all(n % q for q in range(2, int(n**0.5) + 1)) for n in N if n > 1)",
    ),
)


class Interpreter(Toolbox):
    """One tool, `python`. Programs share nothing but the conversation; a traceback is an answer, not an error of the call."""

    slow = True

    def tools(self) -> Sequence[Tool]:
        text = "runs a Python program on its own and returns what it prints"
        return (tool("python", text, self.python, program="string: the source; print what you want to see"),)

    def python(self, program: str) -> str:
        from winnow.rewards import sandbox

        run = sandbox.shared().run(
            program, limits=sandbox.Limits(wall_s=WALL_S, cpu_s=WALL_S, memory_bytes=MEMORY_BYTES)
        )
        printed = run.stdout.encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"
        )  # a tokenizer takes no surrogates
        if run.outcome == "ok":
            return printed or "(nothing was printed)"
        if run.outcome in ("exception", "exit", "signal"):
            return f"{printed}\n{run.stderr}".strip()[-self.max_chars :] or run.outcome
        raise ToolError(f"the program was stopped: {run.outcome}; it has {WALL_S:g} s and {MEMORY_BYTES >> 20} MB")

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        right = self.answer is not None and last_number(self.answer) == gold_number(task.answer or "")
        return float(right), {"right": float(right), "used": float(self.calls > self.errors)}


def generate(rng: Random, level: int) -> dict[str, Any]:
    """Counting questions up to 1,000 times 4 to the level."""
    bound = rng.randint(500, 1000) * 4**level
    text, expression = rng.choice(QUESTIONS)
    values = {"bound": bound, "k": rng.randint(3, 9), "d": rng.choice((1, 4, 5, 6, 9))}
    source = expression.format(**values)
    answer = eval(
        source, {"N": range(1, bound + 1), "sum": sum, "all": all, "range": range, "int": int, "str": str, "map": map}
    )
    program = f"N = range(1, {bound + 1})\nprint({source})"
    return {"text": text.format(**values), "answer": str(answer), "metadata": {"program": program}}


def expert(task: Task, messages: Sequence[Message]) -> str:
    if messages[-1]["role"] == "tool":
        return f"The answer is {messages[-1]['content'].strip()}."
    return call_text("python", program=task.metadata["program"])
