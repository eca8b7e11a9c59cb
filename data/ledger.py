"""Where every document and every token went: the books of one preparation."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.table import Table

from .decompose import SPLITS, Piece, Split

Rule = Literal["empty", "shorter_than_min_bucket"]


@dataclass(kw_only=True)
class SplitLedger:
    """The books of one split. A document's tokens are its (input, target) pairs: text tokens plus one for its end."""

    documents: int = 0
    """Documents that came in."""

    tokens: int = 0
    """Tokens that came in."""

    kept_documents: int = 0
    """Documents of which at least one sequence was written."""

    sequences: Counter[int] = field(default_factory=Counter)
    """Sequences written, by bucket length."""

    dropped_documents: Counter[Rule] = field(default_factory=Counter)
    """Documents of which nothing was written, by rule."""

    dropped_tokens: Counter[Rule] = field(default_factory=Counter)
    """Tokens not written, by rule; those of kept documents' tails among them."""

    def sequence_tokens(self) -> int:
        """Return the tokens written, all buckets together."""
        return sum(length * count for length, count in self.sequences.items())


def _new_splits() -> dict[Split, SplitLedger]:
    return {split: SplitLedger() for split in SPLITS}


@dataclass(kw_only=True)
class Ledger:
    """The books of a preparation: what came in equals what was written plus what a named rule dropped."""

    documents_in: int = 0
    """Documents read from the source."""

    tokens_in: int = 0
    """Tokens made of them."""

    replaced_documents: int = 0
    """Documents, all kept, that contain U+FFFD: the mark left where bytes were not valid UTF-8."""

    splits: dict[Split, SplitLedger] = field(default_factory=_new_splits)
    """The books of each split."""

    def record(self, split: Split, num_pairs: int, pieces: list[Piece], *, replaced: bool) -> None:
        """Enter one document: `num_pairs` is 0 for an empty one."""
        self.documents_in += 1
        self.tokens_in += num_pairs
        self.replaced_documents += replaced
        books = self.splits[split]
        books.documents += 1
        books.tokens += num_pairs
        rule: Rule = "shorter_than_min_bucket" if num_pairs else "empty"
        if pieces:
            books.kept_documents += 1
        else:
            books.dropped_documents[rule] += 1
        if rest := num_pairs - sum(piece.length for piece in pieces):
            books.dropped_tokens[rule] += rest
        books.sequences.update(piece.length for piece in pieces)

    def check(self) -> None:
        """Raise AssertionError, for our own mistake, unless everything adds up."""
        assert self.documents_in == sum(books.documents for books in self.splits.values()), self
        assert self.tokens_in == sum(books.tokens for books in self.splits.values()), self
        for books in self.splits.values():
            assert books.documents == books.kept_documents + books.dropped_documents.total(), books
            assert books.tokens == books.sequence_tokens() + books.dropped_tokens.total(), books

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries; JSON turns bucket lengths into strings."""
        # Not dataclasses.asdict: it rebuilds a Counter from its items, and so counts them.
        return {**vars(self), "splits": {split: dict(vars(books)) for split, books in self.splits.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Ledger":
        """Return the ledger that `to_json` described."""

        def books(entry: dict[str, Any]) -> SplitLedger:
            return SplitLedger(
                **{key: entry[key] for key in ("documents", "tokens", "kept_documents")},
                sequences=Counter({int(length): count for length, count in entry["sequences"].items()}),
                dropped_documents=Counter(entry["dropped_documents"]),
                dropped_tokens=Counter(entry["dropped_tokens"]),
            )

        return cls(**{**value, "splits": {split: books(value["splits"][split]) for split in SPLITS}})

    def table(self) -> Table:
        """Return the books as a table whose parts sum to its first row."""
        table = Table(title="Ledger", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        for column in ("documents", "sequences", "tokens", "share"):
            table.add_column(column, justify="right", no_wrap=True)

        def row(name: str, documents: int | None, sequences: int | None, tokens: int) -> None:
            counts = ("" if count is None else f"{count:,}" for count in (documents, sequences))
            table.add_row(name, *counts, f"{tokens:,}", f"{tokens / max(self.tokens_in, 1):.2%}")

        row("read", self.documents_in, None, self.tokens_in)
        for split, books in self.splits.items():
            table.add_section()
            row(
                f"{split.replace('_', ' ')}, written",
                books.kept_documents,
                books.sequences.total(),
                books.sequence_tokens(),
            )
            for length, count in sorted(books.sequences.items()):
                row(f"  bucket {length:,}", None, count, length * count)
            for rule in sorted(books.dropped_documents.keys() | books.dropped_tokens.keys()):
                dropped = rule.replace("_", " ")
                row(f"  dropped: {dropped}", books.dropped_documents[rule], None, books.dropped_tokens[rule])
        table.caption = (
            "Dropped tokens include the tails of written documents.\n"
            f"{self.replaced_documents:,} documents contain U+FFFD (invalid UTF-8 replaced) and are kept."
        )
        table.caption_justify = "left"
        return table
