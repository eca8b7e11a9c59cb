"""A document on its way into sequences, the records that are none, and the two splits."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

NO_DOCUMENT = 2**32 - 1
"""Stands for the document of a segment that came from none."""

BadKind = Literal["empty", "broken_json", "missing_field", "wrong_type", "invalid_utf8", "bad_tokens"]

EXAMPLES = 3
"""Bad records of a kind that are remembered by name."""


class Document(NamedTuple):
    """One good record: its number among the input shard's records, its name, its text or token ids, their digest."""

    number: int
    name: str
    content: str | NDArray[np.int64]
    digest: bytes


class BadRecord(NamedTuple):
    """Why a record is left out."""

    kind: BadKind
    detail: str


@dataclass(kw_only=True)
class BadRecords:
    """Bad records by kind: how many, and the first few by name."""

    counts: Counter[BadKind] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def enter(self, name: str, bad: BadRecord) -> None:
        """Count one."""
        self.counts[bad.kind] += 1
        known = self.examples.setdefault(bad.kind, [])
        if len(known) < EXAMPLES:
            known.append(f"{name}: {bad.detail}" if bad.detail else name)

    def check(self, records: int, source: str, max_bad_fraction: float) -> None:
        """Raise ValueError when too many of `records` are bad."""
        bad = self.counts.total()
        if bad > max_bad_fraction * records:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
            first = "; ".join(example for kind in sorted(self.examples) for example in self.examples[kind][:1])
            raise ValueError(
                f"data.sources.{source}: {bad} of {records} records are bad ({kinds}), more than "
                f"data.max_bad_fraction = {max_bad_fraction}. {first}. Repair them, or raise the fraction to leave "
                "them out and counted"
            )
