"""Units behind a number: what they measure and how many of the base unit they are, so that 100 cm is 1 m and 5 cm is not 5 m."""

from __future__ import annotations

import re
from fractions import Fraction

Unit = tuple[str, Fraction]  # (dimension, size in the dimension's base unit)

_BASE: dict[str, dict[str, str | int]] = {
    "length": {
        "m meter metre meters metres": 1,
        "cm centimeter centimetre centimeters centimetres": "1/100",
        "mm millimeter millimetre millimeters millimetres": "1/1000",
        "km kilometer kilometre kilometers kilometres": 1000,
        "in inch inches": "254/10000",
        "ft foot feet": "3048/10000",
        "yd yard yards": "9144/10000",
        "mi mile miles": "1609344/1000",
    },
    "mass": {
        "g gram grams": 1,
        "kg kilogram kilograms": 1000,
        "mg milligram milligrams": "1/1000",
        "lb lbs pound pounds": "45359237/100000",
        "oz ounce ounces": "45359237/1600000",
        "tonne tonnes": 1_000_000,
    },
    "time": {
        "s sec secs second seconds": 1,
        "min mins minute minutes": 60,
        "h hr hrs hour hours": 3600,
        "day days": 86400,
        "week weeks": 604800,
        "year years": 31557600,
    },
    "volume": {"l L liter litre liters litres": 1, "ml mL milliliter millilitre milliliters millilitres": "1/1000"},
    "money": {"dollar dollars usd USD": 1, "cent cents": "1/100"},
    "euro": {"euro euros €": 1},
    "angle": {"° degree degrees deg": 1},
    "percent": {"% percent": 1},
    "area": {"acre acres": 1},
    "units": {"unit units": 1},
}
UNITS: dict[str, Unit] = {
    name: (dimension, Fraction(size))
    for dimension, table in _BASE.items()
    for spelled, size in table.items()
    for name in spelled.split()
}
UNITS["mph"] = ("length/time", UNITS["mile"][1] / 3600)
POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "²": 2, "³": 3, "^2": 2, "^3": 3, "^{2}": 2, "^{3}": 3}
TOKEN = re.compile(r"\s*(°|%|[A-Za-z€]+\.?|\^\{?[23]\}?|²|³|/|\*)")
TAIL = set("°%€²³/*^{}23. ")  # beside letters, what a unit is written with
LONGEST_UNIT = 40
LETTER_NEEDS_SPACE = {name for name in UNITS if len(name) == 1 and name.isalpha()}


def split_unit(text: str) -> tuple[str, Unit | None]:
    """The text before its unit, and the unit; (text, None) where none is known. `x`, `2m` and `3h` are products, `2 m` is a length."""
    first = len(text)
    while first > max(1, len(text) - LONGEST_UNIT) and (text[first - 1].isalpha() or text[first - 1] in TAIL):
        first -= 1
    for start in range(first, len(text)):  # the longest known unit, with something before it
        tail = text[start:]
        if start and ((text[start - 1].isalpha() and tail[:1].isalpha()) or text[start - 1] == "\\"):
            continue
        unit = unit_of(tail)
        if unit is not None:
            if tail.strip() in LETTER_NEEDS_SPACE and not tail[0].isspace():
                continue
            return text[:start].rstrip(), unit
    return text, None


def unit_of(text: str) -> Unit | None:
    """`cm^2`, `square feet`, `km/h`, `miles per hour`, ... as one unit; None where any part of it is unknown."""
    tokens: list[str] = []
    at = 0
    text = text.strip()
    while at < len(text):
        found = TOKEN.match(text, at)
        if not found:
            return None
        tokens.append(found.group(1))
        at = found.end()
    dimension: list[str] = []
    size, sign, power = Fraction(1), 1, 1
    for place, token in enumerate(tokens):
        if token in ("/", "per"):
            if sign == -1 or not dimension:
                return None
            sign = -1
        elif token in ("*", "a"):
            continue
        elif token in POWERS and token[0].isalpha():
            power = POWERS[token]
        elif token in POWERS:
            if not place or tokens[place - 1] not in UNITS:
                return None
        else:
            unit = UNITS.get(token) or UNITS.get(token.rstrip(".")) or UNITS.get(token.lower().rstrip("."))
            if unit is None:
                return None
            following = tokens[place + 1] if place + 1 < len(tokens) else ""
            exponent = sign * (POWERS[following] if following in POWERS and not following[0].isalpha() else power)
            dimension.append(f"{unit[0]}^{exponent}" if exponent not in (1, -1) else "/" * (exponent < 0) + unit[0])
            size, power = size * unit[1] ** exponent, 1
    if not dimension:
        return None
    return "".join(dimension), size
