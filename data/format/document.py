"""Documents and bad records, as preparation reads them from a source; the names of the two splits."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

NO_DOCUMENT = 2**32 - 1
"""Number that stands for the document of filler, which belongs to no document."""

BadKind = Literal[
    "empty", "broken_json", "broken_csv", "missing_field", "wrong_type", "invalid_utf8", "bad_tokens", "not_tokenized"
]

EXAMPLES = 3
"""Number of bad records of each kind that are kept by name."""


class Document(NamedTuple):
    """One good record."""

    number: int
    """Number of the record in its input shard."""

    name: str
    """File and line, or another name of the record, for messages."""

    content: str | NDArray[np.int64]
    """Text, or token ids [tokens] without BOS, EOS and boundary."""

    digest: bytes
    """BLAKE2b hash of the content, 16 bytes; it decides the split."""

    score: float = 0.0
    """Number in the record's score field; 0 without one."""


class BadRecord(NamedTuple):
    """Reason for which a record is left out."""

    kind: BadKind
    detail: str


@dataclass(kw_only=True)
class BadRecords:
    """Bad records by kind: their number, and the names of the first few."""

    counts: Counter[BadKind] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def enter(self, name: str, bad: BadRecord) -> None:
        """Count one bad record."""
        self.counts[bad.kind] += 1
        known = self.examples.setdefault(bad.kind, [])
        if len(known) < EXAMPLES:
            known.append(f"{name}: {bad.detail}" if bad.detail else name)

    def check(self, records: int, source: str, max_bad_fraction: float) -> None:
        """Raise ValueError if more than `max_bad_fraction` of `records` are bad."""
        bad = self.counts.total()
        if bad > max_bad_fraction * records:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
            first = "; ".join(example for kind in sorted(self.examples) for example in self.examples[kind][:1])
            raise ValueError(
                f"data.max_bad_fraction = {max_bad_fraction}: {bad} of {records} records of source {source!r} are bad "
                f"({kinds}), the first of each kind: {first}; repair them, or raise data.max_bad_fraction to leave "
                "them out"
            )
