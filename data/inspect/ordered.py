"""The report of an ordering as `longring inspect` prints it."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..format.document import NO_DOCUMENT, SPLITS
from ..format.first_line import FIRST_LINE_TOKENS, first_line
from ..format.manifest import REPORT_FILE, Manifest
from .tables import bar, make_table, shortened

BAR = 20
"""Characters of the longest bar."""

TITLE = 44
"""Maximum characters of a title; at 80 columns this leaves about 20 for the first line."""


def show_order(manifest: Manifest, console: Console) -> None:
    """Print the near-duplicates, neighbours, path and contexts of ordered data, and the documents of one sequence."""
    report = json.loads(manifest.store.path(REPORT_FILE, manifest.files[REPORT_FILE]).read_text(encoding="utf-8"))
    assert manifest.order is not None, "the data is ordered"
    console.print(f"\n[bold]Ordered by {manifest.order['by']}, mode {manifest.order['mode']}[/bold]")
    how = "by IVF-PQ" if report["approximate"] else "exactly"
    recall = ", ".join(f"{split.replace('_', ' ')} {report['recall'][split]:.1%}" for split in SPLITS)
    console.print(f"Neighbours were searched {how}; recall of the exact ones: {recall}.\n", highlight=False)
    console.print(duplicates_table(report["duplicates"]))
    console.print(neighbors_table(report["neighbors"]))
    path, contexts = report["path"], report["contexts"]
    console.print(_path_table(path))
    console.print(
        f"{path['documents']:,} documents, {path['jumps']:,} jumps, mean cosine of a step "
        f"{path['mean_similarity']:.3f}.\n"
        f"Mean cosine of two documents of one context: {contexts['inside']:.3f}.\n"
        f"Mean cosine of two contexts stored side by side: {contexts['across']:.3f}.\n"
        f"Mean number of documents of a context: {contexts['documents']:.1f}.\n",
        highlight=False,
    )
    console.print(_context_table(manifest))


def duplicates_table(found: dict[str, Any]) -> Table:
    """Return the pairs of neighbours by cosine, with the threshold from which all of them are compared."""
    table = make_table("Pairs of neighbours by cosine", "from", "pairs", "sampled", "near-duplicates", "")
    # [bins][cosine from, pairs, sampled, near-duplicates]
    rows = list(zip(found["cosine_from"], found["pairs"], found["sampled"], found["confirmed"], strict=True))
    # Bins of low cosine hold most pairs and no near-duplicates: they would shrink all other bars to nothing.
    shown = [row for row in rows if row[1] and (row[3] or row[0] >= 0.8)]
    most = max((row[1] for row in shown), default=1)
    for edge, pairs, sampled, confirmed in shown:
        note = " all compared" if edge >= found["threshold"] else ""
        share = f"{confirmed / sampled:.0%}"
        table.add_row(f"{edge:.2f}", f"{pairs:,}", f"{sampled}", share, bar(pairs / most, BAR) + note)
    chosen = f"{found['threshold']:.2f}" if found["threshold"] <= 1 else "none, as too few pairs are near-duplicates"
    table.caption = f"threshold: {chosen}"
    return table


def neighbors_table(entries: Iterable[dict[str, Any]]) -> Table:
    """Return some documents (bold), each followed by its nearest neighbours."""
    table = _documents_table("Documents and their nearest neighbours", "cosine")
    for entry in entries:
        table.add_section()
        table.add_row("", *_described(entry), style="bold")
        for other in entry["neighbors"]:
            table.add_row(f"{other['similarity']:.3f}", *_described(other))
    return table


def _path_table(path: dict[str, Any]) -> Table:
    """Return the histogram of the path's cosines."""
    table = make_table("Steps of the path by cosine", "from", "steps", "")
    for edge, count in zip(path["cosine_from"], path["steps"], strict=True):
        if count:
            table.add_row(f"{edge:.2f}", f"{count:,}", bar(count / max(path["steps"]), BAR))
    return table


def _context_table(manifest: Manifest) -> Table:
    """Return the documents of the sampled sequence of the longest bucket with the most documents."""
    bucket = [bucket for bucket in manifest.buckets("train") if bucket.sequences][-1]
    reader = manifest.reader(bucket)
    sample = np.unique(np.linspace(0, bucket.sequences - 1, 16).astype(np.int64))
    number, pieces = max(zip(sample.tolist(), reader.pieces(sample), strict=True), key=lambda entry: len(entry[1]))
    row = reader.read([number])[0]
    table = _documents_table(f"Sequence {number:,} of bucket {bucket.length:,}", "tokens", "from")
    ends = [*pieces[1:, 3].tolist(), bucket.length]  # a piece ends where the next one begins
    for (input_shard, record, offset, begin), end in zip(pieces.tolist(), ends, strict=True):
        if record == NO_DOCUMENT:
            table.add_row(f"{end - begin:,}", "", "filler", "")
            continue
        line = first_line(manifest, row[begin : min(end, begin + FIRST_LINE_TOKENS)])
        entry = {"title": manifest.origin(input_shard, record), "first_line": line}
        table.add_row(f"{end - begin:,}", f"{offset:,}", *_described(entry))
    return table


def _documents_table(title: str, *numbers: str) -> Table:
    """Return an empty table with columns for numbers, the document's title and its first line."""
    table = make_table(title, *numbers, "document", text=("document",))
    table.add_column("first line", style="dim")  # shortened to the width of the console
    return table


def _described(entry: dict[str, str]) -> tuple[str, Text]:
    """Return the cells of a document: its title in at most TITLE characters, and its first line."""
    title = entry["title"]
    if len(title) > TITLE:
        # The record and the file tell documents apart; the source and the input shard are shown only without a file.
        record, _, origin = title.partition(" of ")
        origin = origin.partition(": ")[2] or origin
        title = f"{record} of {shortened(origin, TITLE - len(record) - len(' of '))}"
    return escape(title), Text(entry["first_line"], no_wrap=True, overflow="ellipsis")
