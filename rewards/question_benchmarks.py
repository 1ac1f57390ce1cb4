"""Published question sets in their publishers' own formats: GSM8K, MATH, AIME, multiple choice (MMLU, GPQA, ARC), IFEval.

    rows (a file, a folder, the hub) ─ read_row ─> question, gold answer, worked answer ─ template, shots ─> Task

A template is the text around a question; `{question}` stands for it. Shots are worked examples as earlier turns: from the train file
beside the test file where there is one, else rows of the file itself, which are then left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from winnow.rewards.data import SUFFIXES, hub_rows, read_jsonl
from winnow.rewards.extraction import boxed
from winnow.rewards.language import digest
from winnow.rewards.reasoning import gold_number
from winnow.rollout.schema import Message, Task

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row: the question, its gold answer, the answer as a worked example shows it."""

    question: str
    answer: str | None
    worked: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a benchmark's rows are read, asked and graded, and where the hub keeps it."""

    read: Callable[[Row], Item]
    reward: str
    template: str
    hub: str = ""


def field_of(row: Row, *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"the row has none of the fields {', '.join(names)}; it has {', '.join(row)}")


def read_gsm8k(row: Row) -> Item:
    text = str(field_of(row, "answer"))
    return Item(question=str(field_of(row, "question")), answer=f"{gold_number(text):f}", worked=text)


def read_maths(row: Row) -> Item:
    """MATH (`problem`, `solution`), MATH-500 and AIME (`problem`, `answer`)."""
    solution = str(row.get("solution") or "")
    answer = row.get("answer", row.get("Answer"))
    gold = str(answer) if answer is not None else boxed(solution)
    if not gold:
        raise ValueError("the row has neither an answer nor a solution with \\boxed{}")
    worked = solution if boxed(solution) else f"\\boxed{{{gold}}}"
    level = {key: row[key] for key in ("level", "subject", "type") if key in row}
    return Item(
        question=str(field_of(row, "problem", "question", "Problem")), answer=gold, worked=worked, metadata=level
    )


def read_choice(row: Row) -> Item:
    """MMLU (choices, answer: number or letter), ARC (choices: text and label, answerKey), GPQA (one right and three wrong answers)."""
    question = str(field_of(row, "question", "Question"))
    if "Correct Answer" in row:
        right = str(row["Correct Answer"]).strip()
        options = [right, *(str(row[f"Incorrect Answer {i}"]).strip() for i in (1, 2, 3))]
        Random(digest(question)).shuffle(options)  # the same order for every model and seed
        letter = LETTERS[options.index(right)]
    elif isinstance(row.get("choices"), Mapping):
        options = [str(text) for text in row["choices"]["text"]]
        letter = LETTERS[list(map(str, row["choices"]["label"])).index(str(row["answerKey"]))]
    else:
        options = [str(text) for text in field_of(row, "choices", "options")]
        gold = field_of(row, "answer", "answer_index")
        letter = LETTERS[gold] if isinstance(gold, int) else str(gold).strip().strip("()").upper()
    if letter not in LETTERS[: len(options)] or len(letter) != 1:
        raise ValueError(f"the gold letter is {letter!r}, but there are {len(options)} choices")
    listed = "\n".join(f"{LETTERS[place]}. {text}" for place, text in enumerate(options))
    subject = {"subject": row["subject"]} if "subject" in row else {}
    return Item(
        question=f"{question}\n{listed}",
        answer=letter,
        worked=f"The answer is {letter}.",
        metadata={"choices": len(options), **subject},
    )


def read_ifeval(row: Row) -> Item:
    names, arguments = field_of(row, "instruction_id_list"), field_of(row, "kwargs")
    pairs = [
        [name, {key: value for key, value in (given or {}).items() if value is not None}]
        for name, given in zip(names, arguments, strict=True)
    ]
    return Item(question=str(field_of(row, "prompt")), answer=None, worked="", metadata={"instructions": pairs})


BOXED = "{question}\nReason step by step, and put your final answer within \\boxed{{}}."
LETTER = "{question}\nThink it through, then end with: The answer is (LETTER)."
FORMATS: dict[str, Format] = {
    "gsm8k": Format(
        read=read_gsm8k, reward="gsm8k", hub="openai/gsm8k:main",
        template="{question}\nSolve it step by step and end with a line of #### and the number.",
    ),
    "math": Format(read=read_maths, reward="math", hub="HuggingFaceH4/MATH-500", template=BOXED),
    "aime24": Format(read=read_maths, reward="math", hub="HuggingFaceH4/aime_2024", template=BOXED),
    "aime25": Format(read=read_maths, reward="math", hub="math-ai/aime25", template=BOXED),
    "mmlu": Format(read=read_choice, reward="choice", hub="cais/mmlu:all", template=LETTER),
    "gpqa": Format(read=read_choice, reward="choice", hub="Idavidrein/gpqa:gpqa_diamond", template=LETTER),
    "arc": Format(read=read_choice, reward="choice", hub="allenai/ai2_arc:ARC-Challenge", template=LETTER),
    "ifeval": Format(read=read_ifeval, reward="ifeval", hub="google/IFEval", template="{question}"),
}  # fmt: skip


def load_questions(
    name: str,
    path: str | Path | None = None,
    count: int | None = None,
    seed: int = 0,
    shots: int = 0,
    template: str | None = None,
) -> list[Task]:
    """At most `count` tasks of a benchmark's test split, in an order that the seed decides. Raises ValueError naming file and line."""
    form = FORMATS[name]
    if template is not None and "{question}" not in template:
        raise ValueError(f"the prompt template {template[:60]!r} has no {{question}}, so it would ask nothing")
    if shots and form.reward == "ifeval":
        raise ValueError("ifeval has no worked answers: set shots to 0")
    rows, examples = test_rows(name, path), train_rows(name, path) if shots else []
    items = [read_item(form, row, where) for where, row in rows]
    shown = [read_item(form, row, where) for where, row in examples]
    if not shown and shots:
        shown, items = items[:shots], items[shots:]
    if len(shown) < shots:
        raise ValueError(f"{name} has {len(shown)} worked examples for {shots} shots: lower shots")
    ask = template or form.template
    turns: list[Message] = []
    for item in shown[:shots]:
        turns += [
            {"role": "user", "content": filled(ask, item.question)},
            {"role": "assistant", "content": item.worked},
        ]
    tasks = [make_task(name, form, item, ask, turns) for item in items]
    Random(f"winnow rows {seed}").shuffle(tasks)
    return tasks[:count]


def filled(template: str, question: str) -> str:
    return template.replace("{{}}", "{}").replace("{question}", question)


def make_task(name: str, form: Format, item: Item, ask: str, turns: Sequence[Message]) -> Task:
    return Task(
        id=f"{name}-{digest(item.question):016x}",
        domain=name,
        messages=(*turns, {"role": "user", "content": filled(ask, item.question)}),
        reward=form.reward,
        answer=item.answer,
        metadata=item.metadata,
    )


def read_item(form: Format, row: Row, where: str) -> Item:
    try:
        return form.read(row)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def test_rows(name: str, path: str | Path | None) -> list[tuple[str, Row]]:
    """The rows of the test file below `path` (a file, its folder, or the folder of all benchmarks), or of the hub."""
    if path is not None:
        return list(read_jsonl(find_file(Path(path).expanduser(), name, ("test", name))))
    hub = FORMATS[name].hub
    try:
        rows, _, _ = hub_rows(hub, "heldout")
    except ValueError as error:
        raise ValueError(
            f"benchmark {name!r}: give --data with its test.jsonl or the folder that holds it; {error}"
        ) from error
    return list(rows)


def train_rows(name: str, path: str | Path | None) -> list[tuple[str, Row]]:
    """Rows to show as examples: of train.jsonl (or validation, dev) beside the test file; none where there is no such file."""
    if path is None:
        return list(hub_rows(FORMATS[name].hub, "train")[0])
    file = find_file(Path(path).expanduser(), name, ("test", name))
    for other in ("train", "validation", "dev"):
        beside = file.with_name(f"{other}{file.suffix}")
        if beside.is_file() and beside != file:
            return list(read_jsonl(beside))
    return []


def find_file(path: Path, name: str, stems: Sequence[str]) -> Path:
    """The JSONL file of a benchmark. Raises ValueError saying where it was looked for."""
    if path.suffix in SUFFIXES or path.is_file():
        return path
    tried = [folder / f"{stem}{suffix}" for folder in (path / name, path) for stem in stems for suffix in SUFFIXES]
    for file in tried:
        if file.is_file():
            return file
    raise ValueError(
        f"benchmark {name!r} has no file below {path}: looked for {', '.join(str(file) for file in tried[:4])}, ..."
    )
