"""What `winnow eval --tasks` knows by name: held-out tasks of the procedural kinds, and GSM8K from its file."""

from __future__ import annotations

from pathlib import Path

from winnow.rewards.data import SUFFIXES, load_tasks
from winnow.rewards.tasks import DOMAINS
from winnow.rollout.schema import Task

BENCHMARKS = {
    "lookup": "find a number that stands far back in the prompt",
    "tool": "call a tool with a key that stands far back, answer with its code",
    "rubric": "meet the prompt's own weighted criteria",
    "addition": "one-digit sums",
    "gsm8k": "grade-school maths, from its test.jsonl (--data)",
}


def load_benchmark(
    name: str, count: int | None = None, seed: int = 0, level: int = 1, data: str | Path | None = None
) -> list[Task]:
    """Held-out tasks of a benchmark; a path of a JSONL file is a benchmark too (every row of it).

    Raises ValueError for an unknown name, listing the known ones, and for a benchmark whose file was not given.
    """
    if name in DOMAINS:
        return load_tasks(name, count=count, seed=seed, split="heldout", level=level)
    if name == "gsm8k":
        if data is None:
            raise ValueError(
                "benchmark 'gsm8k' needs its file: give --data with the path of test.jsonl or of the folder that holds it"
            )
        return load_tasks("gsm8k", count=count, seed=seed, split="heldout" if Path(data).is_dir() else "all", path=data)
    if name.endswith(SUFFIXES):
        return load_tasks(name, count=count, seed=seed, split="all")
    raise ValueError(f"benchmark {name!r} is unknown: known are {', '.join(BENCHMARKS)}, or a path ending in .jsonl")
