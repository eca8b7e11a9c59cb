"""Tables on the experiments on learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def _spread(found: Sequence[float | None] | None, form: str) -> str:
    """Return "mean ± deviation" of a spread, "" of none."""
    return " ± ".join(form.format(value) for value in found or () if value is not None)


def related_gains(record: Any) -> Iterator[Cells]:
    """Yield the gain of related documents over others in each order, by their number, also over random order."""
    for line in record["summary"]:
        kinds = {line["arm"]: "gain", f"{line['arm']}, beyond 128 tokens": "later_gain"}
        if line["arm"] != "random":
            kinds[f"{line['arm']}, over random"] = "over_random"
        for name, key in kinds.items():
            yield name, *(_spread(one[key], "{:z.3f}") for one in line["behind"])


def related_losses(record: Any) -> Iterator[Cells]:
    """Yield the losses of documents alone and behind most others in each order, all documents', and copying."""
    for line in record["summary"]:
        most = line["behind"][-1]
        losses = (line["alone"], most["related"], most["other"], line["loss"])
        passed = f"{line['passed']} of {line['seeds']}"
        yield line["arm"], *(_spread(one, "{:.3f}") for one in losses), passed, _spread(line["copying"], "{:z.2f}")


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
    Table("evidence.md", "| order | behind 1 |", related_gains, ("related_prefixes_2_cores_2026-11-24",)),
    Table("evidence.md", "| order | alone |", related_losses, ("related_prefixes_2_cores_2026-11-24",)),
    Table("evidence.md", "| project | lines |", same_job, ("same_job_2_cores_2026-11-23",)),
]
