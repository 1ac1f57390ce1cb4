"""Whether two final answers are the same: numbers, units, tuples, intervals, sets, equations, matrices, words. No sympy, no hang.

    text ─ clean ─> plain marks ─ understand ─> Value ─ equal ─> True | False | Unreadable (then math-verify is asked, in a process)

What counts as the same, where taste decides: units, `x =` and `x \\in` may be left out by one side; a percent sign too (50% is 50 and 0.5,
but 0.5% is not 0.5 unless the gold answer carries the sign); a bare list has no order, a pair in brackets has; an open interval and a
pair are written alike and taken alike; a decimal is its exact value, so 0.333 is not 1/3 and 1.414 is not the root of 2.
"""

from __future__ import annotations

import re
from fractions import Fraction

from winnow.rewards.forms import PLAIN, PREFIX, Equation, Number, Ordered, Unordered, Value, Words, clean, understand
from winnow.rewards.latex import Node, Unreadable, names
from winnow.rewards.values import agree, evaluate, same


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
