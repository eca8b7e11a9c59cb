"""How `longring inspect` shows what an ordering found."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..format.document import NO_DOCUMENT, SPLITS
from ..format.manifest import Manifest
from ..order.report import FIRST_LINE_TOKENS, REPORT_FILE, first_line

BAR = 30
TITLE = 44
"""Characters of a title that are shown: the record's number and the end of its file's name."""


def show_order(manifest: Manifest, console: Console) -> None:
    """Print what an ordering found: near-duplicates, neighbours, the path, a context's documents."""
    report = json.loads(manifest.store.path(REPORT_FILE, manifest.files[REPORT_FILE]).read_text(encoding="utf-8"))
    assert manifest.order is not None, "of ordered data"
    console.print(f"\n[bold]Ordered by {manifest.order['by']}, mode {manifest.order['mode']}[/bold]")
    how = "by IVF-PQ" if report["approximate"] else "exactly"
    recall = ", ".join(f"{split.replace('_', ' ')} {report['recall'][split]:.1%}" for split in SPLITS)
    console.print(f"Neighbours were searched {how}; recall of the exact ones: {recall}.\n", highlight=False)
    if len(report["sources"]) > 1:
        console.print(_sources_table(report["sources"]))
    console.print(duplicates_table(report["duplicates"]))
    console.print(_neighbors_table(report["neighbors"]))
    path, contexts = report["path"], report["contexts"]
    console.print(_path_table(path))
    console.print(
        f"{path['documents']:,} documents, {path['jumps']:,} jumps, mean cosine of a step "
        f"{path['mean_similarity']:.3f}.\nTwo documents of one context have cosine {contexts['inside']:.3f}, of "
        f"contexts stored next to each other {contexts['across']:.3f};\na context has {contexts['documents']:.1f} "
        "documents.\n",
        highlight=False,
    )
    console.print(_context_table(manifest))


def duplicates_table(found: dict[str, Any]) -> Table:
    """Pairs of neighbours by cosine, and from where on near-duplicates are looked for."""
    table = _table("Pairs of neighbours by cosine", "from", "pairs", "compared", "near-duplicates", "")
    rows = list(zip(found["cosine_from"], found["pairs"], found["sampled"], found["confirmed"], strict=True))
    shown = [row for row in rows if row[1] and (row[3] or row[0] >= 0.8)]
    most = max((row[1] for row in shown), default=1)
    for edge, pairs, sampled, confirmed in shown:
        looked = " all compared" if edge >= found["threshold"] else ""
        bar = "█" * round(BAR * pairs / most)
        table.add_row(f"{edge:.2f}", f"{pairs:,}", f"{sampled}", f"{confirmed / sampled:.0%}", bar + looked)
    chosen = f"{found['threshold']:.2f}" if found["threshold"] <= 1 else "none: no pair was worth it"
    table.caption, table.caption_justify = f"threshold: {chosen}", "left"
    return table


def _sources_table(sources: dict[str, dict[str, int]]) -> Table:
    table = _table("Sources, mixed in the contexts", "source", "documents", "tokens", "near-duplicates", "their tokens")
    for name, counts in sources.items():
        table.add_row(escape(name), *(f"{count:,}" for count in counts.values()))
    return table


def _neighbors_table(entries: Iterable[dict[str, Any]]) -> Table:
    table = _documents_table("Documents and their nearest", "cosine")
    for entry in entries:
        table.add_section()
        table.add_row("", *_described(entry), style="bold")
        for other in entry["neighbors"]:
            table.add_row(f"{other['similarity']:.3f}", *_described(other))
    return table


def _path_table(path: dict[str, Any]) -> Table:
    table = _table("Steps of the path by cosine", "from", "steps", "")
    for edge, count in zip(path["cosine_from"], path["steps"], strict=True):
        if count:
            table.add_row(f"{edge:.2f}", f"{count:,}", "█" * round(BAR * count / max(path["steps"])))
    return table


def _context_table(manifest: Manifest) -> Table:
    """Return the documents of one sequence of the longest bucket that has any: of some, that with the most."""
    bucket = [bucket for bucket in manifest.buckets("train") if bucket.sequences][-1]
    reader = manifest.reader(bucket)
    sample = np.unique(np.linspace(0, bucket.sequences - 1, 16).astype(np.int64))
    number, pieces = max(zip(sample.tolist(), reader.pieces(sample), strict=True), key=lambda entry: len(entry[1]))
    row = reader.read([number])[0]
    table = _documents_table(f"Sequence {number:,} of bucket {bucket.length:,}", "tokens", "from")
    ends = [*pieces[1:, 3].tolist(), bucket.length]
    for (part, record, offset, place), end in zip(pieces.tolist(), ends, strict=True):
        if record == NO_DOCUMENT:
            table.add_row(f"{end - place:,}", "", "filler", "")
            continue
        line = first_line(manifest, row[place : min(end, place + FIRST_LINE_TOKENS)])
        entry = {"title": manifest.origin(part, record), "first_line": line}
        table.add_row(f"{end - place:,}", f"{offset:,}", *_described(entry))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def _documents_table(title: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    table.add_column("document", no_wrap=True)
    table.add_column("first line", style="dim")  # the one that gives way to the console's width
    return table


def _described(entry: dict[str, str]) -> tuple[str, Text]:
    title = entry["title"]
    if len(title) > TITLE:
        record = title.partition(" of ")[0]
        title = f"{record} …{title[len(record) + 2 - TITLE :]}"
    return escape(title), Text(entry["first_line"], no_wrap=True, overflow="ellipsis")
