"""Tables of one evaluation, and heat-maps of its tasks, whole at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..tables import plain_table

TERMINAL_COLUMNS = 80
"""Width at which tables are whole; more lengths than fit take further tables."""
SHADES = " ░▒▓█"
"""Cells of a heat-map, from 0 to 1."""
PARTS = {
    "by_source": ("The same by source", "source"),
    "by_document": ("The same by length of document, tokens", "length"),
}
"""Title and first column of the tables of parts of the held-out loss."""


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the held-out loss as two tables: by bucket, and by bucket and range of positions."""
    title = f"Held-out loss of {result['target']} at step {result['step']}, nats per token"
    by_bucket = plain_table(title, "bucket", "cp", "tokens", "unigram", "loss")
    for entry in result["buckets"]:
        losses = f"{entry['unigram_loss']:.3f}", f"{entry['loss']:.3f}"
        by_bucket.add_row(f"{entry['bucket']:,}", str(entry["cp"]), f"{entry['tokens']:,}", *losses)
    by_bucket.add_section()
    by_bucket.add_row("all", "", f"{result['tokens']:,}", f"{result['unigram_loss']:.3f}", f"{result['loss']:.3f}")

    longest = max(result["buckets"], key=lambda entry: entry["bucket"])
    rows = {(part["from"], part["to"]): f"<{short(part['to'])}" for part in longest["by_position"]}  # it has all ranges
    columns = [
        (short(entry["bucket"]), {(part["from"], part["to"]): f"{part['loss']:.3f}" for part in entry["by_position"]})
        for entry in result["buckets"]
    ]
    by_position = by_length("The same by position in the context", "position", rows, columns)
    return [by_bucket, *by_position, *parts_tables(result)]


def by_length(
    title: str, head: str, rows: Mapping[Any, str], columns: Sequence[tuple[str, Mapping[Any, str]]]
) -> list[Table]:
    """Return tables that are whole at TERMINAL_COLUMNS, with as many lengths in each as fit.

    `rows` are the first cells by the key of the row, and `columns` are (head, cells by the key of the row).
    """
    width_of_names = max(map(len, [head, *rows.values()]))
    width = max(len(text) for name, cells in columns for text in (name, *cells.values()))
    at_once = (TERMINAL_COLUMNS - 2 - width_of_names) // (width + 2)  # one space at each end, two between columns
    tables = []
    for first in range(0, len(columns), at_once):
        chosen = columns[first : first + at_once]
        table = plain_table(title if not first else f"{title}, continued", head, *(name for name, _ in chosen))
        for key, name in rows.items():
            if any(key in cells for _, cells in chosen):
                table.add_row(name, *(cells.get(key, "") for _, cells in chosen))
        tables.append(table)
    return tables


def parts_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the losses by source and by length of document, as far as there are such."""
    return [table for name in PARTS for table in _parts_table(result, name)]


def _parts_table(result: Mapping[str, Any], name: str) -> list[Table]:
    """Return the table of the losses by source or by length of document, if there are such."""
    title, column = PARTS[name]
    entries = result.get(name, ())
    table = plain_table(title, column, "tokens", "loss", left=("source",))
    for entry in entries:
        table.add_row(part_name(entry), f"{entry['tokens']:,}", f"{entry['loss']:.3f}")
    return [table] if entries else []


def part_name(entry: Mapping[str, Any]) -> str:
    """Return the name of a source, or the greatest length of documents as "≤512"."""
    return escape(entry["source"]) if "source" in entry else f"≤{short(entry['to'])}"


def short(tokens: int) -> str:
    """Return a number of tokens as "512", "4k", "1M" or "1G"."""
    for power, unit in ((30, "G"), (20, "M"), (10, "k")):
        if tokens >= 1 << power and tokens % (1 << power) == 0:
            return f"{tokens >> power}{unit}"
    return str(tokens)


def long_context_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what `long_context` has measured; none for nothing."""
    tables = []
    if result.get("tasks"):
        tables += [_task_table(result["tasks"]), *heat_maps(result["tasks"])]
    if result.get("context"):
        tables += _context_tables(result["context"])
    if result.get("long_ppl"):
        tables.append(_long_ppl_table(result["long_ppl"]))
    return tables


def left_out(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the task or "all", the length and the reason of each part that an evaluation has left out."""
    rows = [(entry.get("task", "all"), short(entry["length"]), entry["reason"]) for entry in result.get("left_out", ())]
    return rows + ([("the rest", "", result["cut_short"])] if "cut_short" in result else [])


def left_out_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the table of what an evaluation has left out, with the reasons; none for nothing."""
    rows = left_out(result)
    table = plain_table(
        f"Left out at step {result.get('step', 0):,}", "task", "length", "reason", left=("task", "reason")
    )
    for task, length, reason in rows:
        table.add_row(task, length, escape(reason))
    return [table] if rows else []


def _task_table(entries: list[dict[str, Any]]) -> Table:
    columns = ("task", "length", "exact", "refs", "tokens", "loss", "gain", "margin", "prefer")
    caption = (
        "≥: a lower bound, since other orders of the answer are as right. loss, gain and margin in nats per token. "
        "docs/evaluation.md says what each score is."
    )
    table = plain_table("Tasks", *columns, left=("task",), caption=caption)
    for entry in entries:
        bound = "≥" if entry["lower_bound"] else ""
        shares = [f"{bound}{entry['exact']:.0%}", f"{bound}{entry['references']:.0%}", f"{entry['tokens']:.0%}"]
        nats = ["" if entry[key] is None else f"{entry[key]:z.2f}" for key in ("loss", "gain", "margin")]
        preferred = "" if entry["preferred"] is None else f"{entry['preferred']:.0%}"
        table.add_row(entry["task"], short(entry["length"]), *shares, *nats, preferred)
    return table


def heat_maps(entries: Sequence[Mapping[str, Any]], target: str = "") -> list[Table]:
    """Return exact match by depth and length of each task that has depths; titles begin with `target`."""
    tables = []
    for name in dict.fromkeys(entry["task"] for entry in entries if entry["by_depth"]):
        chosen = [entry for entry in entries if entry["task"] == name]
        depths = sorted({(part["from"], part["to"]) for entry in chosen for part in entry["by_depth"]})
        rows = {depth: f"<{depth[1]:.1%}" for depth in depths}
        columns = [
            (short(entry["length"]), {(p["from"], p["to"]): _shaded(p["exact"]) for p in entry["by_depth"]})
            for entry in chosen
        ]
        tables += by_length(f"{target}{name}: exact match by depth and length", "depth", rows, columns)
    return tables


def _shaded(share: float) -> str:
    return f"{SHADES[round(share * 4)] * 2} {share:4.0%}"


def _context_tables(entries: list[dict[str, Any]]) -> list[Table]:
    eighths = len(entries[0]["losses"])
    rows = {number: f"{number}/{eighths}" for number in range(eighths)} | {"gain": "gain", "gain_error": "± s.e."}
    columns = []
    for entry in entries:
        # By key of the row: the number of visible eighths, or a name.
        numbers = dict(enumerate(entry["losses"])) | {key: entry[key] for key in ("gain", "gain_error")}
        # z: what rounds to 0 has no minus.
        columns.append((short(entry["length"]), {key: f"{n:z.3f}" for key, n in numbers.items() if n is not None}))
    title = "Loss of the last eighth by the eighths visible before it, nats per token"
    return by_length(title, "visible", rows, columns)


def _long_ppl_table(entries: list[dict[str, Any]]) -> Table:
    title = f"LongPPL, key tokens judged by {escape(entries[0].get('judge') or 'the model itself')}"
    table = plain_table(title, "length", "short", "LongPPL", "key", "tokens")
    for entry in entries:
        ppl = "" if entry["long_ppl"] is None else f"{entry['long_ppl']:.3f}"
        counts = f"{entry['key_tokens']:,}", f"{entry['tokens']:,}"
        table.add_row(short(entry["length"]), short(entry["short"]), ppl, *counts)
    return table
