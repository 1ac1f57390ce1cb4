"""Whether two final answers are the same: numbers, units, tuples, intervals, sets, equations, matrices, words. No sympy, no hang.

    text ─ clean ─> plain marks ─ understand ─> Value ─ equal ─> True | False | Unreadable (then math-verify is asked, in a process)

What counts as the same, where taste decides: units, `x =` and `x \\in` may be left out by one side; a percent sign too (50% is 50 and 0.5,
but 0.5% is not 0.5 unless the gold answer carries the sign); a bare list has no order, a pair in brackets has; an open interval and a
pair are written alike and taken alike; a decimal is its exact value, so 0.333 is not 1/3 and 1.414 is not the root of 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from winnow.rewards.latex import Node, Unreadable, agree, evaluate, names, read, same
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


# --------------------------------------------------------------------------------------------------------------------- comparison


def equal(gold: str, answer: str) -> bool:
    """Whether the answer is the gold one. Raises Unreadable where this file cannot tell."""
    if PLAIN.fullmatch(gold) and PLAIN.fullmatch(answer):  # the common case, ten times as fast
        return Fraction(gold.replace(",", "")) == Fraction(answer.replace(",", ""))
    wanted, found = clean(gold), clean(answer)
    if not wanted:
        raise Unreadable("the gold answer is empty")
    if squeezed(wanted) == squeezed(found):
        return True
    left = understand(wanted)
    if not isinstance(left, Equation) and "=" in found and not PREFIX.match(found):
        found = found.rsplit("=", 1)[1]  # 7 + 5 = 12: what comes last
    return equal_values(left, understand(found))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def equal_values(gold: Value, found: Value) -> bool:
    if isinstance(gold, Number) and isinstance(found, Number):
        return equal_numbers(gold, found)
    if isinstance(gold, Words) or isinstance(found, Words):
        return equal_words(gold, found)
    if isinstance(gold, Equation) and isinstance(found, Equation):
        return equal_equations(gold, found)
    if isinstance(gold, Ordered) and isinstance(found, Ordered):
        return equal_ordered(gold, found)
    if isinstance(gold, Unordered | Ordered) and isinstance(found, Unordered | Ordered):
        return equal_collections(gold, found)
    if isinstance(gold, Unordered) != isinstance(found, Unordered):  # a set of one is written without braces by some
        one, other = (gold, found) if isinstance(gold, Unordered) else (found, gold)
        assert isinstance(one, Unordered)
        distinct = matched(one.items, one.items[:1]) if len(one.items) > 1 else None
        return len(one.items) == 1 and distinct is None and equal_values(one.items[0], other)
    if isinstance(gold, Equation) or isinstance(found, Equation):
        raise Unreadable("an equation beside a value")
    return False


def equal_words(gold: Value, found: Value) -> bool:
    if isinstance(gold, Words) and isinstance(found, Words):
        a, b = gold.text, found.text
        if " in base " in a and " in base " in b:
            return a == b
        return a == b or re.sub(r"^(?:the|an?) ", "", a) == re.sub(r"^(?:the|an?) ", "", b)
    words, other = (gold, found) if isinstance(gold, Words) else (found, gold)
    assert isinstance(words, Words)
    if " in base " in words.text and isinstance(other, Number):  # 1011_2 written without its base
        digits = words.text.split(" in base ")[0]
        return digits.isdigit() and not names(other.tree) and same(evaluate(other.tree, {}), Fraction(int(digits)))
    if isinstance(other, Number) and other.tree[0] == "name":
        return words.text == other.tree[1].lower()
    return False


def equal_numbers(gold: Number, found: Number) -> bool:
    if gold.name and found.name and gold.name != found.name and len(gold.name) == len(found.name) == 1:
        return False
    if gold.unit is None and found.unit is None:
        return agree(gold.tree, found.tree)
    if gold.unit and found.unit:
        dimension, size = gold.unit
        if dimension != found.unit[0]:
            return False
        return agree(scaled(gold.tree, size), scaled(found.tree, found.unit[1]))
    unit = gold.unit or found.unit
    assert unit is not None
    if unit[0] == "percent":
        return equal_percent(gold, found)
    if agree(gold.tree, found.tree):
        return True
    if unit[0] == "angle":  # one side in degrees, the other in radians
        turned = [scaled(n.tree, Fraction(1)) if n.unit is None else ("*", n.tree, ("degree",)) for n in (gold, found)]
        return agree(turned[0], turned[1])
    return False


def equal_percent(gold: Number, found: Number) -> bool:
    """One side carries the sign. The gold one: n and n/100 both count. The reply's: n/100, or n where the gold answer is above 1."""
    if agree(*(("/", n.tree, ("number", Fraction(100))) if n.unit else n.tree for n in (gold, found))):
        return True
    if not agree(gold.tree, found.tree):
        return False
    value = evaluate(gold.tree, {}) if not names(gold.tree) else None
    return gold.unit is not None or (isinstance(value, Fraction) and abs(value) > 1)


def scaled(tree: Node, size: Fraction) -> Node:
    return tree if size == 1 else ("*", tree, ("number", size))


def equal_ordered(gold: Ordered, found: Ordered) -> bool:
    if "named" in (gold.brackets, found.brackets):
        if gold.brackets == found.brackets:
            by_name = {item.name: item for item in found.items if isinstance(item, Number)}
            return len(gold.items) == len(found.items) and all(
                isinstance(item, Number) and item.name in by_name and equal_numbers(item, by_name[item.name])
                for item in gold.items
            )
    elif gold.brackets != found.brackets and not vectors(gold, found):
        return False
    first, second = flat(gold), flat(found)
    return len(first) == len(second) and all(equal_values(a, b) for a, b in zip(first, second, strict=True))


def flat(value: Ordered) -> tuple[Value, ...]:
    """Its items; a matrix of one column is a vector."""
    if value.brackets != "matrix":
        return value.items
    rows = [row.items for row in value.items if isinstance(row, Ordered)]
    return tuple(row[0] for row in rows) if all(len(row) == 1 for row in rows) else value.items


def vectors(a: Ordered, b: Ordered) -> bool:
    """A column vector against a tuple of the same length."""
    kinds = {a.brackets, b.brackets}
    return kinds == {"matrix", "()"} and all(not isinstance(item, Ordered) for item in (*flat(a), *flat(b)))


def equal_collections(gold: Unordered | Ordered, found: Unordered | Ordered) -> bool:
    if isinstance(gold, Ordered) or isinstance(found, Ordered):
        listed, other = (gold, found) if isinstance(gold, Unordered) else (found, gold)
        assert isinstance(listed, Unordered) and isinstance(other, Ordered)
        if other.brackets == "named":
            return False
        return len(listed.items) == 1 and equal_values(listed.items[0], other)
    if "union" in (gold.kind, found.kind) and gold.kind != found.kind:
        intervals = any(isinstance(item, Ordered) for item in (*gold.items, *found.items))
        if not intervals:
            return False
    return matched(gold.items, found.items)


def matched(gold: tuple[Value, ...], found: tuple[Value, ...]) -> bool:
    """Whether each item of one is in the other, both ways: repeats do not count in sets."""
    return all(any(equal_values(a, b) for b in found) for a in gold) and all(
        any(equal_values(a, b) for a in gold) for b in found
    )


def equal_equations(gold: Equation, found: Equation) -> bool:
    """Equal up to a constant factor: 2x + 4y = 6 and x + 2y = 3."""
    first, second = ("-", gold.left, gold.right), ("-", found.left, found.right)
    if names(first) != names(second):
        return False
    point = {name: Fraction(7 + 4 * place, 5 + place) for place, name in enumerate(sorted(names(first)))}
    a, b = evaluate(first, point), evaluate(second, point)
    if a == 0 or b == 0:
        raise Unreadable("the point lies on the curve")
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        raise Unreadable("an equation with irrational numbers")
    return agree(scaled(first, b), scaled(second, a))
