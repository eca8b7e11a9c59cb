"""The reference of all settings, from the dataclasses that read a recipe."""

from __future__ import annotations

import ast
import html
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval
from longring.launch.config import Recipe


def settings_markdown() -> str:
    """Return a section for each table of a recipe, with name, type, range, default and meaning of each setting."""
    return "\n".join(_table(Recipe, ""))


def _table(kind: type, prefix: str) -> Iterator[str]:
    """Yield the lines of the settings of a dataclass, then those of the tables inside it."""
    hints, texts = get_type_hints(kind, include_extras=True), field_docstrings(kind)
    inner = [field for field in fields(kind) if is_dataclass(hints[field.name])]
    own = [field for field in fields(kind) if field not in inner]
    if own:
        title = f"`[{prefix.rstrip('.')}]`" if prefix else "Before the first table"
        yield f"{'###' if prefix.count('.') > 1 else '##'} {title}\n\n{_markdown(kind.__doc__ or '')}\n"
    for field in own:
        key, text = prefix + field.name.removesuffix("_"), texts.get(field.name, "")
        yield f'<h4 id="{key}"><code>{key}</code></h4>\n'
        yield f'<p class="setting">{type_text(hints[field.name])} · {_default(field)}</p>\n\n{text}\n'
    for field in inner:
        yield from _table(hints[field.name], f"{prefix}{field.name}.")


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the text below each field of a dataclass, by the field's name."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            texts[field.target.id] = _markdown(ast.literal_eval(below.value))
    return texts


def _markdown(docstring: str) -> str:
    """Return a docstring as Markdown: `x[i][j]` is an index there, not a reference."""
    return inspect.cleandoc(docstring).replace("][", "]\\[")


def type_text(hint: Any) -> str:
    """Return a type of a setting, with its range, in words, as HTML."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{type_text(inner[0])} {_range(inner[1])}"
    if origin is Literal:
        return "one of " + ", ".join(map(_code, inner))
    if origin in (Union, UnionType):
        return ", or ".join(map(type_text, inner))
    if origin is tuple and inner[1:] == (...,):
        return f"list; each {type_text(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)}; each {type_text(inner[0])}"
    if origin is dict:
        return f"table of names; each {type_text(inner[1])}"
    if is_dataclass(hint):
        return "a table"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[hint]


def _range(bounds: Interval) -> str:
    low = f"from {_number(bounds.ge)}" if bounds.ge is not None else f"above {_number(bounds.gt)}"
    return f"{low} to {_number(bounds.le)}" if bounds.le is not None else f"{low} to below {_number(bounds.lt)}"


def _number(value: Any) -> str:
    """Return an end of a range: large powers of two as such, else its digits."""
    if isinstance(value, int) and value >= 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return f"default {_code(field.default_factory())}"
    return "required" if field.default is MISSING else f"default {_code(field.default)}"


def _code(value: Any) -> str:
    return f"<code>{html.escape(json.dumps(value), quote=False)}</code>"
