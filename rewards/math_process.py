"""Whether a reply's final answer is the gold one: by our own reading where that decides, else by math-verify in a process that is killed.

    gold, reply ─ candidates ─> answers.equal ─ True | False
                                      └─ Unreadable ─> grader pool: math_worker.compare (math-verify, sympy) ─> True | False | Failure

math-verify bounds itself with `signal.alarm`, which raises outside the main thread (every score silently 0 in threads and actors) and
cancels the caller's own alarm. Its timeouts are off here; the pool kills the process instead, and what did not answer is a Failure.
"""

from __future__ import annotations

import importlib.util
import re

from winnow.rewards import grader_pool
from winnow.rewards.answers import equal
from winnow.rewards.extraction import boxed, candidates
from winnow.rewards.latex import Unreadable
from winnow.rollout.schema import Failure

COMPARE = "winnow.rewards.math_worker:compare"
BOUND_S = 5.0  # one comparison by math-verify
LONGEST = 1000  # characters of an answer that math-verify is asked about


def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def gold_answer(text: str) -> str:
    """The final answer in a gold field: in `\\boxed{}`, after `####`, or all of it. Raises ValueError for an empty one."""
    inner = boxed(text)
    found = (inner if inner is not None else text.rsplit("####", 1)[-1]).strip()
    if not found or not re.search(r"[^\s$\\]", found):
        raise ValueError(f"the gold answer {text[-80:]!r} is empty")
    return found


def decide(gold: str, reply: str) -> tuple[bool | None, str]:
    """(verdict or None where sympy is needed, the candidate that was compared; "" where the reply holds no answer)."""
    first = ""
    for candidate in candidates(reply):
        if not candidate.strip(" $*."):
            return False, ""
        first = first or candidate
        try:
            return equal(gold, candidate), candidate
        except Unreadable:
            continue
    return (None, first) if first else (False, "")


def matches(gold: str, reply: str, pool: grader_pool.GraderPool | None = None) -> tuple[bool | Failure, str]:
    """(right, the candidate), or (Failure, ...) where no verdict was reached within BOUND_S. Raises ValueError for an empty gold."""
    answer = gold_answer(gold)
    verdict, candidate = decide(answer, reply)
    if verdict is not None:
        return verdict, candidate
    if len(candidate) > LONGEST:
        return False, candidate  # no gold answer is that long
    return (pool or grader_pool.shared()).call(COMPARE, answer, candidate, seconds=BOUND_S), candidate
