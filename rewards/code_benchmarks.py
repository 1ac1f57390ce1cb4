"""HumanEval, MBPP and LiveCodeBench in their publishers' own formats: rows to tasks for the rewards `code` and `code_share`.

    HumanEval       prompt, entry_point, canonical_solution, test (a function `check`)             asserts
    MBPP            text | prompt, code, test_list, test_setup_code | test_imports                 asserts
    LiveCodeBench   question_content, starter_code, public_test_cases, private_test_cases          stdin/stdout cases, or calls

The asserts run beside the program, not in it (sandbox_asserts.py). `solution` in the metadata is the reference, where there is one.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from winnow.rewards.data import read_jsonl
from winnow.rollout.schema import Task

Row = Mapping[str, Any]
FILES = ("test.jsonl", "HumanEval.jsonl", "mbpp.jsonl", "test6.jsonl")  # names that publishers give
SECONDS = {"humaneval": 5.0, "mbpp": 10.0, "livecodebench": 6.0}  # MBPP 123's reference takes 5 s on a slow core
INSTRUCTION = "Write the function in Python, in one ```python code block, complete with its imports."
PROGRAM = "Write a Python program that reads from standard input and prints the answer, in one ```python code block."
CALLS = """
import json
def same(found, wanted):
    plain = lambda v: [plain(x) for x in v] if isinstance(v, (list, tuple)) else v
    return plain(found) == plain(wanted)
"""


def load_code_tasks(name: str, path: str | Path, count: int | None = None, seed: int = 0, shots: int = 0) -> list[Task]:
    """At most `count` tasks of `humaneval`, `mbpp` or `livecodebench` from a JSONL file or its folder, in an order that the seed decides.

    `shots`: MBPP's customary worked examples (tasks 2, 3 and 4 of the file, which are then left out) before each question. Raises
    ValueError naming file and line.
    """
    if name not in READERS:
        raise ValueError(f"code benchmark {name!r} is unknown: known are {', '.join(READERS)}")
    rows = list(read_jsonl(find_file(Path(path).expanduser(), name)))
    tasks = [read_row(name, row, where) for where, row in rows]
    if shots:
        tasks = with_examples(tasks, shots, name)
    Random(f"winnow rows {seed}").shuffle(tasks)
    return tasks[:count]


def find_file(path: Path, name: str) -> Path:
    if not path.is_dir():
        return path
    for candidate in (path / file for folder in (path, path / name) for file in [folder.name, *FILES]):
        if candidate.is_file():
            return candidate
    for folder in (path / name, path):
        found = next((folder / file for file in FILES if (folder / file).is_file()), None)
        if found is not None:
            return found
    raise ValueError(f"folder {path} has none of {', '.join(FILES)}: name the JSONL file of {name}")


def read_row(name: str, row: Row, where: str) -> Task:
    try:
        return READERS[name](row)
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{where}: this is no row of {name}: {type(error).__name__}: {error}") from error


def make_task(name: str, identity: Any, question: str, metadata: Mapping[str, Any]) -> Task:
    return Task(
        id=f"{name}/{identity}",
        domain="code",
        messages=({"role": "user", "content": question},),
        reward="code",
        metadata={"seconds": SECONDS[name], **metadata},
    )


def humaneval(row: Row) -> Task:
    """The prompt defines helpers and the function's head; the reply continues it, or writes the function whole."""
    prompt, entry = row["prompt"], row["entry_point"]
    question = f"Complete this function. {INSTRUCTION}\n\n```python\n{prompt.rstrip()}\n```"
    metadata = {
        "prefix": prompt,
        "entry": entry,
        "setup": f"{prompt}    pass\n{row['test']}",  # the helpers in the prompt are trusted; the entry becomes a proxy
        "tests": split_check(row["test"], entry),
        "solution": prompt + row["canonical_solution"],
    }
    return make_task("humaneval", str(row["task_id"]).rsplit("/", 1)[-1], question, metadata)


def split_check(test: str, entry: str) -> list[str]:
    """One test: `check(entry)` as the benchmark defines it. Raises ValueError when there is no `check`."""
    names = [node.name for node in ast.parse(test).body if isinstance(node, ast.FunctionDef)]
    if "check" not in names:
        raise ValueError("its test defines no function `check`")
    return [f"check({entry})"]


def mbpp(row: Row) -> Task:
    """Both releases: the full one (`text`, `test_setup_code`) and the sanitized one (`prompt`, `test_imports`)."""
    tests = [str(test) for test in row["test_list"]]
    setup = "\n".join([row.get("test_setup_code") or "", *row.get("test_imports", ())]).replace("\r\n", "\n")
    question = (
        f"{(row.get('text') or row['prompt']).strip()}\nYour code should satisfy these tests:\n"
        + "\n".join(tests)
        + f"\n{INSTRUCTION}"
    )
    names = sorted(defined(row["code"]) & mentioned("\n".join([setup, *tests])))
    if not names:
        raise ValueError("its tests call nothing that its reference defines")
    metadata = {"names": names, "tests": tests, "setup": setup, "solution": row["code"].replace("\r\n", "\n")}
    return make_task("mbpp", row["task_id"], question, metadata)


def defined(source: str) -> set[str]:
    """Names at the top level of a program: functions, classes, assignments."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def mentioned(source: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def livecodebench(row: Row) -> Task:
    """`public_test_cases` and `private_test_cases`: JSON, the latter usually compressed. testtype stdin, or functional calls of a method."""
    cases = [*read_cases(row.get("public_test_cases") or "[]"), *read_cases(row.get("private_test_cases") or "[]")]
    if not cases:
        raise ValueError("it has no test cases")
    question = row["question_content"].strip()
    starter = row.get("starter_code") or ""
    if cases[0].get("testtype") != "functional":
        pairs = [{"input": case["input"], "output": case["output"]} for case in cases]
        return make_task("livecodebench", row["question_id"], f"{question}\n\n{PROGRAM}", {"cases": pairs})
    details = row.get("metadata") or "{}"
    function = (json.loads(details) if isinstance(details, str) else details)["func_name"]
    target, name = (f"Solution().{function}", "Solution") if "class Solution" in starter else (function, function)
    tests = []
    for case in cases:
        arguments = ", ".join(repr(json.loads(line)) for line in case["input"].splitlines() if line.strip())
        tests.append(f"assert same({target}({arguments}), {json.loads(case['output'])!r})")
    question = f"{question}\n\nStart from:\n```python\n{starter.rstrip()}\n```\n{INSTRUCTION}"
    metadata = {"names": [name], "tests": tests, "setup": CALLS}
    return make_task("livecodebench", row["question_id"], question, metadata)


def read_cases(field: Any) -> list[dict[str, Any]]:
    """Test cases as a list, as JSON, or as its publisher packs them: base64 of zlib of a pickled JSON text. Raises ValueError."""
    if isinstance(field, list):
        return field
    try:
        return list(json.loads(field))
    except json.JSONDecodeError:
        text = PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(field)))).load()
        return list(json.loads(text))


class PlainUnpickler(pickle.Unpickler):
    """Builds plain values only: a data file must not be able to run code here."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"its test cases hold a pickled {module}.{name}, where only a text is expected")


def with_examples(tasks: list[Task], shots: int, name: str) -> list[Task]:
    """Worked examples as earlier turns of every conversation: the first tasks with a reference; they are not asked themselves."""
    examples = [task for task in tasks if "solution" in task.metadata][1 : shots + 1]
    if len(examples) < shots:
        raise ValueError(f"{shots} examples were asked for, but {name} has {len(examples)} with a reference solution")
    turns = [
        message
        for task in examples
        for message in (
            *task.messages,
            {"role": "assistant", "content": f"```python\n{task.metadata['solution']}\n```"},
        )
    ]
    shown = {task.id for task in examples}
    return [with_turns(task, turns) for task in tasks if task.id not in shown]


def with_turns(task: Task, turns: list[Any]) -> Task:
    from dataclasses import replace

    return replace(task, messages=(*turns, *task.messages))


READERS: dict[str, Callable[[Row], Task]] = {"humaneval": humaneval, "mbpp": mbpp, "livecodebench": livecodebench}
