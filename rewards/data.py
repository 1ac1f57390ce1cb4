"""Tasks from anywhere: a procedural kind, a JSONL file, GSM8K, a data set of the hub. One function, one set of errors.

    load_tasks("lookup", count=512)                                                    tasks.py
    load_tasks("database", count=512)                                                  environments.py
    load_tasks("my/problems.jsonl", fields={"prompt": "question", "answer": "answer"})  a row a line
    load_tasks("gsm8k", path="data/gsm8k")                                             train.jsonl and test.jsonl, or one file
    load_tasks("reasoning-gym:leg_counting", count=512)                                gym_tasks.py, the package as an extra
    load_tasks("mbpp", path="data/mbpp")                                               code_benchmarks.py
    load_tasks("verifiers:NAME")                                                       environments_verifiers.py
    load_tasks("openai/gsm8k:main", split="heldout")                                   through `datasets`

Files without splits of their own are split by a hash of the prompt: one row in five is held out, whatever the seed and the order.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from winnow.rewards.environments import KINDS, environment_tasks, with_tools
from winnow.rewards.gym_tasks import PREFIX as GYM_PREFIX
from winnow.rewards.gym_tasks import gym_tasks
from winnow.rewards.language import check_split, digest, in_split
from winnow.rewards.reasoning import gold_number
from winnow.rewards.tasks import DOMAINS, generate_tasks
from winnow.rollout.schema import Message, Task

PROCEDURAL_COUNT = 256
PROMPT_FIELDS = ("prompt", "question", "problem", "text", "messages", "instruction")
ANSWER_FIELDS = ("answer", "gold", "target")
FIELD_NAMES = ("prompt", "answer", "system", "id")  # what `fields` may map; every other field of a row becomes metadata
ANSWERED = ("number", "each_number", "gsm8k", "exact", "choice", "math")  # rewards that compare with a gold answer
NUMERIC = ("number", "gsm8k")
CODE_SOURCES = ("humaneval", "mbpp", "livecodebench")  # code_benchmarks.py
SUFFIXES = (".jsonl", ".json", ".ndjson")


def load_tasks(
    source: str,
    domain: str | None = None,
    count: int | None = None,
    seed: int = 0,
    split: str = "train",
    level: int = 1,
    *,
    fields: Mapping[str, str] | None = None,
    reward: str | None = None,
    environment: str | None = None,
    path: str | Path | None = None,
) -> list[Task]:
    """At most `count` tasks of the source (None: all; 256 of a procedural kind), in an order that the seed decides.

    `split`: 'train', 'heldout' or 'all'. `fields` maps `prompt`, `answer`, `system`, `id` to the source's own names. `reward` names the
    grader; by default gsm8k where the answers carry `####`, else number. `path`: where the file of a named source lies. Raises
    ValueError, naming file and line where there is one.
    """
    check_split(split)
    if count is not None and count < 1:
        raise ValueError(f"count of {source!r} is {count}, but it must be at least 1, or left out for all")
    if source in DOMAINS:
        return generate_tasks(source, level, count or PROCEDURAL_COUNT, seed, split, domain)
    if source in KINDS:
        return environment_tasks(source, level, count or PROCEDURAL_COUNT, seed, split, domain)
    if source.startswith(GYM_PREFIX):
        return gym_tasks(source, count or PROCEDURAL_COUNT, seed, split, domain)
    if source.startswith("verifiers:"):
        from winnow.rewards.environments_verifiers import verifiers_tasks

        found = verifiers_tasks(source.removeprefix("verifiers:"), -1, domain)
        return [task for task in found if in_split(prompt_key(task), split)][:count]
    if source in CODE_SOURCES:
        return code_rows(source, path, count, seed, split, domain, reward)
    rows, name, has_splits = open_source(source, path, split)
    make = RowReader(name, domain or "reasoning", fields, reward, environment)
    tasks = [with_tools(make.task(row, where)) for where, row in rows]
    if not tasks:
        raise ValueError(f"{name} is empty: it holds no rows to make tasks of")
    if not has_splits:
        tasks = [task for task in tasks if in_split(prompt_key(task), split)]
    if not tasks:
        raise ValueError(
            f"{name} has no tasks in split {split!r}"
            + ("" if split == "all" else ": set split 'all' to take every row")
        )
    Random(f"winnow rows {seed}").shuffle(tasks)
    return tasks[:count]


def prompt_key(task: Task) -> str:
    return "\n".join(message["content"] for message in task.messages)


def code_rows(
    source: str,
    path: str | Path | None,
    count: int | None,
    seed: int,
    split: str,
    domain: str | None,
    reward: str | None,
) -> list[Task]:
    """Tasks of a code benchmark's file, split by a hash of the prompt as other files are."""
    from winnow.rewards.code_benchmarks import load_code_tasks

    if path is None:
        raise ValueError(
            f"source {source!r} needs its file: give the path of the JSONL file or of the folder that holds it"
        )
    tasks = [task for task in load_code_tasks(source, path, seed=seed) if in_split(prompt_key(task), split)]
    return [replace(task, domain=domain or task.domain, reward=reward or task.reward) for task in tasks][:count]


Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where the row stands, the row


def open_source(source: str, path: str | Path | None, split: str) -> tuple[Rows, str, bool]:
    """The rows of a source, its name for messages, and whether it came split already."""
    if source == "gsm8k":
        if path is None:
            raise ValueError(
                "source 'gsm8k' needs its file: give the path of train.jsonl or test.jsonl, or of the folder with both"
            )
        return gsm8k_rows(Path(path), split)
    file = Path(path or source).expanduser()
    if path is not None or file.suffix in SUFFIXES or file.exists():
        return read_jsonl(file), str(file), False
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        known = ", ".join([*DOMAINS, *KINDS, "gsm8k", *CODE_SOURCES])
        raise ValueError(
            f"source {source!r} is no file here and no known kind ({known}); a hub data set is written owner/name"
        )
    return hub_rows(source, split)


def gsm8k_rows(path: Path, split: str) -> tuple[Rows, str, bool]:
    """A folder: train.jsonl is the training split, test.jsonl the held-out one. A file: split by hash, as any other."""
    if not path.is_dir():
        return read_jsonl(path), str(path), False
    names = {"train": ("train",), "heldout": ("test",), "all": ("train", "test")}[split]
    files = [path / f"{name}.jsonl" for name in names]
    return (row for file in files for row in read_jsonl(file)), str(path), True


def read_jsonl(file: Path) -> Rows:
    """The rows of a JSONL file with their `file:line`. Empty lines are skipped. Raises ValueError for a missing file and a broken line."""
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name, [p.name for p in file.parent.glob("*")] if file.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise ValueError(f"there is no file {file}{hint}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{where}: the line is not JSON ({error}); a JSONL file holds one object a line"
                ) from error
            if row is None:
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{where}: the line is a JSON {type(row).__name__}, but it must be an object")
            yield where, row


def hub_rows(source: str, split: str) -> tuple[Rows, str, bool]:
    """A data set of the hub, `owner/name` or `owner/name:config`. Its own splits are used where it has a train and a test one."""
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        data = load_dataset(name, config or None)
    except Exception as error:  # `datasets` raises a dozen kinds, from missing configs to a missing network
        raise ValueError(
            f"data set {source!r} cannot be loaded from the hub: {type(error).__name__}: {error}"
        ) from error
    held = next((key for key in ("test", "validation") if key in data), None)
    has_splits = held is not None and "train" in data
    keys = [{"train": "train", "heldout": held}[split]] if has_splits and split != "all" else list(data)
    return ((f"{source}[{key}]:{i}", row) for key in keys for i, row in enumerate(data[key])), source, has_splits


class RowReader:
    """Rows to tasks: finds the fields once, at the first row, and checks every row against them."""

    def __init__(
        self, name: str, domain: str, fields: Mapping[str, str] | None, reward: str | None, environment: str | None
    ) -> None:
        unknown = [key for key in fields or {} if key not in FIELD_NAMES]
        if unknown:
            raise ValueError(
                f"fields maps {unknown[0]!r}, but only {', '.join(FIELD_NAMES)} can be mapped to a field of {name}"
            )
        self.name, self.domain, self.fields = name, domain, dict(fields or {})
        self.reward, self.environment = reward, environment
        self.prepared = False

    def prepare(self, row: Mapping[str, Any], where: str) -> None:
        """Fills in the fields that were not mapped from the names that publishers use."""
        for role, usual in (("prompt", PROMPT_FIELDS), ("answer", ANSWER_FIELDS)):
            found = next((field for field in usual if field in row), None)
            if found and role not in self.fields:
                self.fields[role] = found
        if "prompt" not in self.fields:
            raise ValueError(f"{where}: no field looks like a prompt; set fields.prompt to one of {', '.join(row)}")
        if self.reward is None:
            self.reward = "gsm8k" if "####" in str(row.get(self.fields.get("answer", ""), "")) else "number"
        if self.reward in ANSWERED and "answer" not in self.fields:
            raise ValueError(
                f"{where}: reward {self.reward!r} needs an answer; set fields.answer to one of {', '.join(row)}"
            )
        self.prepared = True

    def task(self, row: Mapping[str, Any], where: str) -> Task:
        if not self.prepared:
            self.prepare(row, where)
        assert self.reward is not None
        missing = [field for field in self.fields.values() if field not in row]
        if missing:
            raise ValueError(f"{where}: there is no field {missing[0]!r}; the row has {', '.join(row) or 'no fields'}")
        messages = self.messages(row, where)
        answer = None if "answer" not in self.fields else str(row[self.fields["answer"]])
        metadata = {key: value for key, value in row.items() if key not in self.fields.values()}
        if answer is not None and self.reward in NUMERIC:
            metadata["solution"] = answer
            try:
                answer = f"{gold_number(answer):f}"
            except ValueError as error:
                raise ValueError(
                    f"{where}: {error}, which reward {self.reward!r} compares with; set reward to exact or math"
                ) from error
        elif self.reward in ANSWERED and not (answer or "").strip():
            raise ValueError(f"{where}: the answer is empty")
        name = str(row[self.fields["id"]]) if "id" in self.fields else f"{digest(json.dumps(messages)):016x}"
        return Task(
            id=name,
            domain=self.domain,
            messages=messages,
            reward=self.reward,
            answer=answer,
            environment=self.environment,
            metadata=metadata,
        )

    def messages(self, row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
        """A text becomes one user message; a list of messages is taken as it is."""
        prompt = row[self.fields["prompt"]]
        if isinstance(prompt, str) and prompt.strip():
            messages: list[Message] = [{"role": "user", "content": prompt}]
        elif (
            isinstance(prompt, list)
            and prompt
            and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
        ):
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in prompt]
        else:
            raise ValueError(
                f"{where}: field {self.fields['prompt']!r} must be a text or a list of messages with role and content, "
                f"but it is {json.dumps(prompt, default=str)[:60]}"
            )
        if "system" in self.fields:
            messages.insert(0, {"role": "system", "content": str(row[self.fields["system"]])})
        return tuple(messages)
