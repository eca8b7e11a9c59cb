"""The ledger of prepared data as a table."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..format.ledger import Ledger
from .tables import make_table


def print_ledger(ledger: Ledger, console: Console) -> None:
    """Print the ledger as a table, with notes."""
    console.print(ledger_table(ledger))
    for note in _notes(ledger):
        console.print(escape(note), highlight=False)
    console.print()


def ledger_table(ledger: Ledger) -> Table:
    """Return the ledger as a table; the tokens of its parts sum to those of its first row."""
    table = make_table("Ledger", "", "documents", "sequences", "tokens", "share")

    def row(name: str, documents: int | None, sequences: int | None, tokens: int | None) -> None:
        counts = ("" if count is None else f"{count:,}" for count in (documents, sequences, tokens))
        table.add_row(name, *counts, "" if tokens is None else f"{tokens / max(ledger.tokens, 1):.2%}")

    row("records read", ledger.records, None, ledger.tokens)
    for kind, count in sorted(ledger.bad.counts.items()):
        row(f"  left out: {kind.replace('_', ' ')}", count, None, None)
    for split, account in ledger.splits.items():
        table.add_section()
        row(split.replace("_", " "), account.documents, None, account.tokens)
        for length, count in sorted(account.sequences.items()):
            row(f"  bucket {length:,}", None, count, length * count)
        if account.filler_tokens:
            row("  of it filler", None, None, -account.filler_tokens)
        for rule in sorted(account.dropped_tokens):
            documents = account.dropped_documents[rule] or None
            row(f"  dropped: {rule.replace('_', ' ')}", documents, None, account.dropped_tokens[rule])
    return table


def _notes(ledger: Ledger) -> Iterator[str]:
    """Yield facts that are not in the table, one line each."""
    packed = sum(account.packed_sequences for account in ledger.splits.values())
    if packed:
        yield f"{packed:,} sequences hold pieces of several documents."
    if ledger.word_cuts:
        cut_at = "; ".join(ledger.word_cut_examples)
        yield f"{ledger.word_cuts:,} cuts inside words too long to tokenize as a whole, first at {cut_at}"
    for kind in sorted(ledger.bad.examples):
        yield f"First record left out as {kind.replace('_', ' ')}: {ledger.bad.examples[kind][0]}"
