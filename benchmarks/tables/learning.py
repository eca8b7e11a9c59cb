"""Tables on the experiments on learning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .table import Cells, Table


def corpus(record: Any) -> Iterator[Cells]:
    """Yield the files of each split of the corpus, and those that are left out by reason."""
    names = {"train": "trained", "held_out": "held out, by package"}
    for row in record["rows"]:
        yield names[row["split"]], *(f"{row[key]:,}" for key in ("packages", "files", "characters"))
    for reason, number in record["left_out"].items():
        yield f"left out: {reason}", "", f"{number:,}", ""


TABLES = [Table("evidence.md", "| files | packages | number |", corpus, ("corpus_2_cores_2026-11-23",))]
