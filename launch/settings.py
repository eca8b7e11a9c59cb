"""Settings from text: plain tables to frozen dataclasses, strictly, and overrides such as `train.steps=20`."""

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
    """Make a (nested) dataclass of plain tables, strictly: unknown keys, missing keys and wrong types are errors."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ValueError(f"{source}: unknown key {prefix}{key}{hint} Known here: {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        path, hint = prefix + name, hints[name]
        if is_dataclass(hint):
            table = tree.get(name, {})
            if not isinstance(table, Mapping):
                raise ValueError(f"{source}: {path} = {table!r} must be a table")
            values[name] = from_tree(hint, table, prefix=f"{path}.", source=source)  # type: ignore[arg-type]
        elif name in tree and get_origin(hint) is dict:
            values[name] = _named(get_args(hint)[1], tree[name], path, source)
        elif name in tree:
            values[name] = _convert(hint, tree[name], f"{source}: {path}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{source}: {path} is missing")
    return kind(**values)


def _named(hint: Any, table: Any, path: str, source: str) -> dict[str, Any]:
    """The entries of a table whose keys the user chooses, each of one type."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{source}: {path} = {table!r} must be a table")
    if is_dataclass(hint):
        return {name: from_tree(hint, value, prefix=f"{path}.{name}.", source=source) for name, value in table.items()}  # type: ignore[arg-type]
    return {name: _convert(hint, value, f"{source}: {path}.{name}") for name, value in table.items()}


def _convert(hint: Any, value: Any, path: str) -> Any:
    """The value, if it is of the type asked for; an int will do for a float, nothing else is converted.

    Of a name or a list of numbers, TOML's list becomes the tuple.
    """
    if get_origin(hint) in (Union, UnionType):
        name, numbers = get_args(hint)
        if isinstance(value, list | tuple):
            return tuple(_convert(get_args(numbers)[0], number, path) for number in value)
        if isinstance(value, bool) or value not in get_args(name):
            raise ValueError(f"{path} = {value!r} must be one of {', '.join(map(repr, get_args(name)))}, or numbers")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} = {value!r} must be a list of numbers")
        return tuple(_convert(get_args(hint)[0], number, path) for number in value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise ValueError(f"{path} = {value!r} must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.search(r"://[^/\s]*:[^/\s]*@", value):
        raise ValueError(
            f"{path} is an address with a password in it, and recipes are recorded: put the password in the environment"
        )
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path} = {value!r} must be of type {hint.__name__}")
    return value


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set dotted keys in place. A value is read as TOML, and where it is none as a string: `run_directory=runs/b`."""
    for override in overrides:
        key, equals, text = override.partition("=")
        *tables, name = key.strip().split(".")
        if not equals or not name:
            raise ValueError(f"override {override!r} must look like train.steps=20")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = tree
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(f"override {override!r}: {part} is a value, not a table")
        table[name] = value
