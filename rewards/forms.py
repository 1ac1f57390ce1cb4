"""What the text of a final answer says: a number with its unit, a tuple, an interval, a set, an equation, a matrix, words.

    text ─ clean ─> plain marks ─ understand ─> Value

`answers.py` compares two of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from winnow.rewards.latex import Node, Unreadable, names, read
from winnow.rewards.units import Unit, split_unit

MAX_TEXT = 1000
MAX_ITEMS = 24


@dataclass(frozen=True)
class Number:
    tree: Node
    unit: Unit | None = None
    name: str = ""  # the x of `x = 3`


@dataclass(frozen=True)
class Ordered:
    """A pair, a point, a vector or an interval: its brackets count."""

    brackets: str
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Unordered:
    """A set, a list without brackets, a union: `kind` is 'set', 'list' or 'union'."""

    kind: str
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Equation:
    left: Node
    right: Node


@dataclass(frozen=True)
class Words:
    text: str


Value = Number | Ordered | Unordered | Equation | Words

REPLACED = (
    (r"\\(?:left|right|bigg?|Bigg?|displaystyle|textstyle|limits|mathopen|mathclose)(?![A-Za-z])", ""),
    (r"\\(?:[dtc]frac)(?![A-Za-z])", r"\\frac"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|mathit|rm|bf)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\mathbb\s*\{?([A-Z])\}?", r" \1 "),
    (r"(?<!\\)\\(?:[,;:!> ]|q?quad(?![A-Za-z]))", " "),
    (r"\\\$\s*(\d[\d,]*(?:\.\d+)?|\.\d+)", r" \1 dollars"),
    (r"\{,\}", ","),
    (r"\\(?:cdot|times)(?![A-Za-z])|[\u00d7\u00b7\u22c5]", "*"),
    (r"\\div(?![A-Za-z])|\u00f7|\u2215|\u2044", "/"),
    (r"[\u2212\u2013\u2012]", "-"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])|\u00ba", "°"),
    (r"\\%", "%"),
    (r"\\\$|\$|\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\](?!\[)", " "),
    (r"\u03c0", r"\\pi "),
    (r"\u221e", r"\\infty "),
    (r"\u221a\s*\(", r"\\sqrt("),
    (r"\u221a\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"\u222a|\\bigcup(?![A-Za-z])", r"\\cup "),
    (r"\u2208", r"\\in "),
    (r"\\leq(?:slant)?(?![A-Za-z])|\\le(?![A-Za-z])|\u2264|<=", "≤"),
    (r"\\geq(?:slant)?(?![A-Za-z])|\\ge(?![A-Za-z])|\u2265|>=", "≥"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\pm(?![A-Za-z])|\+/-|\\mp(?![A-Za-z])", "±"),
    (r"\\(?:varnothing|emptyset)(?![A-Za-z])|\u2205|\\\{\s*\\\}", "∅"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:mid|vert)(?![A-Za-z])", "|"),
    (r"\\(?:langle|lang)(?![A-Za-z])", "("),
    (r"\\(?:rangle|rang)(?![A-Za-z])", ")"),
    (r"\u00b2", "^2"),
    (r"\u00b3", "^3"),
    (r"\\(?:ldots|dots|cdots)(?![A-Za-z])|\u2026", "..."),
    (r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r"\1"),
    ("~", " "),
)
PATTERNS = tuple((re.compile(pattern), new) for pattern, new in REPLACED)
VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
PLAIN = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,100})(?:\.\d{1,100})?")
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
PREFIX = re.compile(
    r"\s*([A-Za-z](?:_\{?\w+\}?)?(?:\s*\(\s*[a-z]\s*\))?|\\[a-z]+)\s*(=|\\in(?![A-Za-z])|∈|:(?=\s*-?\d))\s*(?!=)"
)
MATRIX = re.compile(r"\s*\\begin\{([pbvB]?)matrix\}(.*)\\end\{\1matrix\}\s*\Z", re.DOTALL)
BASE = re.compile(r"\s*(\w+)_\{?\(?(\d+)\)?\}?\s*\Z")
NOTHING = re.compile(r"\s*(?:∅|no (?:real )?solutions?|none|empty set|the empty set)\s*\Z", re.IGNORECASE)
EVERYTHING = re.compile(r"\s*(?:R|all real numbers?|all reals?|the real numbers)\s*\Z")
APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])|\u2248")  # what follows is not the answer but its size
FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc")
INEQUALITY = re.compile(r"([<>≤≥])")
OPEN, CLOSE = "([{", ")]}"


def clean(text: str) -> str:
    """Marks of one meaning made one: LaTeX spacing and sizes dropped, `\\dfrac` and the like unified, Unicode signs spelled out."""
    if len(text) > MAX_TEXT:
        raise Unreadable(f"{len(text)} characters are no final answer")
    for sign, plain in VULGAR.items() if not text.isascii() else ():
        text = re.sub(rf"(\d?)\s*{sign}", rf"\1 {plain}", text)
    for pattern, new in PATTERNS:
        text = pattern.sub(new, text)
    text = re.sub(r"^\s*\*\*(.*?)\*\*\s*$", r"\1", text.strip())
    text = re.sub(r"\s+", " ", text).strip().strip("\"'`")
    while text and text[-1] in ".;,:" and not text.endswith("..."):
        text = text[:-1].rstrip()
    return text


def split_top(text: str, pattern: str) -> list[str]:
    """The pieces between matches of the pattern that stand outside all brackets."""
    pieces, depth, start, at = [], 0, 0, 0
    compiled = re.compile(pattern)
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in ("{", "}"):
            depth += 1 if text[at + 1] == "{" else -1
            at += 2
            continue
        if text[at] in OPEN:
            depth += 1
        elif text[at] in CLOSE:
            depth -= 1
        found = compiled.match(text, at) if depth == 0 else None
        if found and found.end() > at:
            pieces.append(text[start:at])
            start = at = found.end()
        else:
            at += 1
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces]


def understand(text: str, depth: int = 0) -> Value:
    """The value of a cleaned answer. Raises Unreadable."""
    if depth > 4:
        raise Unreadable("nested too deep")
    text = APPROXIMATELY.split(text, maxsplit=1)[0].strip() or text.strip()
    if not text:
        raise Unreadable("nothing")
    if NOTHING.match(text):
        return Unordered("set", ())
    if EVERYTHING.match(text):
        return understand("(-\\infty,\\infty)", depth + 1)
    if THOUSANDS.fullmatch(re.sub(r"^[-\s]*|[^\d]*$", "", text)):
        text = text.replace(",", "")
    based = BASE.match(text)
    if based and not based.group(1).isalpha():
        return Words(f"{based.group(1)} in base {based.group(2)}")
    listed = split_top(text, r",|;| and | or |\\cup(?![A-Za-z])")
    if len(listed) > 1:
        return several(text, listed, depth)
    matrix = MATRIX.match(text)
    if matrix:
        rows = [row for row in matrix.group(2).split("\\\\") if row.strip()]
        cells = [Ordered("row", tuple(understand(cell, depth + 1) for cell in row.split("&"))) for row in rows]
        return Ordered("matrix", tuple(cells))
    return in_brackets(text, depth) or single(text, depth)


def several(text: str, listed: list[str], depth: int) -> Value:
    """What `a, b` and `A \\cup B` stand for."""
    if len(listed) > MAX_ITEMS:
        raise Unreadable("a long list")
    listed = [re.sub(r"^(?:and|or) ", "", piece) for piece in listed if piece]
    items = tuple(understand(piece, depth + 1) for piece in listed)
    kind = (
        "union"
        if "\\cup" in text or any(isinstance(item, Ordered) and item.brackets == "R" for item in items)
        else "list"
    )
    if all(isinstance(item, Unordered) and item.kind == "set" for item in items) and kind == "union":
        return Unordered("set", tuple(inner for item in items for inner in item.items))  # type: ignore[union-attr]
    if kind == "list" and any(INEQUALITY.search(piece) for piece in listed):
        kind = "union"
    named = [item.name for item in items if isinstance(item, Number) and item.name]
    if len(named) == len(items) == len(set(named)) > 1:  # x = 2, y = 3: a point
        return Ordered("named", items)
    return Unordered(kind, items)


def in_brackets(text: str, depth: int) -> Value | None:
    """A set, pair or interval in brackets; None for an expression that merely begins with one."""
    if text.startswith("\\{") and text.endswith("\\}"):
        opening, inner, closing = "{", text[2:-2], "}"
    elif text[0] in OPEN and text[-1] in CLOSE:
        opening, inner, closing = text[0], text[1:-1], text[-1]
    else:
        return None
    try:
        pieces = split_top(inner, r",|;")
    except IndexError:
        return None
    if opening == "{":
        if closing != "}":
            return None
        return Unordered("set", tuple(understand(piece, depth + 1) for piece in pieces if piece))
    if len(pieces) < 2:
        return None
    items = tuple(understand(piece, depth + 1) for piece in pieces)
    return Ordered(opening + closing, items)


def single(text: str, depth: int) -> Value:
    """A number with or without a unit, an equation, an inequality, or words."""
    prefix = PREFIX.match(text)
    if prefix and not INEQUALITY.search(text):
        rest = text[prefix.end() :]
        if "=" not in rest and rest.strip():
            value = understand(rest, depth + 1)
            if isinstance(value, Number) and prefix.group(2) == "=":
                name = prefix.group(1).split("(")[0].strip()
                return Number(value.tree, value.unit, name)
            return value
    if INEQUALITY.search(text):
        return interval_of(text)
    if text.count("=") == 1:
        left, right = text.split("=")
        return Equation(read(left), read(right))
    if "±" in text:
        plus, minus = (understand(text.replace("±", sign), depth + 1) for sign in "+-")
        return Unordered("list", (plus, minus))
    return measured(text)


def measured(text: str) -> Value:
    """A number with its unit, or words."""
    head, unit = split_unit(text)
    for part, its_unit in ((head, unit), (text, None)):
        try:
            tree = read(part)
        except Unreadable:
            continue
        if its_unit is not None and names(tree):
            continue  # `2x m` is a product
        if its_unit is not None and its_unit[0] == "angle" and FUNCTION.search(part):
            continue  # the degrees belong to the sine
        if re.fullmatch(r"[A-Za-z]{3,}", part) and part.lower() not in ("pi", "inf", "infinity"):
            break
        return Number(tree, its_unit)
    labelled = re.match(r"\s*(.*?[\d})])\s+[A-Za-z][A-Za-z'-]{2,}(?:\s+[A-Za-z][A-Za-z'-]{2,})*\Z", text)
    if labelled:  # 12 apples
        tree = read(labelled.group(1))
        if not names(tree):
            return Number(tree)
    if re.fullmatch(r"[A-Za-z][A-Za-z .'\-]*|\(?[A-Z]\)?|[A-Z][a-z]{2,} \d{1,4}|\d{1,2}:\d\d(?: ?[ap]\.?m\.?)?", text):
        return Words(text.strip("() ").lower())
    raise Unreadable(text[:40])


def interval_of(text: str) -> Value:
    """`x < 3`, `1 < x ≤ 2`: the interval on the number line."""
    parts = [part.strip() for part in INEQUALITY.split(text)]
    if len(parts) == 3:
        left, sign, right = parts
        if re.fullmatch(r"[a-z]", right):
            left, right, sign = right, left, {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}[sign]
        if not re.fullmatch(r"[a-z]", left):
            raise Unreadable("an inequality that is not solved")
        bound: Value = Number(read(right))
        infinity = ("infinity",)
        if sign in "<≤":
            return Ordered("(" + ("]" if sign == "≤" else ")"), (Number(("neg", infinity)), bound))
        return Ordered(("[" if sign == "≥" else "(") + ")", (bound, Number(infinity)))
    if len(parts) == 5 and re.fullmatch(r"[a-z]", parts[2]):
        low, first, _, second, high = parts
        if first in ">≥":
            low, first, second, high = high, {">": "<", "≥": "≤"}[second], {">": "<", "≥": "≤"}[first], low
        if first in "<≤" and second in "<≤":
            brackets = ("[" if first == "≤" else "(") + ("]" if second == "≤" else ")")
            return Ordered(brackets, (Number(read(low)), Number(read(high))))
    raise Unreadable("an inequality that is not solved")
