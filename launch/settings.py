"""Settings from text: tables read into frozen dataclasses, overrides such as `train.steps=20`, and `I/N`.

The text is from outside. A number must lie in the range that stands with its field, as `Annotated[int, Interval(...)]`;
a text holds no control character and no secret, and one that begins with "~/" is a path below the home directory; what
cannot be read is refused in one line.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import reprlib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..data.ranges import limits_missed
from .redact import CONTROL, redact

T = TypeVar("T")

MAX_BYTES = 2**20
"""Largest TOML file that is read; reading takes time and memory far beyond its size."""
MAX_TEXT = 3_000
"""Maximum number of characters of a text: a path that names more cannot be opened."""
MAX_NAME_BYTES = 200
"""Maximum number of bytes between two slashes of a text; file systems allow 255, of which suffixes take some."""
MAX_DOTS = 100
_MANY_DOTS = re.compile(rf"^(?![ \t]*+#)(?:[^.\n]*+\.){{{MAX_DOTS + 1}}}", re.MULTILINE)


class _Shown(reprlib.Repr):
    """Short text of any value, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 160
        self.maxlist = self.maxdict = 8

    def repr_str(self, x: str, level: int) -> str:
        """Return a quoted text without secrets, cut in the middle if it is long."""
        return super().repr_str(redact(x), level)

    def repr_int(self, x: int, level: int) -> str:
        """Return the digits of an integer, or their number if they are too many to read."""
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 128 else str(x)


shown = _Shown().repr


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises ValueError if it cannot be read, is too large, or is not TOML."""
    if not path.is_file():
        raise ValueError(f"recipe {path}: does not exist; name a TOML file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # one byte more shows that it is too large
    except OSError as error:
        raise ValueError(f"recipe {path}: cannot be read: {error.strerror}; make it readable") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"recipe {path}: has more than {MAX_BYTES} bytes; name a TOML file with settings")
    try:
        return _parse(content.decode())
    except ValueError as error:
        raise ValueError(f"recipe {path}: not valid TOML: {error}; correct the file") from error


def _parse(text: str) -> dict[str, Any]:
    """Return the tables of a text in TOML. Raises ValueError, and no other error, if it cannot be read."""
    # tomllib takes time quadratic in the number of parts of a key.
    if _MANY_DOTS.search(text):
        raise ValueError(f"a line has more than {MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # from int()
        raise ValueError("an integer has too many digits") from None


def from_tree(
    kind: type[T],
    tree: Mapping[str, Any],
    *,
    prefix: str = "",
    source: str = "the recipe",
    overridden: Collection[str] = (),
) -> T:
    """Return the dataclass `kind`, with its nested dataclasses, made from nested tables.

    `prefix` precedes keys in messages and `source` names where the tables are from; the `overridden` keys, as
    `apply_overrides` returns them, are from the command line. Raises ValueError for an unknown key, a missing key, a
    value of another type, or one out of its range.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source}: holds {shown(tree)}: must hold tables")
    if hasattr(kind, "translated"):  # settings that earlier recipes say in other words
        tree = kind.translated(tree)  # type: ignore[attr-defined]
    hints = _hints(kind)
    known = {_key_of(field.name): field for field in fields(kind)}  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            close = difflib.get_close_matches(key[:80], known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else "remove it."
            # It may also be the table of an overridden key.
            is_overridden = any(f"{name}.".startswith(f"{prefix}{key}.") for name in overridden)
            origin = "command line" if is_overridden else source
            raise ValueError(f"{origin}: {prefix}{_key(key)}: unknown key; {advice} Known here: {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, field in known.items():
        name, path, hint = field.name, prefix + key, hints[field.name]
        origin = _source_of(path, source, overridden)
        if is_dataclass(hint):
            table = tree.get(key, {})
            if not isinstance(table, Mapping):
                raise ValueError(f"{origin}: {path} = {shown(table)}: must be a table, such as {{key = 1}}")
            values[name] = from_tree(hint, table, prefix=f"{path}.", source=origin, overridden=overridden)  # type: ignore[arg-type]
        elif key in tree and get_origin(hint) is dict:
            values[name] = _named(get_args(hint)[1], tree[key], path, origin, overridden)  # dict[str, X]: X
        elif key in tree:
            values[name] = _convert(hint, tree[key], f"{origin}: {path}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{origin}: {path}: missing, and it has no default; set it")
    return kind(**values)


def _source_of(path: str, source: str, overridden: Collection[str]) -> str:
    """Return where the value of a dotted key is from: `source`, or the command line if the key is overridden there."""
    return "command line" if path in overridden else source


def to_tree(settings: Any) -> dict[str, Any]:
    """Return a dataclass as the nested tables from which `from_tree` makes it.

    They are as JSON holds them, so that they equal themselves once written and read.
    """
    tree = asdict(settings, dict_factory=lambda values: {_key_of(name): value for name, value in values})
    return json.loads(json.dumps(tree))


def _key_of(name: str) -> str:
    """Return the key of a field: `from`, a word of Python, is the field `from_`."""
    return name.removesuffix("_")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, whose annotations may be strings, with their ranges."""
    return get_type_hints(kind, include_extras=True)


def _named(hint: Any, table: Any, path: str, source: str, overridden: Collection[str]) -> dict[str, Any]:
    """Return the entries of a table whose keys the user chooses; all values have the type `hint`."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{source}: {path} = {shown(table)}: must be a table, such as {{name = 1}}")
    origins = {name: _source_of(f"{path}.{name}", source, overridden) for name in table}
    for name, origin in origins.items():
        if _key(name) != name:
            raise ValueError(f"{origin}: {path}.{_key(name)}: must consist of letters, digits, '-' and '_'; rename it")
        if redact(name) != name:  # records would lack it, and a run continues by the names of sources in its records
            raise ValueError(
                f"{origin}: {path}: has a name that holds a password, a key or a token, by its form or as the value of "
                "an environment variable, and recipes are recorded; rename it, or unset the variable"
            )
    if is_dataclass(hint):
        for name, value in table.items():
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{origins[name]}: {path}.{name} = {shown(value)}: must be a table, such as {{key = 1}}"
                )
        return {
            name: from_tree(hint, value, prefix=f"{path}.{name}.", source=origins[name], overridden=overridden)  # type: ignore[arg-type]
            for name, value in table.items()
        }
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        return {
            name: _named(inner, value, f"{path}.{name}", origins[name], overridden) for name, value in table.items()
        }
    return {name: _convert(hint, value, f"{origins[name]}: {path}.{name}") for name, value in table.items()}


def _key(name: str) -> str:
    """Return a key as a message shows it: as it is if it is a short word, else quoted."""
    return name if re.fullmatch(r"[\w@.-]{1,80}", name) else shown(name)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Return the value if it has the type `hint` and is in its range; an int is taken for a float, a list for a tuple.

    Raises ValueError for any other value, and for a text that holds a secret or a control character.
    """
    if get_origin(hint) is Annotated:
        hint, bounds = get_args(hint)
        # Before the conversion: an integer may be too large for a float.
        if isinstance(value, int | float) and not isinstance(value, bool) and (limits := limits_missed(value, bounds)):
            raise ValueError(f"{path} = {shown(value)}: must be {limits}")
    # A union is one value or a tuple: "grow_p2" or [4, 2, 1]; 0.3 or [[0, 0.2], [1, 0.4]].
    if get_origin(hint) in (Union, UnionType):
        one, several = get_args(hint)
        if isinstance(value, list | tuple):
            return _convert(several, value, path)
        if get_origin(one) is Literal:
            return _chosen(get_args(one), value, path, ", or numbers")
        return _convert(one, value, path)
    if get_origin(hint) is tuple:
        element, *others = get_args(hint)  # tuple[X, ...] has others = [...]
        if others != [...]:
            if not isinstance(value, list | tuple) or len(value) != 1 + len(others):
                raise ValueError(f"{path} = {shown(value)}: must be a list of {1 + len(others)} numbers: [0.5, 0.3]")
            return tuple(map(_convert, get_args(hint), value, [path] * len(value)))
        if not isinstance(value, list | tuple):
            example = _list_example(element, value)
            raise ValueError(
                f"{path} = {shown(value)}: must be a list of {example}; in a shell, put it between single quotes"
            )
        return tuple(_convert(element, item, path) for item in value)
    if get_origin(hint) is Literal:
        return _chosen(get_args(hint), value, path)
    # bool is a subclass of int, but true is not a number here.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path} = {shown(value)}: must be of type {hint.__name__}")
    if isinstance(value, str):
        value = str(Path(value).expanduser()) if value.startswith("~/") else value
        _check_text(value, path)
    return value


def _list_example(element: Any, value: Any) -> str:
    """Return the kind of the elements of a list, and a list of such; words are those of `value`, if it has some."""
    if get_origin(element) is Literal:
        return f"names, such as {json.dumps(get_args(element)[:1])}"
    if element is str:
        words = re.findall(r"[\w.-]{1,40}", redact(str(value)))
        return f"words, such as {json.dumps(words[:8])}"
    return "numbers, such as [1, 2]"


def _chosen(choices: Sequence[Any], value: Any, path: str, more: str = "") -> Any:
    """Return the value if it is one of the choices, of the same type. Raises ValueError if it is not."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):  # 1 == True
        raise ValueError(f"{path} = {shown(value)}: must be one of {', '.join(map(repr, choices))}{more}")
    return value


def _check_text(value: str, path: str) -> None:
    """Raise ValueError for a text that cannot be written into one line, or that must not be recorded."""
    if CONTROL.search(value):
        raise ValueError(f"{path} = {shown(value)}: holds a line break or another control character; remove it")
    longest = max(len(part.encode(errors="replace")) for part in value.split("/"))
    if longest > MAX_NAME_BYTES or len(value) > MAX_TEXT:
        raise ValueError(
            f"{path} = {shown(value)}: has {len(value)} characters, {longest} bytes between two slashes: must have at "
            f"most {MAX_TEXT} and {MAX_NAME_BYTES}; shorten it"
        )
    if redact(value) != value:
        raise ValueError(
            f"{path}: holds a password, a key or a token, and recipes are recorded; put it in the environment instead, "
            "as docs/security.md shows"
        )


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set dotted keys in `tree`, in place; return them, for `from_tree`.

    A value is read as TOML; a value that is not TOML is a string, as in `run_directory=runs/b`. Raises ValueError for
    an override without "=" or without a key, and for a value that cannot be read.
    """
    keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        *tables, name = key.strip().split(".")
        if not equals or not name:
            raise ValueError(f"override {shown(override)}: must have the form key=value, such as train.steps=20")
        try:
            value = _parse(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        except ValueError as error:
            raise ValueError(f"override {shown(override)}: {error}; give a simpler value") from None
        table = tree
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(
                    f"override {shown(override)}: {_key(part)} is a value, not a table; leave out what follows it"
                )
        table[name] = value
        keys.append(key.strip())
    return keys


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return values


def parse_part(text: str) -> tuple[int, int]:
    """Return I and N of `I/N`, the I-th of N parts counted from 0. Raises ValueError unless 0 <= I < N."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--part {shown(text)}: must be I/N with 0 <= I < N, such as 0/8")
    return int(found[1]), int(found[2])
