"""The alignment domain: weighted yes/no criteria per prompt, and the shaping terms of a mixed run (length, budget, language, repetition).

A rubric is a list of `{"type": name, "value": what, "weight": share}` in `task.metadata["rubric"]`. The criteria here are programmatic;
those of the form `{"question": "Is the tone friendly?", "name": "friendly", "weight": 2}` are for a generative judge (judge.py), whose
probability of yes is what they count for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from winnow.rollout.schema import Failure, Group, Score, Task, Trajectory

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """The words of a text, lower-case; digits and marks are none."""
    return [word.lower() for word in WORD.findall(text)]


def num_words(reply: str, value: Any) -> bool:
    """Exactly this many words."""
    return len(words(reply)) == int(value)


def max_words(reply: str, value: Any) -> bool:
    """At least one word and at most this many."""
    return 1 <= len(words(reply)) <= int(value)


def use_word(reply: str, value: Any) -> bool:
    """The word occurs, as a whole word."""
    return str(value).lower() in words(reply)


def avoid_word(reply: str, value: Any) -> bool:
    """The word does not occur, and something was written: silence meets no criterion."""
    found = words(reply)
    return bool(found) and str(value).lower() not in found


def end_mark(reply: str, value: Any) -> bool:
    """The reply ends with this mark and no other before it."""
    text = reply.rstrip()
    return text.endswith(str(value)) and text.removesuffix(str(value)).rstrip()[-1:].isalnum()


def lower_latin(reply: str, value: Any) -> bool:
    """Words only in lower-case Latin letters, and no digits."""
    letters = [character for character in reply if character.isalnum()]
    return bool(letters) and all("a" <= character <= "z" for character in letters)


def language(reply: str, value: Any) -> bool:
    """At least 90 % of the letters in this script, e.g. `latin`, `cyrillic`, `cjk`."""
    return language_consistency(reply, str(value)) >= 0.9


CRITERIA: dict[str, Callable[[str, Any], bool]] = {
    check.__name__: check for check in (num_words, max_words, use_word, avoid_word, end_mark, lower_latin, language)
}


def rubric(task: Task, trajectory: Trajectory) -> Score:
    """The weighted share of the criteria met. One part per criterion (`use_word`, `use_word_2`, ...), and `all`: 1 when all are met.

    Raises ValueError for a task without a rubric, an unknown type, weights that are not positive, and a question, which needs a judge.
    """
    return weigh(task, trajectory.reply, ())


def criteria_of(task: Task) -> Sequence[Mapping[str, Any]]:
    criteria = task.metadata.get("rubric")
    if not criteria:
        raise ValueError(f"task {task.id!r} has no metadata 'rubric', which reward 'rubric' grades by")
    return criteria


def questions_of(task: Task) -> list[str]:
    """What the judge is asked about a reply to this task, in the rubric's order."""
    return [str(criterion["question"]) for criterion in criteria_of(task) if "question" in criterion]


def weigh(task: Task, reply: str, judged: Sequence[float]) -> Score:
    """The rubric's score: programmatic criteria evaluated here, questions with the judge's probabilities of yes, one each, in order."""
    criteria = criteria_of(task)
    if len(judged) != len(questions_of(task)):
        raise ValueError(
            f"task {task.id!r} asks {len(questions_of(task))} questions of a judge, and {len(judged)} were answered: set judge.model to "
            "'policy' or to a model folder"
        )
    parts: dict[str, float] = {}
    answers = iter(judged)
    total = met = 0.0
    for criterion in criteria:
        kind, weight = criterion.get("type"), float(criterion.get("weight", 1.0))
        if "question" not in criterion and kind not in CRITERIA:
            raise ValueError(f"task {task.id!r}: criterion {kind!r} is unknown; known are {', '.join(CRITERIA)}")
        if not weight > 0:
            raise ValueError(f"task {task.id!r}: the weight of criterion {kind!r} is {weight}, but it must be above 0")
        if "question" in criterion:
            kind, fulfilled = str(criterion.get("name", "judge")), float(next(answers))
        else:
            assert isinstance(kind, str)
            fulfilled = float(CRITERIA[kind](reply, criterion.get("value")))
        parts[part_name(kind, parts)] = fulfilled
        total, met = total + weight, met + weight * fulfilled
    return Score(value=met / total, parts={**parts, "all": float(all(part > 0.5 for part in parts.values()))})


def part_name(kind: str, taken: Mapping[str, float]) -> str:
    same = sum(name == kind or (name.startswith(f"{kind}_") and name[len(kind) + 1 :].isdigit()) for name in taken)
    return kind if not same else f"{kind}_{same + 1}"


def soft_overlong(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to max_length - buffer, then linear, -1 from max_length on.

    `length` and `max_length` in generated tokens, 0 <= buffer <= max_length.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(
            f"length penalty: the buffer is {buffer}, but it must be between 0 and max_length {max_length}"
        )
    if length <= max_length - buffer:
        return 0.0
    return -1.0 if length >= max_length else (max_length - buffer - length) / buffer


def language_consistency(text: str, script: str = "latin") -> float:
    """The share of letters written in the script; 1 for a text without letters. CJK counts Han, kana and Hangul."""
    prefixes = {"cjk": ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")}.get(script.lower(), (script.upper(),))
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 1.0
    if prefixes == ("LATIN",):  # the common case without a table look-up per letter
        rest = [character for character in letters if not character.isascii()]
        inside = len(letters) - len(rest) + sum(unicodedata.name(c, "").startswith("LATIN") for c in rest)
    else:
        inside = sum(unicodedata.name(character, "").startswith(prefixes) for character in letters)
    return inside / len(letters)


def repetition(text: str, size: int = 4) -> float:
    """The share of the text's word groups of this size that occurred before in it: 0 for fresh text and for a short one."""
    found = words(text)
    groups = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What a domain's reward loses beside its length penalty. A weight of 0 switches a term off; each term lies in [-weight, 0].

    language: `script` (latin, cyrillic, cjk, ...) should hold all letters; repetition: of groups of four words; budget: generated tokens
    beyond `token_budget`, up to twice as many.
    """

    script: str = "latin"
    language: float = 0.0
    repetition: float = 0.0
    token_budget: int = 0
    budget: float = 0.0

    def terms(self, trajectory: Trajectory) -> dict[str, float]:
        text, terms = trajectory.reply, {}
        if self.language:
            terms["language"] = -self.language * (1 - language_consistency(text, self.script))
        if self.repetition:
            terms["repetition"] = -self.repetition * repetition(text)
        if self.budget and self.token_budget:
            over = trajectory.num_generated / self.token_budget - 1
            terms["budget"] = -self.budget * min(1.0, max(0.0, over))
        return terms


def shape(groups: Sequence[Group], shaping: Mapping[str, Shaping]) -> list[Group]:
    """Graded groups with their domain's terms added, each a part; `outcome` is the reward before any shaping. Failures stay failures."""
    shaped = []
    for group in groups:
        rule = shaping.get(group.request.task.domain)
        if rule is None or rule == Shaping():
            shaped.append(group)
            continue
        scores: list[Score | Failure] = []
        for trajectory, score in zip(group.trajectories, group.scores, strict=True):
            if isinstance(score, Score):
                terms = rule.terms(trajectory)
                parts = {"outcome": score.value, **score.parts, **terms}
                scores.append(Score(value=score.value + sum(terms.values()), parts=parts))
            else:
                scores.append(score)
        shaped.append(replace(group, scores=tuple(scores)))
    return shaped
