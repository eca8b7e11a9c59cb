"""Where every record and every token went: the books of a preparation, and of each of its input shards."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from .document import EXAMPLES, SPLITS, BadRecords, Split

Rule = Literal["short_document", "remainder", "end_of_input_shard", "near_duplicate"]
"""short_document: all of a document shorter than the smallest bucket. remainder: what a longer one has beyond its last
piece. end_of_input_shard: what did not fill a last chunk. near_duplicate: all of a document like another that stays."""


@dataclass(kw_only=True)
class SplitLedger:
    """The books of one split. A document's tokens are its (input, target) pairs: text tokens plus one for its end."""

    documents: int = 0
    """Documents that came in."""

    tokens: int = 0
    """Tokens that came in."""

    document_lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the floor of the binary logarithm of their tokens."""

    length_tokens: Counter[int] = field(default_factory=Counter)
    """Tokens of those documents."""

    sequences: Counter[int] = field(default_factory=Counter)
    """Sequences written, by bucket length."""

    packed_sequences: int = 0
    """Those of them that were packed of several documents or parts."""

    filler_tokens: int = 0
    """Boundary tokens written that came from no document: they fill the last packed sequence of an input shard."""

    dropped_documents: Counter[Rule] = field(default_factory=Counter)
    """Documents of which nothing was written, by rule."""

    dropped_tokens: Counter[Rule] = field(default_factory=Counter)
    """Tokens not written, by rule."""

    def enter(self, num_pairs: int) -> None:
        """Enter a document that came in."""
        self.documents += 1
        self.tokens += num_pairs
        self.document_lengths[num_pairs.bit_length() - 1] += 1
        self.length_tokens[num_pairs.bit_length() - 1] += num_pairs

    def drop(self, rule: Rule, num_pairs: int, *, whole: bool) -> None:
        """Enter tokens that are not written; `whole` when they are all of their document."""
        self.dropped_tokens[rule] += num_pairs
        self.dropped_documents[rule] += whole

    def sequence_tokens(self) -> int:
        """Return the tokens written, all buckets together, filler included."""
        return sum(length * count for length, count in self.sequences.items())


def _new_splits() -> dict[Split, SplitLedger]:
    return {split: SplitLedger() for split in SPLITS}


@dataclass(kw_only=True)
class Ledger:
    """The books of a preparation: what came in equals what was written plus what a named rule dropped."""

    records: int = 0
    """Records read from the source."""

    bad: BadRecords = field(default_factory=BadRecords)
    """Records that are no documents, by kind."""

    splits: dict[Split, SplitLedger] = field(default_factory=_new_splits)
    """The books of each split."""

    @property
    def documents(self) -> int:
        """Documents that came in."""
        return sum(books.documents for books in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens that came in."""
        return sum(books.tokens for books in self.splits.values())

    def check(self) -> None:
        """Raise AssertionError, for our own mistake, unless everything adds up."""
        assert self.records == self.documents + self.bad.counts.total(), self
        for books in self.splits.values():
            assert books.tokens + books.filler_tokens == books.sequence_tokens() + books.dropped_tokens.total(), books
            assert books.documents == books.document_lengths.total(), books
            assert books.tokens == books.length_tokens.total(), books
            assert books.dropped_documents.total() <= books.documents, books

    def add(self, other: "Ledger") -> None:
        """Add the books of another input shard."""
        self.records += other.records
        self.bad.counts.update(other.bad.counts)
        for kind, names in other.bad.examples.items():
            known = self.bad.examples.setdefault(kind, [])
            known += names[: EXAMPLES - len(known)]
        for split, books in other.splits.items():
            mine = vars(self.splits[split])
            for key, value in vars(books).items():
                # Counter's own += would drop keys whose count is 0.
                mine[key].update(value) if isinstance(value, Counter) else mine.__setitem__(key, mine[key] + value)

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries; JSON turns integer keys into strings."""
        # Not dataclasses.asdict: it rebuilds a Counter from its items, and so counts them.
        return {
            "records": self.records,
            "bad": {"counts": dict(self.bad.counts), "examples": self.bad.examples},
            "splits": {split: dict(vars(books)) for split, books in self.splits.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Ledger":
        """Return the ledger that `to_json` described."""

        def books(entry: dict[str, Any]) -> SplitLedger:
            by_number = ("sequences", "document_lengths", "length_tokens")
            counters = {key: Counter({int(name): count for name, count in entry[key].items()}) for key in by_number}
            counters |= {key: Counter(entry[key]) for key in ("dropped_documents", "dropped_tokens")}
            return SplitLedger(**{**entry, **counters})

        bad = BadRecords(counts=Counter(value["bad"]["counts"]), examples=value["bad"]["examples"])
        return cls(records=value["records"], bad=bad, splits={split: books(value["splits"][split]) for split in SPLITS})
