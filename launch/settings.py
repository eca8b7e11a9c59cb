"""Settings from text: tables read into frozen dataclasses, overrides such as `train.steps=20`, and `I/N`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_tree(kind: type[T], tree: Mapping[str, Any], *, prefix: str = "", source: str = "the recipe") -> T:
    """Return the dataclass `kind`, with its nested dataclasses, made from nested tables.

    `prefix` precedes keys in messages and `source` names where the tables are from. Raises ValueError for an unknown
    key, a missing key or a value of another type.
    """
    hints = get_type_hints(kind)  # annotations are strings here
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else "remove it."
            raise ValueError(f"{source}: {prefix}{key}: unknown key; {advice} Known here: {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        path, hint = prefix + name, hints[name]
        if is_dataclass(hint):
            table = tree.get(name, {})
            if not isinstance(table, Mapping):
                raise ValueError(f"{source}: {path} = {table!r}: must be a table, such as {{key = 1}}")
            values[name] = from_tree(hint, table, prefix=f"{path}.", source=source)  # type: ignore[arg-type]
        elif name in tree and get_origin(hint) is dict:
            values[name] = _named(get_args(hint)[1], tree[name], path, source)
        elif name in tree:
            values[name] = _convert(hint, tree[name], f"{source}: {path}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{source}: {path}: missing, and it has no default; set it")
    return kind(**values)


def _named(hint: Any, table: Any, path: str, source: str) -> dict[str, Any]:
    """Return the entries of a table whose keys the user chooses; all values have the type `hint`."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{source}: {path} = {table!r}: must be a table, such as {{name = 1}}")
    if is_dataclass(hint):
        return {name: from_tree(hint, value, prefix=f"{path}.{name}.", source=source) for name, value in table.items()}  # type: ignore[arg-type]
    return {name: _convert(hint, value, f"{source}: {path}.{name}") for name, value in table.items()}


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Return the value if it has the type `hint`; an int is taken for a float, a list for a tuple.

    Raises ValueError for any other type, and for an address with a password.
    """
    # A union is a name or a tuple of numbers: "grow_p2" or [4, 2, 1].
    if get_origin(hint) in (Union, UnionType):
        name, numbers = get_args(hint)
        if isinstance(value, list | tuple):
            return tuple(_convert(get_args(numbers)[0], number, path) for number in value)
        if isinstance(value, bool) or value not in get_args(name):
            raise ValueError(f"{path} = {value!r}: must be one of {', '.join(map(repr, get_args(name)))}, or numbers")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} = {value!r}: must be a list of numbers, such as [1, 2]")
        return tuple(_convert(get_args(hint)[0], number, path) for number in value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise ValueError(f"{path} = {value!r}: must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    # bool is a subclass of int, but true is not a number here.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.search(r"://[^/\s]*:[^/\s]*@", value):
        raise ValueError(f"{path}: holds a password, and recipes are recorded; put it in the environment instead")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path} = {value!r}: must be of type {hint.__name__}")
    return value


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set dotted keys in `tree`, in place.

    A value is read as TOML; a value that is not TOML is a string, as in `run_directory=runs/b`. Raises ValueError for
    an override without "=" or without a key.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        *tables, name = key.strip().split(".")
        if not equals or not name:
            raise ValueError(f"override {override!r}: must have the form key=value, such as train.steps=20")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = tree
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(f"override {override!r}: {part} is a value, not a table; leave out what follows it")
        table[name] = value


def parse_part(text: str) -> tuple[int, int]:
    """Return I and N of `I/N`, the I-th of N parts counted from 0. Raises ValueError unless 0 <= I < N."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"--part {text}: must be I/N with 0 <= I < N, such as 0/8")
    return int(part), int(parts)
