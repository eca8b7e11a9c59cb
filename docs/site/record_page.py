"""A page for each record of a benchmark: its facts, then its tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_VALUES = 12
"""Most values of a list that a cell shows; of a longer list it shows their number."""


def record_markdown(file: Path) -> str:
    """Return the facts of a record (date, command, machine, versions) and a table for each of its lists of rows."""
    record = json.loads(file.read_text())
    facts = record if isinstance(record, dict) else {"rows": record}
    lines = [f"# {file.name}", "", "The figures of a record as its benchmark wrote them.", ""]
    plain = {name: value for name, value in facts.items() if not _is_nested(value)}
    if plain:
        lines += [*_table([{"fact": name, "value": value} for name, value in plain.items()]), ""]
    for name, value in facts.items():
        if _is_nested(value):
            lines += _section(name, value)
    return "\n".join(lines)


def _section(name: str, value: Any) -> list[str]:
    """Return a heading and the table of a list of rows, or of named rows; of names of such lists, a section each."""
    if isinstance(value, dict) and any(_is_rows(inner) for inner in value.values()):
        return [line for inner, rows in value.items() for line in _section(f"{name}, {inner}", rows)]
    if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        value = [{"": key, **row} for key, row in value.items()]
    if isinstance(value, dict):
        value = [{"": key, "value": inner} for key, inner in _flat(value)]
    if not _is_rows(value):
        value = [{"value": inner} for inner in value]
    return [f"## {name}", "", *_table(value), ""]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    flat = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    return lines + ["| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |" for row in flat]


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a row by name; those of a table inside it have both names."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def _cell(value: Any) -> str:
    if isinstance(value, list):
        short = len(value) <= MAX_VALUES and not any(isinstance(inner, list) for inner in value)
        return ", ".join(map(_cell, value)) if short else f"{len(value)} values"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(row, dict | list) for row in value))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
