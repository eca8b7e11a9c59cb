"""Tables and heat-maps of tasks and of the gain of context, whole at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..tables import plain_table
from .context import EIGHTHS
from .tasks import DEPTH_BINS

SHADES = " ░▒▓█"
"""Blocks of a heat-map, from 0 to 1."""


def long_context_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what `long_context` has measured; none for nothing."""
    tables = []
    if result.get("tasks"):
        tables += [_task_table(result["tasks"]), *_heat_maps(result["tasks"])]
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


def _heat_maps(entries: list[dict[str, Any]]) -> list[Table]:
    """Return exact match by depth and length of each task that has depths."""
    tables = []
    for name in dict.fromkeys(entry["task"] for entry in entries if entry["by_depth"]):
        chosen = [entry for entry in entries if entry["task"] == name]
        lengths = [f"{entry['length']:,}" for entry in chosen]
        table = plain_table(f"{name}: exact match by depth and length", "depth", *lengths)
        for number in range(DEPTH_BINS):
            cells = []
            for entry in chosen:
                found = [part for part in entry["by_depth"] if part["from"] == number / DEPTH_BINS]
                cells.append(f"{SHADES[round(found[0]['exact'] * 4)] * 3} {found[0]['exact']:4.0%}" if found else "")
            table.add_row(f"<{(number + 1) / DEPTH_BINS:.1%}", *cells)
        tables.append(table)
    return tables


def _context_table(entries: list[dict[str, Any]]) -> Table:
    lengths = [f"{entry['length']:,}" for entry in entries]
    title = "Loss of the last eighth by the eighths visible before it, nats per token"
    table = plain_table(title, "visible", *lengths)
    for number in range(EIGHTHS):
        table.add_row(f"{number}/8", *(f"{entry['losses'][number]:.3f}" for entry in entries))
    table.add_section()
    table.add_row("gain", *(f"{entry['gain']:.3f}" for entry in entries))
    errors = ["" if entry["gain_error"] is None else f"{entry['gain_error']:.3f}" for entry in entries]
    table.add_row("± s.e.", *errors)
    return table


def _long_ppl_table(entries: list[dict[str, Any]]) -> Table:
    table = plain_table("LongPPL, key tokens judged by the model itself", "length", "short", "LongPPL", "key", "tokens")
    for entry in entries:
        ppl = "" if entry["long_ppl"] is None else f"{entry['long_ppl']:.3f}"
        counts = f"{entry['key_tokens']:,}", f"{entry['tokens']:,}"
        table.add_row(f"{entry['length']:,}", f"{entry['short']:,}", ppl, *counts)
    return table
