"""The ledgers of prepared data as tables."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..format.document import SPLITS
from ..format.ledger import Ledger, SplitLedger
from ..format.manifest import Manifest
from .tables import make_table, shortened

NAME = 24
"""Maximum characters of a source's name in the first column; its rules are about as long."""


def print_ledgers(manifest: Manifest, console: Console) -> None:
    """Print the account of all sources with its notes and, if there are several, the account of each."""
    console.print(ledger_table(manifest.ledger))
    for note in (*_notes(manifest.ledger), *_empty(manifest)):
        console.print(escape(note), highlight=False, emoji=False)  # ":a:" is a part of a name
    if len(manifest.ledgers) > 1:
        console.print()
        console.print(sources_table(manifest.ledgers))
    console.print()


class _Rows:
    """Rows of documents, sequences and tokens in a table titled `title`; `all_tokens` is 100% of the last column."""

    def __init__(self, title: str, all_tokens: int):
        self.table = make_table(title, "", "documents", "sequences", "tokens", "share")
        self._all = max(all_tokens, 1)

    def add(self, name: str, documents: int | None, sequences: int | None, tokens: int | None) -> None:
        """Add a row; a count that is None is left empty."""
        counts = ("" if count is None else f"{count:,}" for count in (documents, sequences, tokens))
        self.table.add_row(name, *counts, "" if tokens is None else f"{tokens / self._all:.2%}")

    def add_left_out(self, ledger: Ledger) -> None:
        """Add the documents that settings of the sources leave out, and the bad records."""
        for rule, count in sorted(ledger.left_out_documents.items()):
            self.add(f"  left out: {_words(rule)}", count, None, ledger.left_out_tokens[rule] or None)
        for kind, count in sorted(ledger.bad.counts.items()):
            self.add(f"  left out: {_words(kind)}", count, None, None)

    def add_written(self, accounts: Collection[SplitLedger]) -> None:
        """Add the sequences and filler of splits by bucket, and what is dropped."""
        for length, count in sorted(_sum(account.sequences for account in accounts).items()):
            self.add(f"  bucket {length:,}", None, count, length * count)
        if filler := sum(account.filler_tokens for account in accounts):
            # Negative, as the buckets above count filler, which is in no document.
            self.add("  of it filler", None, None, -filler)
        documents = _sum(account.dropped_documents for account in accounts)
        for rule, tokens in sorted(_sum(account.dropped_tokens for account in accounts).items()):
            self.add(f"  dropped: {_words(rule)}", documents[rule] or None, None, tokens)


def ledger_table(ledger: Ledger) -> Table:
    """Return the ledger as a table; the tokens of its parts sum to those of its first row."""
    tokens = ledger.tokens + ledger.left_out_tokens.total()  # 100% of the last column
    rows = _Rows("Ledger", tokens)
    rows.add("records read", ledger.records, None, tokens)
    rows.add_left_out(ledger)
    for split, account in ledger.splits.items():
        rows.table.add_section()
        rows.add(_words(split), account.documents, None, account.tokens)
        rows.add_written([account])
    return rows.table


def sources_table(ledgers: Mapping[str, Ledger]) -> Table:
    """Return the account of each source as a table: the records read, with both splits' sequences and drops."""
    totals = {name: ledger.tokens + ledger.left_out_tokens.total() for name, ledger in ledgers.items()}
    rows = _Rows("Ledger by source", sum(totals.values()))
    for name, ledger in ledgers.items():
        rows.table.add_section()
        rows.add(escape(shortened(name, NAME)), ledger.records, None, totals[name])
        rows.add_left_out(ledger)
        rows.add_written(ledger.splits.values())
    return rows.table


def _sum(counters: Iterable[Counter]) -> Counter:
    """Return the sum of counters, with the keys whose count is 0."""
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _words(name: str) -> str:
    return name.replace("_", " ")


def _notes(ledger: Ledger) -> Iterator[str]:
    """Yield facts that are not in the table, one line each."""
    packed = sum(account.packed_sequences for account in ledger.splits.values())
    if packed:
        yield f"{packed:,} sequences hold pieces of several documents."
    if ledger.word_cuts:
        cut_at = "; ".join(ledger.word_cut_examples)
        yield f"{ledger.word_cuts:,} cuts inside words too long to tokenize as a whole, first at {cut_at}"
    for kind in sorted(ledger.bad.examples):
        yield f"First record left out as {_words(kind)}: {ledger.bad.examples[kind][0]}"


def _empty(manifest: Manifest) -> Iterator[str]:
    """Yield what the settings ask for and the documents do not give: held-out data, and sequences of each length."""
    train, held_out = (manifest.ledger.splits[split].sequences for split in SPLITS)  # length → sequences
    fraction = manifest.config.get("held_out_fraction", 0)
    if fraction and not held_out.total():
        yield (
            f"data.held_out_fraction = {fraction}: gives no held-out sequence, so there is nothing to evaluate on; "
            "raise it, or set it to 0"
        )
    if lengths := [f"{length:,}" for length in manifest.lengths if not train[length]]:
        yield (
            f"No training sequence has {' or '.join(lengths)} tokens, so no step trains on this length; lower "
            "data.max_bucket_tokens, or add longer documents"
        )
