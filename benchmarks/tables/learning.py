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


def copying(record: Any) -> Iterator[Cells]:
    """Yield the gain and the right tokens of the first model at each checkpoint, of text and of random tokens."""
    for checkpoint in record["rows"][0]["checkpoints"]:
        scores = {(one["task"], one["length"]): one for one in checkpoint["tasks"]}
        found = [scores[task, length] for task in ("copy_text", "copy_random") for length in (512, 4096)]
        cells = (f"{one['gain']:z.2f}, {one['tokens']:.0%}" for one in found)
        yield f"{checkpoint['tokens'] / 1e6:.1f}M", *cells, f"{checkpoint['loss']:.2f}"


def same_job(record: Any) -> Iterator[Cells]:
    """Yield the lines of each project for the same job, and its seconds or its error with one process and with two."""
    names = {
        "longring": "LongRing",
        "olmo_core": "OLMo-core",
        "megatron_lm": "Megatron-LM",
    }
    for row in record["rows"]:
        runs = [f"{one['seconds']:.0f} s" if "seconds" in one else f"`{one['error']}`" for one in row["runs"]]
        version = row["version"].removeprefix("core_v")
        yield f"{names.get(row['member'], row['member'])} {version}", f"{row['lines']}", *runs


TABLES = [
    Table("evidence.md", "| files | packages | number |", corpus, ("corpus_2_cores_2026-11-23",)),
    Table("evidence.md", "| tokens trained | text, 512 |", copying, ("copying_2_cores_2026-11-23",)),
    Table("evidence.md", "| project | lines |", same_job, ("same_job_2_cores_2026-11-23",)),
]
