"""The value of an expression that `latex.py` has read: exact, or to 60 digits, in a bounded time; and whether two agree.

    evaluate(tree, {"x": 3/7}) -> Fraction, or an mpmath number where it is irrational

Two expressions are equal where they agree at several points. Nothing is simplified, so nothing can run away: powers, factorials and
arguments past the bounds below raise Unreadable, and the caller asks a slower judge that can be killed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from winnow.rewards.latex import Node, Unreadable, names

MAX_BITS = 4096  # of an exact number; beyond it 60 digits are kept
MAX_EXPONENT = 10_000
MAX_ARGUMENT = 10**9  # of exponentials, trigonometric functions and factorials
DIGITS = 60
AGREE = Fraction(1, 10**50)  # relative difference of two 60-digit numbers that count as one

_local = threading.local()


def context() -> Any:
    """This thread's 60-digit arithmetic: an mpmath context changes its own precision while it works, so threads cannot share one."""
    if not hasattr(_local, "context"):
        from mpmath.ctx_mp import MPContext

        _local.context = MPContext()
        _local.context.dps = DIGITS
    return _local.context


def evaluate(tree: Node, point: Mapping[str, Fraction]) -> Any:
    """The value at a point: a Fraction, or an mpmath number. Raises Unreadable where it has none or would cost too much."""
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return point[tree[1]]
    mp = context()
    if kind in ("pi", "e", "i", "infinity", "degree"):
        return {"pi": mp.pi, "e": mp.e, "i": mp.j, "infinity": mp.inf, "degree": mp.pi / 180}[kind] * mp.one
    values = [evaluate(part, point) for part in tree[1:]]
    try:
        result = OPERATIONS[kind](mp, *values)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError, ArithmeticError) as error:
        raise Unreadable(f"{kind}: {error}") from error
    if isinstance(result, Fraction):
        if result.numerator.bit_length() + result.denominator.bit_length() > MAX_BITS:
            result = number(mp, result)
    elif mp.isnan(result):
        raise Unreadable("no value")
    return result


def number(mp: Any, value: Any) -> Any:
    """A Fraction as an mpmath number, anything else as it is."""
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def small(mp: Any, value: Any, bound: int = MAX_ARGUMENT) -> Any:
    value = number(mp, value)
    if not abs(value) <= bound:
        raise Unreadable("an argument is too large")
    return value


def raised(mp: Any, base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        power = int(exponent)
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(power) * bits <= MAX_BITS:
            return base**power
    low = small(mp, exponent, MAX_EXPONENT)
    base = number(mp, base)
    if base != 0 and abs(mp.log(abs(base))) > MAX_ARGUMENT:
        raise Unreadable("a power is too large")
    if (
        isinstance(exponent, Fraction)
        and exponent.denominator % 2
        and exponent.denominator > 1
        and mp.im(base) == 0
        and base < 0
    ):
        root = -mp.power(-base, mp.one / exponent.denominator)  # (-8)^(1/3) is -2 in a school book
        return root**exponent.numerator
    return mp.power(base, low)


def square_root(mp: Any, value: Any) -> Any:
    if isinstance(value, Fraction) and value >= 0:
        from math import isqrt

        top, bottom = isqrt(value.numerator), isqrt(value.denominator)
        if top * top == value.numerator and bottom * bottom == value.denominator:
            return Fraction(top, bottom)
    return mp.sqrt(number(mp, value))


def factorial(mp: Any, value: Any) -> Any:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 300:
        from math import factorial as exact

        return Fraction(exact(int(value)))
    return mp.factorial(small(mp, value))


def binomial(mp: Any, n: Any, k: Any) -> Any:
    if not (
        isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= n <= 1000
    ):
        raise Unreadable("a binomial coefficient of other than small whole numbers")
    from math import comb

    return Fraction(comb(int(n), int(k))) if k >= 0 else Fraction(0)


def rounded(mp: Any, value: Any, up: bool) -> Any:
    if isinstance(value, Fraction):
        return Fraction(-((-value.numerator) // value.denominator) if up else value.numerator // value.denominator)
    return mp.ceil(small(mp, value)) if up else mp.floor(small(mp, value))


def over(mp: Any, a: Any, b: Any) -> Any:
    if b == 0:
        raise Unreadable("a denominator is 0")
    return a / b if isinstance(a, Fraction) and isinstance(b, Fraction) else number(mp, a) / number(mp, b)


def both(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(mp: Any, a: Any, b: Any) -> Any:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return operation(a, b)
        return operation(number(mp, a), number(mp, b))

    return apply


def of(name: str, bound: int = MAX_ARGUMENT) -> Callable[..., Any]:
    """mpmath's function of this name, for arguments up to a size."""
    return lambda mp, x: getattr(mp, name)(small(mp, x, bound))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": both(lambda a, b: a + b),
    "-": both(lambda a, b: a - b),
    "*": both(lambda a, b: a * b),
    "/": over,
    "neg": lambda mp, x: -x,
    "^": raised,
    "!": factorial,
    "sqrt": square_root,
    "root": lambda mp, x, n: raised(mp, x, over(mp, Fraction(1), n)),
    "binom": binomial,
    "abs": lambda mp, x: abs(x),
    "floor": lambda mp, x: rounded(mp, x, False),
    "ceil": lambda mp, x: rounded(mp, x, True),
    "log": lambda mp, x: mp.log(number(mp, x)) / mp.log(10),
    "lg": lambda mp, x: mp.log(number(mp, x)) / mp.log(10),
    "ln": lambda mp, x: mp.log(number(mp, x)),
    "exp": of("exp", 10**6),
    **{name: of(name) for name in ["sin", "cos", "tan", "cot", "sec", "csc"]},
    **{name: of(name, 10**6) for name in ["sinh", "cosh", "tanh"]},
    **{name: of(name.replace("arc", "a")) for name in ["arcsin", "arccos", "arctan", "asin", "acos", "atan"]},
}


def same(a: Any, b: Any) -> bool:
    """Whether two values are one number. Raises Unreadable where 60 digits cannot tell."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp = context()
    a, b = number(mp, a), number(mp, b)
    if mp.isinf(a) or mp.isinf(b):
        return bool(a == b)
    size = max(abs(a), abs(b))
    if 0 < size < mp.mpf(10) ** -30 and a != 0 and b != 0:
        raise Unreadable("both are too close to 0 for 60 digits to tell")
    return bool(abs(a - b) <= max(size, mp.one) * number(mp, AGREE))


# Points with both signs, none an integer, so that |x| and x, and floor(x) and x, differ somewhere.
POINTS = tuple(Fraction(a, b) for a, b in ((17, 13), (-23, 7), (5, 11), (-3, 19), (41, 9), (-8, 17), (29, 23)))
ENOUGH = 3


def agree(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value wherever both have one. Raises Unreadable where too few points have."""
    free = sorted(names(a) | names(b))
    if not free:
        return same(evaluate(a, {}), evaluate(b, {}))
    tried = 0
    for shift in range(len(POINTS)):
        point = {name: POINTS[(shift + place) % len(POINTS)] + place // len(POINTS) for place, name in enumerate(free)}
        try:
            left, right = evaluate(a, point), evaluate(b, point)
        except Unreadable:
            continue
        if not same(left, right):
            return False
        tried += 1
    if tried < ENOUGH:
        raise Unreadable("too few points where both have a value")
    return True
