"""Tables of several evaluations side by side: a column for each target, whole at 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..report.evaluation_tables import heat_maps, left_out, part_name, short
from ..report.screen import sparkline
from ..tables import plain_table

SIDE_BY_SIDE = 6
"""Most targets in one table; more targets take further tables."""

Result = Mapping[str, Any]
Cell = tuple[str, tuple[str, ...], str]
"""Title of a table, the first cells of a row, and a value."""


def comparison_tables(results: Sequence[Result]) -> list[Table]:
    """Return the targets under their letters, then a table for each kind of number with a column for each target."""
    names = [ascii_uppercase[index] if index < 26 else str(index + 1) for index in range(len(results))]
    tables = [_targets(names, results)]
    for first in range(0, len(results), SIDE_BY_SIDE):
        stop = first + SIDE_BY_SIDE
        tables += _side_by_side(dict(zip(names[first:stop], results[first:stop], strict=True)))
    for name, result in zip(names, results, strict=True):
        tables += heat_maps(result.get("tasks", ()), f"{name}, ")
    return [*tables, *_left_out(dict(zip(names, results, strict=True)))]


def _left_out(results: Mapping[str, Result]) -> list[Table]:
    """Return the table of what is left out, with the letters of the targets; none for nothing."""
    found: dict[tuple[str, str, str], list[str]] = {}  # (task, length, reason) → targets' letters
    for name, result in results.items():
        for row in left_out(result):
            found.setdefault(row, []).append(name)
    table = plain_table("Left out", "targets", "task", "length", "reason", left=("targets", "task", "reason"))
    for (task, length, reason), names in found.items():
        table.add_row(" ".join(names), task, length, escape(reason))
    return [table] if found else []


def _targets(names: Sequence[str], results: Sequence[Result]) -> Table:
    caption = "Bars: loss by position in the longest bucket, on one scale from the lowest to the highest."
    table = plain_table(
        "Targets", "", "target", "step", "loss", "by position", left=("", "target", "by position"), caption=caption
    )
    curves = [[part["loss"] for part in _longest(result)["by_position"]] for result in results]
    ends = [min(map(min, curves)), max(map(max, curves))]
    for name, result, curve in zip(names, results, curves, strict=True):
        # The ends of the common scale come first, and their two bars are cut off.
        bars = sparkline([*ends, *curve], 2 + len(curve))[2:]
        table.add_row(name, escape(result["target"]), f"{result['step']:,}", f"{result['loss']:.3f}", bars)
    return table


def _longest(result: Result) -> Mapping[str, Any]:
    return max(result["buckets"], key=lambda entry: entry["bucket"])


def _side_by_side(results: Mapping[str, Result]) -> list[Table]:
    """Return the tables of some targets by their letters."""
    found: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}  # title → row → letter → value
    for name, result in results.items():
        for title, row, value in _cells(result):
            found.setdefault(title, {}).setdefault(row, {})[name] = value
    tables = []
    for title, rows in found.items():
        heads = _HEADS[title]
        table = plain_table(title, *heads, *results, left=("task", "source"))
        for row, values in rows.items():
            table.add_row(*row, *(values.get(name, "") for name in results))
        tables.append(table)
    return tables


_LOSS = "Held-out loss by bucket, nats per token"
_POSITION = "Held-out loss by bucket and position"
_SOURCE = "Held-out loss by source"
_DOCUMENT = "Held-out loss by length of document"
_EXACT = "Exact match (≥: a lower bound)"
_TASK_LOSS = "Loss of the answers, nats per token"
_GAIN = "Gain of the first time or of a prefix, nats per token"
_CONTEXT = "Loss of the last eighth by the eighths visible before it"
_LONG_PPL = "LongPPL and its number of key tokens"
_HEADS = {
    **{_LOSS: ("bucket",), _POSITION: ("bucket", "position"), _SOURCE: ("source",), _DOCUMENT: ("length",)},
    **{_EXACT: ("task", "length"), _TASK_LOSS: ("task", "length"), _GAIN: ("task", "length")},
    **{_CONTEXT: ("length", "visible"), _LONG_PPL: ("length", "")},
}


def _cells(result: Result) -> Iterator[Cell]:
    """Yield every number that tables of one target show, with its table and row."""
    for entry in result["buckets"]:
        yield _LOSS, (f"{entry['bucket']:,}",), f"{entry['loss']:.3f}"
    yield _LOSS, ("all",), f"{result['loss']:.3f}"
    yield _LOSS, ("unigram",), f"{result['unigram_loss']:.3f}"
    for entry in result["buckets"]:
        for part in entry["by_position"]:
            yield _POSITION, (f"{entry['bucket']:,}", f"<{short(part['to'])}"), f"{part['loss']:.3f}"
    for title, name in ((_SOURCE, "by_source"), (_DOCUMENT, "by_document")):
        for part in result.get(name, ()):
            yield title, (part_name(part),), f"{part['loss']:.3f}"
    for entry in result.get("tasks", ()):
        row, bound = (entry["task"], short(entry["length"])), "≥" if entry["lower_bound"] else ""
        yield _EXACT, row, f"{bound}{entry['exact']:.0%}"
        yield _TASK_LOSS, row, f"{entry['loss']:.3f}"
        if entry["gain"] is not None:
            yield _GAIN, row, f"{entry['gain']:z.3f}"
    for entry in result.get("context", ()):
        length = short(entry["length"])
        for number, loss in enumerate(entry["losses"]):
            yield _CONTEXT, (length, f"{number}/8"), f"{loss:.3f}"
        yield _CONTEXT, (length, "gain"), f"{entry['gain']:z.3f}"
        if entry["gain_error"] is not None:
            yield _CONTEXT, (length, "± s.e."), f"{entry['gain_error']:.3f}"
    for entry in result.get("long_ppl", ()):
        length = short(entry["length"])
        yield _LONG_PPL, (length, "LongPPL"), "" if entry["long_ppl"] is None else f"{entry['long_ppl']:.3f}"
        keys = entry["key_tokens"]
        yield _LONG_PPL, (length, "key"), f"{keys:,}" if keys < 10**7 else f"{keys:.2e}"
