"""Code rewards: programs found in replies, judged by cases and by asserts; gold answers score 1 and perturbed ones 0; the benchmarks' formats."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from winnow.rewards import sandbox
from winnow.rewards.baseline import play
from winnow.rewards.benchmarks import load_benchmark
from winnow.rewards.code_benchmarks import load_code_tasks
from winnow.rewards.contract import grade, success
from winnow.rewards.programs import Verdict, judge_reply, program_of, same_output
from winnow.rewards.registry import get_reward
from winnow.rollout.schema import Failure, Group, Request, Sampling, Score, Task


@pytest.fixture(scope="module")
def box() -> Iterator[sandbox.Sandbox]:
    made = sandbox.Sandbox(2)
    try:
        made.start()
    except sandbox.SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def task_of(**metadata: Any) -> Task:
    return Task(id="t", domain="code", messages=({"role": "user", "content": "?"},), reward="code", metadata=metadata)


CASES = task_of(
    cases=[{"input": "1 2", "output": "3\n"}, {"input": "5 5", "output": "10"}, {"input": "0 1", "output": "1"}]
)
ADD = "a, b = map(int, input().split())\nprint(a + b)"
TESTS = task_of(tests=["assert f(2) == 4", "assert f([1]) == [1, 1]", "assert f('a') == 'aa'"], names=["f"])
PREFIX = 'import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    """Twice."""\n'


# ------------------------------------------------------------------------------------------------------------- reply to program


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("Sure:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```python\nprint(1)\n```\nor better\n```py\nprint(2)\n```", "print(2)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```bash\nls\n```\n```python\nprint(1)\n```\n```text\n1\n```", "print(1)\n"),
        ("```python\nprint(1)", "print(1)"),
        ("print(1)", "print(1)"),
        ("The answer is print it.", None),
        ("", None),
        ("```python\n```", None),
    ],
)
def test_programs_are_found(reply: str, program: str | None) -> None:
    assert program_of(reply) == program


def test_a_block_that_defines_the_entry_wins_over_a_later_example() -> None:
    reply = "```python\ndef f(x):\n    return x\n```\nUse it so:\n```python\nprint(f(2))\n```"
    assert program_of(reply, entry="f") == "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "reply",
    [
        "    return helper(x) * 2\n",
        "    return helper(x) * 2\n\nprint(f(2))\nassert False",
        "return helper(x) * 2",
        "```python\ndef f(x):\n    return helper(x) * math.ceil(2)\n```",
        "```python\n    return helper(x) * 2\n```",
        "Here it is:\n```python\nfrom math import *\ndef f(x):\n    return x * 2\n```\nwhich doubles.",
    ],
)
def test_a_prompt_is_continued_or_rewritten(box: sandbox.Sandbox, reply: str) -> None:
    task = task_of(tests=["assert f(2) == 4"], prefix=PREFIX, entry="f")
    assert judge_reply(task, reply, box=box).outcome == "passed", program_of(reply, PREFIX, "f")


# ---------------------------------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("reply", "outcome", "passed"),
    [
        (ADD, "passed", 3),
        (ADD.replace("+", "*"), "wrong", 0),
        ("input()\nprint(3)", "wrong", 1),
        ("import sys\nsys.exit(0)", "wrong", 0),
        (ADD + "\nimport sys\nsys.exit(1)", "exit", 0),
        (ADD + "\nraise ValueError", "exception", 0),
        ("while True: pass", "limit", 0),
        ("nothing of note.", "no_program", 0),
    ],
)
def test_cases(box: sandbox.Sandbox, reply: str, outcome: str, passed: int) -> None:
    task = task_of(**{**CASES.metadata, "seconds": 1})
    verdict = judge_reply(task, f"```python\n{reply}\n```" if outcome != "no_program" else reply, box=box)
    found = "limit" if verdict.outcome in ("timeout", "cpu") else verdict.outcome
    assert (found, verdict.passed, verdict.total) == (outcome, passed, 3), verdict


def test_a_share_counts_every_case_but_a_hang_only_once(box: sandbox.Sandbox) -> None:
    reply = "```python\na, b = map(int, input().split())\nprint(a + b if a else 7)\n```"
    assert judge_reply(CASES, reply, every_case=True, box=box).passed == 2
    swapped = task_of(cases=CASES.metadata["cases"][::-1])
    assert judge_reply(swapped, reply, every_case=True, box=box) == Verdict(
        outcome="wrong", passed=2, total=3, detail="case 0: "
    )
    hang = judge_reply(
        task_of(**{**CASES.metadata, "seconds": 0.5}),
        "```python\nimport time\ntime.sleep(9)\n```",
        every_case=True,
        box=box,
    )
    assert hang.outcome == "timeout" and hang.passed == 0


def test_asserts(box: sandbox.Sandbox) -> None:
    assert judge_reply(TESTS, "```python\ndef f(x): return x * 2\n```", box=box) == Verdict(
        outcome="passed", passed=3, total=3
    )
    verdict = judge_reply(TESTS, "```python\ndef f(x): return x + x if x != [1] else 0\n```", box=box)
    assert (verdict.outcome, verdict.passed, verdict.detail) == ("wrong", 2, "test 1: ")
    assert judge_reply(TESTS, "```python\ndef g(x): return x * 2\n```", box=box).outcome == "exception"


@pytest.mark.parametrize(
    ("expected", "got", "tolerance", "same"),
    [
        ("1 2\n3\n", "1 2 \n3\n\n", 0, True),
        ("1 2\n3", "1 2 3", 0, False),
        ("1.50", "1.5", 0, True),
        ("1e3", "1000", 0, True),
        ("1 000", "1000", 0, False),
        ("0.333333", "0.33333334", 0, False),
        ("0.333333", "0.33333334", 1e-6, True),
        ("1000000", "1000001", 1e-5, True),
        ("abc", "ABC", 0, False),
        ("nan", "nan", 0, True),
        ("1", "1" * 100_000, 1.0, False),
        ("", "", 0, True),
        ("1", "", 0, False),
        ("5", "1e9999999999999", 0, False),
        ("5", "-9e99999999", 1e-6, False),
    ],
)
def test_outputs_are_compared_by_lines_and_values(expected: str, got: str, tolerance: float, same: bool) -> None:
    assert same_output(expected, got, tolerance) is same


def group_of(task: Task, replies: list[str]) -> Group:
    request = Request(request_id="r", task=task, num_samples=len(replies), sampling=Sampling(max_tokens=64))
    return Group(
        request=request,
        trajectories=tuple(play(task, lambda _, r=r: r, request_id="r", sample=i) for i, r in enumerate(replies)),
    )


def test_the_rewards_give_parts_and_no_silent_zero(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "shared", lambda: box)
    replies = [f"```python\n{ADD}\n```", "```python\ninput()\nprint(3)\n```", "It is no.", "```python\n1 / 0\n```"]
    (graded,) = grade(get_reward, [group_of(CASES, replies)])
    assert [score.value for score in graded.scores] == [1.0, 0.0, 0.0, 0.0]
    assert [success(score) for score in graded.scores] == [1.0, 0.0, 0.0, 0.0]
    kinds = [
        next((k for k in ("wrong", "no_program", "limit", "exception", "exit") if s.parts[k]), "")
        for s in graded.scores
    ]
    assert kinds == ["", "wrong", "no_program", "exception"] and graded.scores[1].parts["passed"] == pytest.approx(
        1 / 3
    )
    share = get_reward("code_share")(CASES, group_of(CASES, replies[1:2]).trajectories[0])
    assert isinstance(share, Score) and share.value == pytest.approx(1 / 3) and success(share) == 0
    (graded,) = grade(get_reward, [group_of(task_of(), ["```python\n1\n```"])])
    assert isinstance(graded.scores[0], Failure) and "neither metadata 'cases' nor 'tests'" in graded.scores[0].detail
    (graded,) = grade(get_reward, [group_of(task_of(tests=["assert ("]), ["```python\n1\n```"])])
    assert isinstance(graded.scores[0], Failure) and graded.scores[0].kind == "sandbox"


# ------------------------------------------------------------------------------------------------------------------- benchmarks

HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'def twice(x):\n    """2x"""\n    return x * 2\n\ndef f(xs: list) -> list:\n    """ Doubles each. """\n',
    "entry_point": "f",
    "canonical_solution": "    return [twice(x) for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [twice(1), 4]\n    assert candidate([]) == []\n",
}
MBPP = {
    "task_id": 900, "text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x",
    "test_setup_code": "", "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
}  # fmt: skip
SANITIZED = {
    "task_id": 901, "prompt": "Write a function for the root.", "code": "import math\ndef root(x):\n  return math.sqrt(x)",
    "test_imports": ["import math"], "test_list": ["assert math.isclose(root(2), 1.41421356, rel_tol=1e-6)"],
}  # fmt: skip
STDIN = {
    "question_id": "a", "question_content": "Add.", "starter_code": "", "metadata": "{}",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([{"input": "2 2\n", "output": "4\n", "testtype": "stdin"}])))
    ).decode(),
}  # fmt: skip
FUNCTIONAL = {
    "question_id": "b", "question_content": "Pairs.", "metadata": json.dumps({"func_name": "pairs"}),
    "starter_code": "class Solution:\n    def pairs(self, xs: List[int], k: int) -> List[List[int]]:\n",
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "[[1, 3], [2, 3]]", "testtype": "functional"}]),
    "private_test_cases": "[]",
}  # fmt: skip


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_each_format_becomes_a_task_that_its_own_solution_solves(box: sandbox.Sandbox, tmp_path: Path) -> None:
    (human,) = load_code_tasks("humaneval", written(tmp_path / "h.jsonl", HUMANEVAL))
    assert human.id == "humaneval/900" and "def f(xs" in human.messages[0]["content"]
    assert judge_reply(human, HUMANEVAL["canonical_solution"], box=box).outcome == "passed"
    assert judge_reply(human, "    return xs", box=box).outcome == "wrong"
    for row in (MBPP, SANITIZED):
        (task,) = load_code_tasks("mbpp", written(tmp_path / "m.jsonl", row))
        assert judge_reply(task, f"```python\n{task.metadata['solution']}\n```", box=box).outcome == "passed"
        assert row["test_list"][0] in task.messages[0]["content"]
    add, pairs = sorted(
        load_code_tasks("livecodebench", written(tmp_path / "l.jsonl", STDIN, FUNCTIONAL)), key=lambda t: t.id
    )
    assert judge_reply(add, f"```python\n{ADD}\n```", box=box) == Verdict(outcome="passed", passed=2, total=2)
    solution = "```python\nclass Solution:\n    def pairs(self, xs, k):\n        return [(x, k) for x in xs]\n```"
    assert judge_reply(pairs, solution, box=box).outcome == "passed"
    assert judge_reply(pairs, solution.replace("(x, k)", "(k, x)"), box=box).outcome == "wrong"


def test_worked_examples_come_before_the_question_and_are_not_asked(tmp_path: Path) -> None:
    rows = [{**MBPP, "task_id": number} for number in range(1, 7)]
    tasks = load_code_tasks("mbpp", written(tmp_path / "m.jsonl", *rows), shots=3)
    assert sorted(task.id for task in tasks) == ["mbpp/1", "mbpp/5", "mbpp/6"]
    assert [message["role"] for message in tasks[0].messages] == ["user", "assistant"] * 3 + ["user"]
    with pytest.raises(ValueError, match="9 examples were asked for"):
        load_code_tasks("mbpp", tmp_path / "m.jsonl", shots=9)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", {"prompt": "x"}, "KeyError: 'entry_point'"),
        ("humaneval", {**HUMANEVAL, "test": "assert f([]) == []"}, "no function `check`"),
        ("mbpp", {**MBPP, "code": "x ="}, "SyntaxError"),
        ("mbpp", {**MBPP, "code": "def other(): pass"}, "call nothing that its reference defines"),
        ("livecodebench", {**STDIN, "private_test_cases": "", "public_test_cases": "[]"}, "no test cases"),
        (
            "livecodebench",
            {**STDIN, "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()},
            "pickled posix.getcwd",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: this is no row of " + name) as error:
        load_code_tasks(name, written(tmp_path / "rows.jsonl", row))
    assert message in str(error.value)


def test_benchmarks_by_name(tmp_path: Path) -> None:
    (tmp_path / "humaneval").mkdir()
    written(tmp_path / "humaneval" / "test.jsonl", HUMANEVAL)
    for data in (tmp_path, tmp_path / "humaneval", tmp_path / "humaneval" / "test.jsonl"):
        assert [task.id for task in load_benchmark("humaneval", data=data)] == ["humaneval/900"]
    with pytest.raises(ValueError, match="'mbpp' needs its file"):
        load_benchmark("mbpp")
    with pytest.raises(ValueError, match=r"has none of test\.jsonl"):
        load_benchmark("mbpp", data=tmp_path)


# ----------------------------------------------------------------------------------------------------------------- gold answers

CHANGED = """
def _changed(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float, complex)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, (list, tuple)): return type(value)([*value, None])
    if isinstance(value, set): return value | {None}
    if isinstance(value, dict): return {**value, None: None}
    return 0 if value is None else None
def _wrapped(function): return lambda *a, **k: _changed(function(*a, **k))
"""


def gold(task: Task) -> str:
    return f"```python\n{task.metadata['solution']}\n```"


def perturbed(task: Task) -> str:
    """The reference with every result changed a little."""
    names = task.metadata.get("names") or [task.metadata["entry"]]
    wraps = "\n".join(f"if not isinstance({name}, type): {name} = _wrapped({name})" for name in names)
    return f"```python\n{task.metadata['solution']}\n{CHANGED}{wraps}\n```"


def outcomes(box: sandbox.Sandbox, tasks: list[Task], reply: Callable[[Task], str]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda task: judge_reply(task, reply(task), box=box), tasks))
    return {task.id: verdict.outcome for task, verdict in zip(tasks, verdicts, strict=True)}


def published(name: str) -> list[Task]:
    folder = os.environ.get("WINNOW_DATA")
    if not folder or not (Path(folder) / name / "test.jsonl").is_file():
        pytest.skip(f"WINNOW_DATA does not name a folder with {name}/test.jsonl")
    return load_code_tasks(name, Path(folder) / name)


def check_gold(box: sandbox.Sandbox, tasks: list[Task]) -> None:
    assert {name: outcome for name, outcome in outcomes(box, tasks, gold).items() if outcome != "passed"} == {}
    assert {name for name, outcome in outcomes(box, tasks, perturbed).items() if outcome == "passed"} == set()


def test_humaneval_references_pass_and_perturbed_ones_do_not(box: sandbox.Sandbox) -> None:
    tasks = published("humaneval")
    assert len(tasks) == 164
    check_gold(box, tasks)


def test_a_sample_of_mbpp_references_passes_and_perturbed_ones_do_not(box: sandbox.Sandbox) -> None:
    tasks = published("mbpp")
    odd = {
        f"mbpp/{number}" for number in (126, 367, 533, 596, 601, 927)
    }  # classes, types and shadowed built-ins across the boundary
    check_gold(box, [task for task in tasks if task.id in odd] + [task for task in tasks[:60] if task.id != "mbpp/123"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_mbpp_reference_passes_and_a_perturbed_one_does_not(box: sandbox.Sandbox) -> None:
    tasks = published("mbpp")
    assert len(tasks) == 974
    slow = {"mbpp/123"}  # its reference is quadratic: five seconds on a fast core
    patient = [replace(task, metadata={**task.metadata, "seconds": 60}) if task.id in slow else task for task in tasks]
    check_gold(box, patient)
