"""Where in a reply the final answer stands."""

from __future__ import annotations

import re
from collections.abc import Iterator

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
SAID = re.compile(
    r"(?i)(?:final answer|answer|result|solution)\s*(?:is|are|:|=|\*\*:|:\*\*)\s*:?\s*(?:equal to |given by )?(.+)"
)
MATHS = re.compile(r"\$\$([^$]{1,300})\$\$|\$([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", re.DOTALL)
SENTENCE_END = re.compile(r"\.(?=\s|\Z)(?!\s*\d)")
AFTER_VERB = re.compile(r"\s(?:is|are|be|equals?)\s|:\s|=")
SHORT = 80  # characters of a reply that is an answer from its first to its last
MAX_REPLY = 20_000  # only the end of a longer one is read


def boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, found in one pass."""
    starts = {found.end() for found in BOXED.finditer(text)}
    if not starts:
        return None
    open_at: list[int] = []
    last: tuple[int, int] | None = None
    at = min(starts)
    open_at.append(at)
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 2 if text[at + 1 : at + 2] in ("{", "}", "\\") else 1
            continue
        if character == "{":
            open_at.append(at + 1)
        elif character == "}" and open_at:
            start = open_at.pop()
            if start in starts and (last is None or start > last[0]):
                last = (start, at)
        at += 1
    return None if last is None else text[last[0] : last[1]]


def candidates(reply: str) -> Iterator[str]:
    """What may be the answer, the likeliest first: `\\boxed{}`, `####`, "the answer is ...", the last formula, the whole of a short
    reply, its last line. A reply that marks its answer has one candidate only: a wrong one is not searched for another."""
    reply = reply[-MAX_REPLY:].strip()
    found = boxed(reply)
    if found is not None:
        yield found
        return
    if "####" in reply:
        lines = reply.rsplit("####", 1)[1].strip().splitlines()
        yield lines[0] if lines else ""
        return
    said = list(SAID.finditer(reply))
    if said:
        text = said[-1].group(1).strip()
        formula = MATHS.match(text.lstrip("* "))
        if formula:
            text = next(group for group in formula.groups() if group is not None)
        yield SENTENCE_END.split(text, maxsplit=1)[0].strip("* ")
        return
    if len(reply) <= SHORT and "\n" not in reply and "$" not in reply:
        yield reply
    formulas = list(MATHS.finditer(reply))
    if formulas:
        yield next(group for group in formulas[-1].groups() if group is not None)
        return
    lines = [line for line in reply.splitlines() if line.strip()]
    if lines:
        yield lines[-1]
        yield AFTER_VERB.split(lines[-1])[-1]
        number = re.findall(r"-?\d[\d,]*(?:\.\d+|:\d\d)?(?:/\d+)?%?", lines[-1])
        if number:
            yield number[-1]
