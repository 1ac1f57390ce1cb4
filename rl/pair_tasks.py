"""Two domains of docs/students.md as JSONL files: python -m winnow.rl.pair_tasks FOLDER writes sums.jsonl and comparison.jsonl.

Every unordered pair is asked once, in an order of its own. One row in five is held out by a hash of its prompt (rewards/data.py), so that
`23 + 41` is never trained on where `41 + 23` is asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

Pair = tuple[int, int]
SUMS = [(a, b) for a in range(80) for b in range(a + 1)]
COMPARISONS = [(a, b) for a in range(1, 100) for b in range(1, a)]


def write_pairs(folder: Path, seed: int = 9) -> list[Path]:
    """The two files; the same seed, the same bytes."""
    rng = Random(seed)

    def write(name: str, pairs: Sequence[Pair], question: str, answer: Callable[[int, int], int]) -> Path:
        chosen = [tuple(rng.sample(pair, 2)) for pair in pairs]
        rng.shuffle(chosen)
        rows = [{"prompt": question.format(a, b), "answer": str(answer(a, b))} for a, b in chosen]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    folder.mkdir(parents=True, exist_ok=True)
    return [
        write("sums", SUMS, "What is {} + {}?", lambda a, b: a + b),
        write("comparison", COMPARISONS, "Which number is larger, {} or {}?", max),
    ]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    for path in write_pairs(Path(arguments[0])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
