"""Fields of a configuration that carry their own rule, and the checks that read it. No OmegaConf in here.

A field is declared as `lr: float = number(1e-5, low=0, open_low=True)`: default, type and range stand in one line. `check_ranges`
walks a built configuration and raises `ConfigError` for the first value outside its rule; `check_keys` walks a raw mapping against
the dataclasses and names the nearest valid key for one that is unknown.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key, the value, why not, and what to set."""


def number(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """A number in [low, high]; `open_low` / `open_high` exclude the ends. None is allowed where the field's type allows it."""
    rule = {"low": low, "high": high, "open_low": open_low, "open_high": open_high}
    return dataclasses.field(default=default, metadata={"range": rule})


def choice(default: Any, *allowed: Any) -> Any:
    """One of `allowed`."""
    return dataclasses.field(default=default, metadata={"choices": allowed})


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises ConfigError for the first value of the built dataclass `config` that breaks the rule declared beside its field."""
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif isinstance(value, list | tuple) and any(dataclasses.is_dataclass(item) for item in value):
            for number_in_list, item in enumerate(value):
                check_ranges(item, f"{key}.{number_in_list}.")
        elif value is not None:
            _check_value(key, value, field.metadata)


def _check_value(key: str, value: Any, rules: Mapping[str, Any]) -> None:
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(
            f"{key} is {value!r}, but it must be one of {_listed(rules['choices'])}{_nearest(value, rules['choices'])}"
        )
    if "range" in rules:
        rule = rules["range"]
        for one in value if isinstance(value, list | tuple) else (value,):
            below = rule["low"] is not None and (one <= rule["low"] if rule["open_low"] else one < rule["low"])
            above = rule["high"] is not None and (one >= rule["high"] if rule["open_high"] else one > rule["high"])
            if below or above or one != one:
                raise ConfigError(
                    f"{key} is {value!r}, but it must be {_interval(rule)}: set {key} to a value in that range"
                )


def _interval(rule: Mapping[str, Any]) -> str:
    if rule["high"] is None:
        return f"{'>' if rule['open_low'] else '>='} {rule['low']}"
    if rule["low"] is None:
        return f"{'<' if rule['open_high'] else '<='} {rule['high']}"
    return f"in {'(' if rule['open_low'] else '['}{rule['low']}, {rule['high']}{')' if rule['open_high'] else ']'}"


def check_keys(raw: Any, kind: type, prefix: str = "") -> None:
    """Raises ConfigError when the nested mapping `raw` has a key that the dataclass `kind` lacks (naming the nearest valid one), or a
    value of a type that the field cannot take (naming what it takes)."""
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'the configuration'} is {raw!r}, but it must be a section with keys: {_listed(_names(kind))}"
        )
    hints = typing.get_type_hints(kind)
    for name, value in raw.items():
        if name not in hints:
            raise ConfigError(f"unknown key {prefix}{name!s}: {_advice(str(name), prefix, kind)}")
        inner = _dataclass_in(hints[name])
        if inner is None:
            if not _accepts(hints[name], value):
                rules = next(f.metadata for f in dataclasses.fields(kind) if f.name == name)
                raise ConfigError(f"{prefix}{name} is {value!r}, but it must be {_describe(hints[name], rules)}")
            continue
        if typing.get_origin(hints[name]) in (list, tuple):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ConfigError(
                    f"{prefix}{name} is {value!r}, but it must be a list of sections, each with keys of: {_listed(_names(inner))}"
                )
            for number_in_list, item in enumerate(value):
                check_keys(item, inner, f"{prefix}{name}.{number_in_list}.")
        else:
            check_keys(value, inner, f"{prefix}{name}.")


def _advice(name: str, prefix: str, kind: type) -> str:
    """The nearest key of this section; else the nearest leaf anywhere; else the list of what the section holds."""
    here = difflib.get_close_matches(name, _names(kind), n=1, cutoff=0.6)
    if here:
        return f"did you mean {prefix}{here[0]}?"
    if not prefix:
        leaves = list(leaf_names(kind))
        there = difflib.get_close_matches(name, {leaf.rsplit(".", 1)[-1] for leaf in leaves}, n=1, cutoff=0.75)
        if there:
            return f"did you mean {' or '.join(leaf for leaf in leaves if leaf.rsplit('.', 1)[-1] == there[0])}?"
    return f"{prefix.rstrip('.') or 'the top level'} has {_listed(_names(kind))}"


def leaf_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Every key of the dataclass, dotted; a list of sections counts its section once."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = _dataclass_in(hint)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from leaf_names(inner, f"{prefix}{name}.")


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a raw YAML value can become a field of type `hint`. YAML reads 1e-5 as text, so numbers may come as text."""
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_accepts, inner, value))
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _accepts(inner, item) for key, item in value.items()
        )
    if isinstance(hint, types.UnionType):
        return any(_accepts(option, value) for option in typing.get_args(hint))
    if hint is float and isinstance(value, str):
        try:
            float(value)
            return True
        except ValueError:
            return False
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint: Any, rules: Mapping[str, Any]) -> str:
    """What a field accepts, in words for an error message."""
    if "choices" in rules:
        return f"one of {_listed(rules['choices'])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if typing.get_origin(hint) is tuple:
        said = f"a list of {len(typing.get_args(hint))} numbers"
    elif typing.get_origin(hint) is dict:
        said = f"a mapping of names to {'numbers' if typing.get_args(hint)[1] is float else 'names'}"
    else:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        said = " or ".join(words.get(option, str(option)) for option in options)
    return said + (f" {_interval(rules['range'])}" if "range" in rules else "")


def _dataclass_in(hint: Any) -> type | None:
    """The section that a field of this type holds, directly or in a list."""
    candidates = (hint, *typing.get_args(hint))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)


def _nearest(value: Any, allowed: Any) -> str:
    close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
    return f"; did you mean {close[0]}?" if close else ""
