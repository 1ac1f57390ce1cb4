"""Plain values as JSON and back: what crosses between a program under test and the tests that judge it. Standard library only.

Numbers, texts and containers travel as copies of exactly their base types, so a forged `__eq__`, `__repr__` or `__hash__` stays behind.
Everything else (functions, classes, instances) stays where it is and travels as a reference: `keep` turns an object into a number, `find`
turns a number back into an object or a proxy of it.

    1  "a"  null  [1, 2]          themselves        {"t": [...]}  tuple    {"s": [...]}  set       {"d": [[k, v]]}  dict
    {"i": "0x..."}  large int     {"r": 7}  reference of the program's     {"c": 7}  reference of the tests' (a callback)
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import itertools
from collections.abc import Callable, Iterator
from typing import Any

MAX_DEPTH = 200
MAX_ITEMS = 2_000_000
EXACT_JSON = 1 << 53
TIMES = {kind.__name__: kind for kind in (datetime.date, datetime.datetime, datetime.time)}


class NotPlain(ValueError):
    """A value that cannot travel: too deep, too large, of no known kind."""


def encode(value: Any, keep: Callable[[Any], dict[str, int]] | None = None, depth: int = 0) -> Any:
    """A JSON value. `keep` is asked for everything that is not plain. Raises NotPlain."""
    if value is None or value is True or value is False:
        return value
    if depth > MAX_DEPTH:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, int):
        number = int.__index__(value)
        return number if abs(number) < EXACT_JSON else {"i": hex(number)}
    if isinstance(value, float):
        return float.__pos__(value)  # the base type's, exactly
    if isinstance(value, str):
        return str.__str__(value)

    def items(values: Any) -> list[Any]:
        taken = list(itertools.islice(iter(values), MAX_ITEMS + 1))
        if len(taken) > MAX_ITEMS:
            raise NotPlain(f"more than {MAX_ITEMS} items")
        return [encode(item, keep, depth + 1) for item in taken]

    if isinstance(value, list):
        return items(value)
    for letter, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {letter: items(value)}
    if isinstance(value, dict):
        return {"d": [[encode(k, keep, depth + 1), encode(v, keep, depth + 1)] for k, v in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"b" if isinstance(value, bytes) else "y": bytes(value).hex()}
    if isinstance(value, complex):
        return {"j": [value.real, value.imag]}
    if isinstance(value, range):
        return {"g": [value.start, value.stop, value.step]}
    if isinstance(value, decimal.Decimal):
        return {"D": str(value)}
    if isinstance(value, fractions.Fraction):
        return {"F": [hex(value.numerator), hex(value.denominator)]}
    if type(value) in TIMES.values():
        return {"T": [type(value).__name__, value.isoformat()]}
    if isinstance(value, Iterator | VIEWS):
        return {"n": items(value)}
    if isinstance(value, type) and (name := value.__name__) in vars(builtins) and vars(builtins)[name] is value:
        return {"B": name}
    if keep is None:
        raise NotPlain(f"{type(value).__name__} is no plain value")
    return keep(value)


SEQUENCES: dict[str, type] = {"t": tuple, "s": set, "z": frozenset, "q": collections.deque, "k": type({}.keys())}
VIEWS: Any = type({}.values()) | type({}.items())


def decode(value: Any, find: Callable[[str, int], Any] | None = None, depth: int = 0) -> Any:
    """The value of a JSON value. `find` gets the letter and the number of a reference. Raises NotPlain for anything malformed."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > MAX_DEPTH + 1:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [decode(item, find, depth + 1) for item in value]
    try:
        ((letter, inner),) = value.items()
        if letter in ("r", "c") and find is not None:
            return find(letter, int(inner))
        if letter in ("t", "s", "z", "q", "k", "n"):
            return COLLECT[letter](decode(item, find, depth + 1) for item in inner)
        if letter == "d":
            return {decode(k, find, depth + 1): decode(v, find, depth + 1) for k, v in inner}
        return LEAVES[letter](inner)
    except NotPlain:
        raise
    except Exception as error:
        raise NotPlain(f"malformed value ({type(error).__name__})") from None


COLLECT: dict[str, Callable[[Any], Any]] = {
    "t": tuple,
    "s": set,
    "z": frozenset,
    "q": collections.deque,
    "k": lambda items: dict.fromkeys(items).keys(),
    "n": lambda items: iter(list(items)),
}


def builtin_type(name: str) -> type:
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise NotPlain(f"{name} is no type")
    return found


LEAVES: dict[str, Callable[[Any], Any]] = {
    "i": lambda text: int(text, 16),
    "b": bytes.fromhex,
    "y": bytearray.fromhex,
    "j": lambda pair: complex(*pair),
    "g": lambda three: range(*three),
    "D": decimal.Decimal,
    "F": lambda pair: fractions.Fraction(int(pair[0], 16), int(pair[1], 16)),
    "B": lambda name: builtin_type(name),
    "T": lambda pair: TIMES[pair[0]].fromisoformat(pair[1]),
}
