"""What `winnow eval --tasks` knows by name: held-out tasks of the procedural kinds, and GSM8K from its file."""

from __future__ import annotations

from pathlib import Path

from winnow.rewards.data import CODE_SOURCES, SUFFIXES, load_tasks
from winnow.rewards.environments import KINDS
from winnow.rewards.question_benchmarks import FORMATS, load_questions
from winnow.rewards.tasks import DOMAINS
from winnow.rollout.schema import Task

BENCHMARKS = {
    "lookup": "find a number that stands far back in the prompt",
    "tool": "call a tool with a key that stands far back, answer with its code",
    "rubric": "meet the prompt's own weighted criteria",
    "addition": "one-digit sums",
    "gsm8k": "grade-school maths",
    "math": "competition maths: MATH, MATH-500, in their own format",
    "aime24": "AIME 2024, 30 problems",
    "aime25": "AIME 2025, 30 problems",
    "mmlu": "multiple choice: MMLU",
    "gpqa": "multiple choice: GPQA, choices shuffled by the question",
    "arc": "multiple choice: ARC",
    "ifeval": "instructions that a program verifies",
    "humaneval": "164 Python functions, run in the sandbox, from its test.jsonl (--data)",
    "mbpp": "974 short Python functions, run in the sandbox, from its test.jsonl (--data)",
    "livecodebench": "contest programs, run in the sandbox, from one of its test*.jsonl (--data)",
}


def load_benchmark(
    name: str,
    count: int | None = None,
    seed: int = 0,
    level: int = 1,
    data: str | Path | None = None,
    shots: int = 0,
    template: str | None = None,
) -> list[Task]:
    """Held-out tasks of a benchmark; a path of a JSONL file is a benchmark too (every row of it).

    Raises ValueError for an unknown name, listing the known ones, and for a benchmark whose file was not given.
    """
    if name in DOMAINS:
        return load_tasks(name, count=count, seed=seed, split="heldout", level=level)
    if name in FORMATS:
        return load_questions(name, data, count, seed, shots, template)
    if name in KINDS:
        return load_tasks(name, count=count, seed=seed, split="heldout", level=level)
    if name in CODE_SOURCES:
        if data is None:
            raise ValueError(
                f"benchmark {name!r} needs its file: give --data with the JSONL file or the folder that holds it"
            )
        return load_tasks(name, count=count, seed=seed, split="all", path=data)
    if name.endswith(SUFFIXES):
        return load_tasks(name, count=count, seed=seed, split="all")
    raise ValueError(f"benchmark {name!r} is unknown: known are {', '.join(BENCHMARKS)}, or a path ending in .jsonl")
