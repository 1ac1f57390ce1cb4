"""Rule-based graders of final answers: number, gsm8k, exact, choice, math, reasoning_gym.

All are cheap pure functions of the reply, but for `math`, which may ask sympy in a process of the grader pool. None sets an alarm or a signal handler: they work
in threads, in Ray actors and in the driver alike. Numbers are compared as exact decimals, so 18, 18.0, $18.00 and 1,8e1 are not guesses
about floats.
"""

from __future__ import annotations

import re
from decimal import Decimal

from winnow.rollout.schema import Failure, Score, Task, Trajectory

# A minus counts only where no word or bracket stands before it ("5-3" is 5 and 3); commas only in groups of three ("3,4" is 3 and 4).
NUMBER = re.compile(
    r"(?<![\w)\].])-?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?"
)
MAX_DIGITS = 64  # a longer "number" is no answer and would cost quadratic time


def numbers(text: str) -> list[Decimal]:
    """Every number in the text, in order. Thousands separators, a currency sign and a Unicode minus are understood."""
    found = (match.group().replace(",", "").replace("$", "") for match in NUMBER.finditer(text.replace("\u2212", "-")))
    return [Decimal(number) for number in found if len(number) <= MAX_DIGITS]


def last_number(text: str) -> Decimal | None:
    found = numbers(text)
    return found[-1] if found else None


def gold(task: Task) -> str:
    """The task's answer. Raises ValueError where there is none: a grader without gold would give 0 for ever."""
    if task.answer is None:
        raise ValueError(
            f"task {task.id!r} has no answer, but reward {task.reward!r} compares with one: map the field 'answer'"
        )
    return task.answer


def gold_number(text: str) -> Decimal:
    """The number of a gold answer: after the last `####` where there is one, else the last in the text."""
    number = last_number(text.rsplit("####", 1)[-1])
    if number is None:
        raise ValueError(f"gold answer {text[-80:]!r} holds no number")
    return number


def number(task: Task, trajectory: Trajectory) -> Score:
    """1 where the last number of the reply equals the answer."""
    return verdict(
        last_number(trajectory.reply) == gold_number(gold(task)), found=last_number(trajectory.reply) is not None
    )


def each_number(task: Task, trajectory: Trajectory) -> Score:
    """The share of the answer's numbers that stand at their places among the reply's: the first where the first is asked, and so on."""
    wanted, found = numbers(gold(task)), numbers(trajectory.reply)
    if not wanted:
        raise ValueError(f"gold answer {gold(task)[-80:]!r} holds no number")
    right = sum(a == b for a, b in zip(wanted, found, strict=False)) / len(wanted)
    return Score(value=right, parts={"right": right, "answered": float(bool(found))})


def gsm8k(task: Task, trajectory: Trajectory) -> Score:
    """As `number`; where the reply marks its answer with `####`, that one counts."""
    marked = trajectory.reply.rsplit("####", 1)
    found = numbers(marked[1])[:1] if len(marked) == 2 else numbers(trajectory.reply)[-1:]
    return verdict(found == [gold_number(gold(task))], found=bool(found))


def exact(task: Task, trajectory: Trajectory) -> Score:
    """1 where the reply is the answer, but for the white space around and within it."""
    return verdict(trajectory.reply.split() == gold(task).split())


def choice(task: Task, trajectory: Trajectory) -> Score:
    """1 where the letter that the reply settles on is the answer. `metadata["choices"]`: how many letters there are, 5 by default."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: int(task.metadata.get("choices", 5))]
    found = chosen_letter(trajectory.reply, letters)
    return verdict(found == gold(task).strip().strip("().").upper(), found=found is not None)


def chosen_letter(reply: str, letters: str) -> str | None:
    """The last of: `\\boxed{B}`, `answer is B`; else a reply that opens with the letter; else the last `(B)`, else the last lone letter."""
    some = f"[{letters}{letters.lower()}]"
    patterns = (
        rf"(?i:\\boxed\{{\s*(?:\\text\{{)?|answer\s*(?:is|:)?\s*:?\s*\**)\s*\(?({some})(?![A-Za-z'])",
        rf"\A\s*\(?({some})(?:[).:]|\s*\Z)",
        rf"\(({some})\)",
        rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])",
    )
    for pattern in patterns:
        found = re.findall(pattern, reply)
        if found:
            return found[-1].upper()
    return None


def verdict(right: bool, found: bool = True) -> Score:
    """1 or 0; the part `answered` tells a wrong answer from none at all."""
    return Score(value=float(right), parts={"right": float(right), "answered": float(found)})


def math(task: Task, trajectory: Trajectory) -> Score | Failure:
    """1 where the reply's final answer is the gold one: numbers, LaTeX, intervals, sets, units (`math_process`). Too long is a Failure."""
    from winnow.rewards.math_process import matches

    right, found = matches(gold(task), trajectory.reply)
    return right if isinstance(right, Failure) else verdict(right, found=bool(found))


math.parallel = True  # type: ignore[attr-defined]  # it may wait for a process of the grader pool


def reasoning_gym(task: Task, trajectory: Trajectory) -> Score:
    """What the generator of the task (`metadata["generator"]`, from the package reasoning-gym) gives the reply's answer: 0 to 1.

    The answer is in <answer> tags or \\boxed{}, else the last line. Raises ImportError where the package is not installed.
    """
    from winnow.rewards.gym_tasks import score_answer

    return score_answer(task, trajectory.reply)
