"""Instructions that a program can verify, in IFEval's format (Zhou et al., arXiv 2311.07911): ids and arguments as the data set writes them.

    row = {"prompt": ..., "instruction_id_list": ["keywords:existence", ...], "kwargs": [{"keywords": [...]}, ...]}

A reply follows the prompt when it follows all of its instructions (`all`, prompt level, strict); the value that a policy is trained on is
the share of them. `loose` also tries the reply without its first line, its last line, and asterisks, as the paper does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from winnow.rewards.alignment import language_consistency
from winnow.rollout.schema import Score, Task, Trajectory

Arguments = Mapping[str, Any]
SCRIPTS = {
    "ru": "cyrillic", "bg": "cyrillic", "uk": "cyrillic", "ar": "arabic", "fa": "arabic", "ur": "arabic", "hi": "devanagari",
    "mr": "devanagari", "ne": "devanagari", "bn": "bengali", "ta": "tamil", "te": "telugu", "kn": "kannada", "pa": "gurmukhi",
    "gu": "gujarati", "th": "thai", "ko": "cjk", "ja": "cjk", "zh": "cjk", "he": "hebrew", "el": "greek",
}  # fmt: skip
CHOICES = ("my answer is yes.", "my answer is no.", "my answer is maybe.")


def compare(count: int, arguments: Arguments, wanted: str, relation: str = "relation") -> bool:
    """`at least` or `less than` the wanted number."""
    bound = int(arguments[wanted])
    said = str(arguments.get(relation) or "at least")
    if said not in ("at least", "less than"):
        raise ValueError(f"the relation is {said!r}, but it must be 'at least' or 'less than'")
    return count >= bound if said == "at least" else count < bound


def occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def paragraphs(text: str, mark: str = r"\*\*\*") -> list[str]:
    return [piece.strip() for piece in re.split(rf"\s?{mark}\s?", text)]


def number_paragraphs(text: str, a: Arguments) -> bool:
    found = paragraphs(text)
    if found and not found[0]:
        found = found[1:]
    if found and not found[-1]:
        found = found[:-1]
    return len(found) == int(a["num_paragraphs"]) and all(found)


def nth_paragraph(text: str, a: Arguments) -> bool:
    found = [piece for piece in re.split(r"\n\n", text) if piece.strip()]
    place = int(a["nth_paragraph"])
    if len(found) != int(a["num_paragraphs"]) or place > len(found):
        return False
    first = re.match(r"\W*(\w+)", found[place - 1])
    return first is not None and first.group(1).lower() == str(a["first_word"]).lower()


def is_json(text: str, a: Arguments) -> bool:
    body = re.sub(r"\A```(?:json|JSON)?\s*|\s*```\Z", "", text.strip())
    try:
        json.loads(body)
        return True
    except (ValueError, RecursionError):
        return False


def in_language(text: str, a: Arguments) -> bool:
    """By script: languages that share one (English and German) are not told apart."""
    return language_consistency(text, SCRIPTS.get(str(a["language"]), "latin")) >= 0.8


def two_responses(text: str, a: Arguments) -> bool:
    found = [piece.strip() for piece in text.split("******")]
    filled = [piece for piece in found if piece]
    return len(filled) == 2 and filled[0] != filled[1] and all(found[1:-1])


def capital_words(text: str, a: Arguments) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w'-]*[^\W\d_][\w'-]*", text))
    return compare(count, a, "capital_frequency", "capital_relation")


def sentences(text: str) -> int:
    return len([piece for piece in re.split(r"(?<=[.!?])[\"')\]]*\s+|\n+", text.strip()) if re.search(r"\w", piece)])


def repeats_prompt(text: str, a: Arguments) -> bool:
    return text.strip().lower().startswith(str(a["prompt_to_repeat"]).strip().lower())


CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": lambda t, a: all(occurrences(t, word) for word in a["keywords"]),
    "keywords:forbidden_words": lambda t, a: not any(occurrences(t, word) for word in a["forbidden_words"]),
    "keywords:frequency": lambda t, a: compare(occurrences(t, a["keyword"]), a, "frequency"),
    "keywords:letter_frequency": lambda t, a: compare(
        t.lower().count(str(a["letter"]).lower()), a, "let_frequency", "let_relation"
    ),
    "language:response_language": in_language,
    "length_constraints:number_sentences": lambda t, a: compare(sentences(t), a, "num_sentences"),
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": lambda t, a: compare(len(re.findall(r"\w+", t)), a, "num_words"),
    "length_constraints:nth_paragraph_first_word": nth_paragraph,
    "detectable_content:number_placeholders": lambda t, a: len(re.findall(r"\[.*?\]", t)) >= int(a["num_placeholders"]),
    "detectable_content:postscript": lambda t, a: (
        re.search(rf"^\s*{re.escape(str(a['postscript_marker']))}", t, re.IGNORECASE | re.MULTILINE) is not None
    ),
    "detectable_format:number_bullet_lists": lambda t, a: (
        len(re.findall(r"^\s*(?:\*[^*]|-)\s*\S", t, re.MULTILINE)) == int(a["num_bullets"])
    ),
    "detectable_format:constrained_response": lambda t, a: any(choice in t.lower() for choice in CHOICES),
    "detectable_format:number_highlighted_sections": lambda t, a: (
        len(re.findall(r"\*\*[^\n*]+\*\*|(?<!\*)\*[^\n*]+\*(?!\*)", t)) >= int(a["num_highlights"])
    ),
    "detectable_format:multiple_sections": lambda t, a: (
        len(re.findall(rf"\s?{re.escape(str(a['section_spliter']))}\s?\d+\s?", t)) >= int(a["num_sections"])
    ),
    "detectable_format:json_format": is_json,
    "detectable_format:title": lambda t, a: re.search(r"<<[^\n<>]*[^\s<>][^\n<>]*>>", t) is not None,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": lambda t, a: t.strip().strip('"').lower().endswith(str(a["end_phrase"]).strip().lower()),
    "startend:quotation": lambda t, a: len(t.strip()) > 1 and t.strip()[0] == '"' == t.strip()[-1],
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": lambda t, a: t.isupper(),
    "change_case:english_lowercase": lambda t, a: t.islower(),
    "punctuation:no_comma": lambda t, a: "," not in t,
}


def follows(text: str, name: str, arguments: Arguments) -> bool:
    """Whether a reply follows one instruction; an empty reply follows none. Raises ValueError for an unknown id or a missing argument."""
    if name not in CHECKS:
        raise ValueError(f"instruction {name!r} is unknown; known are {', '.join(CHECKS)}")
    try:
        return bool(text.strip()) and bool(CHECKS[name](text, arguments))
    except KeyError as error:
        raise ValueError(f"instruction {name!r} has no argument {error}") from error


def loosened(text: str) -> list[str]:
    lines = text.split("\n")
    cut = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    return [*cut, *(piece.replace("*", "") for piece in cut)]


def ifeval(task: Task, trajectory: Trajectory) -> Score:
    """The share of the instructions in `metadata["instructions"]` ([[id, arguments], ...]) followed. Parts: all, loose, and each id."""
    wanted = task.metadata.get("instructions")
    if not wanted:
        raise ValueError(f"task {task.id!r} has no metadata 'instructions', which reward 'ifeval' verifies")
    text = trajectory.reply
    strict = [follows(text, name, arguments) for name, arguments in wanted]
    loose = [any(follows(version, name, arguments) for version in loosened(text)) for name, arguments in wanted]
    parts: dict[str, float] = {}
    for (name, _), met in zip(wanted, strict, strict=True):
        parts[name] = min(parts.get(name, 1.0), float(met))
    return Score(
        value=sum(strict) / len(strict), parts={**parts, "loose": float(all(loose)), "all": float(all(strict))}
    )
