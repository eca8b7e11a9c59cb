"""Tables of one evaluation, and heat-maps of its tasks, whole at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..tables import plain_table

SHADES = " ░▒▓█"
"""Blocks of a heat-map, from 0 to 1."""
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
    ranges = [(part["from"], part["to"]) for part in longest["by_position"]]
    buckets = [f"{entry['bucket']:,}" for entry in result["buckets"]]
    by_position = plain_table("The same by position in the context", "position", *buckets)
    parts = [{(p["from"], p["to"]): f"{p['loss']:.3f}" for p in entry["by_position"]} for entry in result["buckets"]]
    for span in ranges:
        by_position.add_row(f"<{short(span[1])}", *(found.get(span, "") for found in parts))
    return [by_bucket, by_position, *parts_tables(result)]


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
    """Return a number of tokens as "512", "4k" or "1M"."""
    for power, unit in ((20, "M"), (10, "k")):
        if tokens >= 1 << power and tokens % (1 << power) == 0:
            return f"{tokens >> power}{unit}"
    return str(tokens)


def long_context_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what `long_context` has measured; none for nothing."""
    tables = []
    if result.get("tasks"):
        tables += [_task_table(result["tasks"]), *heat_maps(result["tasks"])]
    if result.get("context"):
        tables.append(_context_table(result["context"]))
    if result.get("long_ppl"):
        tables.append(_long_ppl_table(result["long_ppl"]))
    if result.get("left_out"):
        table = plain_table("Left out", "task", "length", "reason", left=("task", "reason"))
        for entry in result["left_out"]:
            table.add_row(entry["task"], f"{entry['length']:,}", entry["reason"])
        tables.append(table)
    return tables


def _task_table(entries: list[dict[str, Any]]) -> Table:
    columns = ("task", "length", "exact", "refs", "tokens", "loss", "gain", "margin", "preferred")
    caption = (
        "≥: a lower bound, since other orders of the answer are as right. loss, gain and margin in nats per token. "
        "docs/evaluation.md says what each score is."
    )
    table = plain_table("Tasks", *columns, left=("task",), caption=caption)
    for entry in entries:
        bound = "≥" if entry["lower_bound"] else ""
        shares = [f"{bound}{entry['exact']:.0%}", f"{bound}{entry['references']:.0%}", f"{entry['tokens']:.0%}"]
        nats = ["" if entry[key] is None else f"{entry[key]:.2f}" for key in ("loss", "gain", "margin")]
        preferred = "" if entry["preferred"] is None else f"{entry['preferred']:.0%}"
        table.add_row(entry["task"], f"{entry['length']:,}", *shares, *nats, preferred)
    return table


def heat_maps(entries: Sequence[Mapping[str, Any]], target: str = "") -> list[Table]:
    """Return exact match by depth and length of each task that has depths; titles begin with `target`."""
    tables = []
    for name in dict.fromkeys(entry["task"] for entry in entries if entry["by_depth"]):
        chosen = [entry for entry in entries if entry["task"] == name]
        lengths = [f"{entry['length']:,}" for entry in chosen]
        table = plain_table(f"{target}{name}: exact match by depth and length", "depth", *lengths)
        for first, to in sorted({(part["from"], part["to"]) for entry in chosen for part in entry["by_depth"]}):
            cells = []
            for entry in chosen:
                found = [part for part in entry["by_depth"] if part["from"] == first]
                cells.append(f"{SHADES[round(found[0]['exact'] * 4)] * 3} {found[0]['exact']:4.0%}" if found else "")
            table.add_row(f"<{to:.1%}", *cells)
        tables.append(table)
    return tables


def _context_table(entries: list[dict[str, Any]]) -> Table:
    lengths = [f"{entry['length']:,}" for entry in entries]
    title = "Loss of the last eighth by the eighths visible before it, nats per token"
    table = plain_table(title, "visible", *lengths)
    for number, losses in enumerate(zip(*(entry["losses"] for entry in entries), strict=True)):
        table.add_row(f"{number}/{len(entries[0]['losses'])}", *(f"{loss:.3f}" for loss in losses))
    table.add_section()
    table.add_row("gain", *(f"{entry['gain']:.3f}" for entry in entries))
    errors = ["" if entry["gain_error"] is None else f"{entry['gain_error']:.3f}" for entry in entries]
    table.add_row("± s.e.", *errors)
    return table


def _long_ppl_table(entries: list[dict[str, Any]]) -> Table:
    title = f"LongPPL, key tokens judged by {escape(entries[0].get('judge') or 'the model itself')}"
    table = plain_table(title, "length", "short", "LongPPL", "key", "tokens")
    for entry in entries:
        ppl = "" if entry["long_ppl"] is None else f"{entry['long_ppl']:.3f}"
        counts = f"{entry['key_tokens']:,}", f"{entry['tokens']:,}"
        table.add_row(f"{entry['length']:,}", f"{entry['short']:,}", ppl, *counts)
    return table
