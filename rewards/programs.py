"""Code rewards: the reply's program runs in the sandbox, against stdin/stdout cases or against asserts.

    reply ─ program_of ─> source ─ sandbox ─> Verdict (a named outcome, tests passed) ─ code / code_share ─> Score

`task.metadata` says what is right:

    cases   [{"input": text, "output": text}, ...]     a program that reads stdin; outputs are compared here, outside the sandbox
    tests   ["assert f(2) == 3", ...]                  asserts; `setup`: trusted source before them, `names`: what the program defines
    prefix  source that the reply continues (HumanEval's prompt); `entry`: the function it begins

and, optionally, `seconds` of processor time (the wall clock allows twice that, so that a busy machine fails nobody), `memory_mb`, and
`tolerance` (numbers in an output may differ by so much, relative or absolute; 0).

A program that hangs, crashes or exhausts a limit is wrong: a Score of 0 with its outcome among the parts. A sandbox that fails is a
Failure. Passing is never the program's word: it sees neither expected outputs nor asserts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from winnow.rewards import sandbox
from winnow.rollout.schema import Failure, Score, Task, Trajectory

FENCE = re.compile(r"^[ \t]*```([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py")
LIMITS = ("timeout", "cpu", "memory", "output")
DETAIL = 200


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`outcome`: passed, wrong, no_program, or how the program ended (sandbox.Run). `passed` of `total` tests held."""

    outcome: str
    passed: int
    total: int
    detail: str = ""


# ------------------------------------------------------------------------------------------------------------- reply to program


def program_of(reply: str, prefix: str = "", entry: str = "") -> str | None:
    """The program in a reply: its last fenced block that defines `entry`, else its last block, else the reply itself. None for none.

    With a prefix, code that defines `entry` gets what stands before that function in the prefix (imports, helpers); code that does not
    is read as the prefix's continuation, up to the first line that stands outside of the function.
    """
    blocks = [body for language, body in FENCE.findall(reply) if language.lower() in PYTHON]
    defining = [block for block in blocks if entry and defines(block, entry)]
    chosen = (defining or blocks or [reply])[-1]
    if not chosen.strip():
        return None
    if entry and defines(chosen, entry):
        return f"{preamble(prefix, entry)}\n{chosen}" if prefix else chosen
    if prefix:
        return prefix + ("" if prefix.endswith("\n") else "\n") + body_only(chosen)
    return chosen if blocks or parses(chosen) else None


def defines(source: str, name: str) -> bool:
    return (
        re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", source, re.M)
        is not None
    )


def parses(source: str) -> bool:
    try:
        ast.parse(source)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def preamble(prefix: str, entry: str) -> str:
    """What stands before the entry function in a prompt."""
    found = re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b", prefix, re.M)
    return prefix[: found.start()] if found else prefix


def body_only(text: str) -> str:
    """The lines of a continued function: those before the first that begins at the margin with something else than a bracket."""
    lines = text.splitlines(keepends=True)
    if lines and lines[0][:1] not in (" ", "\t", "\n", "#", ""):
        lines[0] = (
            "    " + lines[0]
        )  # a model that was cut off after the docstring often leaves out the first indentation
    for number, line in enumerate(lines):
        if line.strip() and line[0] not in " \t)]}#":
            return "".join(lines[:number])
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------- judging


def judge_reply(task: Task, reply: str, every_case: bool = False, box: sandbox.Sandbox | None = None) -> Verdict:
    """The verdict on a reply. `every_case`: go on after a case that is wrong. Raises SandboxError, and ValueError for a task without tests."""
    metadata = task.metadata
    names = [*metadata.get("names", ()), *([metadata["entry"]] if "entry" in metadata else [])]
    source = program_of(reply, metadata.get("prefix", ""), names[0] if names else "")
    box = box or sandbox.shared()
    if "cases" in metadata:
        total = len(metadata["cases"])
    elif "tests" in metadata:
        total = len(metadata["tests"])
    else:
        total = 0
    if not total:
        raise ValueError(
            f"task {task.id!r} has neither metadata 'cases' nor 'tests', which reward {task.reward!r} grades by"
        )
    if source is None:
        return Verdict(outcome="no_program", passed=0, total=total)
    limits = limits_of(metadata, box.limits)
    if "cases" in metadata:
        return judge_cases(source, metadata, limits, every_case, box)
    return judge_tests(source, metadata, names, limits, box)


def limits_of(metadata: Mapping[str, Any], limits: sandbox.Limits) -> sandbox.Limits:
    memory = int(metadata["memory_mb"]) << 20 if "memory_mb" in metadata else limits.memory_bytes
    if "seconds" not in metadata:
        return replace(limits, memory_bytes=memory)
    seconds = float(metadata["seconds"])
    return replace(limits, cpu_s=seconds, wall_s=2 * seconds, memory_bytes=memory)


def judge_cases(
    source: str, metadata: Mapping[str, Any], limits: sandbox.Limits, every_case: bool, box: sandbox.Sandbox
) -> Verdict:
    cases: Sequence[Mapping[str, str]] = metadata["cases"]
    tolerance = float(metadata.get("tolerance", 0.0))
    passed, worst = 0, Verdict(outcome="passed", passed=len(cases), total=len(cases))
    for number, case in enumerate(cases):
        run = box.run(source, case["input"], limits=limits)
        right = run.outcome == "ok" and same_output(case["output"], run.stdout, tolerance)
        passed += right
        if right:
            continue
        if worst.outcome == "passed":
            outcome = "wrong" if run.outcome == "ok" else run.outcome
            worst = Verdict(outcome=outcome, passed=0, total=len(cases), detail=f"case {number}: {run.detail}"[:DETAIL])
        if not every_case or run.outcome in LIMITS:
            break  # a program that hangs would cost its whole time again at every case
    return replace(worst, passed=passed)


def judge_tests(
    source: str, metadata: Mapping[str, Any], names: Sequence[str], limits: sandbox.Limits, box: sandbox.Sandbox
) -> Verdict:
    tests = list(metadata["tests"])
    run = box.test(source, tests, metadata.get("setup", ""), names, limits)
    passed = run.results.count("pass")
    if run.outcome != "ok":
        return Verdict(outcome=run.outcome, passed=passed, total=len(tests), detail=run.detail)
    if passed == len(tests):
        return Verdict(outcome="passed", passed=passed, total=len(tests))
    first = next(result for result in run.results if result != "pass")
    outcome = "exception" if first.startswith("raised:") else "wrong"
    detail = f"test {run.results.index(first)}: {first.partition(':')[2]}"
    return Verdict(outcome=outcome, passed=passed, total=len(tests), detail=detail)


def same_output(expected: str, got: str, tolerance: float = 0.0) -> bool:
    """Equal line by line but for white space at line ends and empty lines at the end; numbers count by value (1.0 is 1.00)."""
    wanted, found = ([line.split() for line in text.rstrip().splitlines()] for text in (expected, got))
    return len(wanted) == len(found) and all(
        len(w) == len(f) and all(same_word(*pair, tolerance) for pair in zip(w, f, strict=True))
        for w, f in zip(wanted, found, strict=True)
    )


def same_word(wanted: str, found: str, tolerance: float) -> bool:
    if wanted == found:
        return True
    if len(found) > 400 or not (wanted[-1:].isdigit() and found[-1:].isdigit()):
        return False
    try:
        first, second = Decimal(wanted), Decimal(found)
        return first == second or float(abs(first - second)) <= tolerance * max(1.0, float(abs(first)))
    except ArithmeticError:  # no number, or one beyond every exponent
        return False


# ---------------------------------------------------------------------------------------------------------------------- rewards


class CodeReward:
    """1 where every test passes (`share`: the share that does). Parts: passed (share), all, and how it ended: wrong, no_program, limit
    (time, memory, output), exception, exit. Waits on the sandbox's processes, so `grade` calls it from several threads."""

    parallel = True

    def __init__(self, share: bool = False) -> None:
        self.share = share
        self.__name__ = "code_share" if share else "code"

    def __call__(self, task: Task, trajectory: Trajectory) -> Score | Failure:
        try:
            verdict = judge_reply(task, trajectory.reply, every_case=self.share)
        except sandbox.SandboxError as error:
            return Failure(kind="sandbox", detail=str(error)[:DETAIL])
        return self.score(verdict)

    def score(self, verdict: Verdict) -> Score:
        solved, share = float(verdict.outcome == "passed"), verdict.passed / verdict.total
        kinds = ("wrong", "no_program", "limit", "exception", "exit")
        kind = {**dict.fromkeys(LIMITS, "limit"), "signal": "exit"}.get(verdict.outcome, verdict.outcome)
        parts = {"passed": share, "all": solved, **{name: float(name == kind) for name in kinds}}
        return Score(value=share if self.share else solved, parts=parts)


code = CodeReward()
code_share = CodeReward(share=True)
