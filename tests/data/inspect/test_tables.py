"""Tables about data are whole on a terminal of 80 columns, for a corpus of 10^9 documents and 10^12 tokens too."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from longring.data.format.document import BadRecord
from longring.data.format.ledger import Ledger
from longring.data.inspect.ledger import ledger_table, print_ledgers, sources_table
from longring.data.inspect.ordered import TITLE, duplicates_table, neighbors_table
from longring.data.inspect.tables import bar, make_table, shortened
from rich.console import Console
from rich.table import Table

DOCUMENTS, TOKENS = 10**9, 10**12


def printed(table: Table) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "no cell is cut"
    return text


def large_ledger() -> Ledger:
    ledger = Ledger()
    ledger.records = DOCUMENTS
    ledger.bad.counts["invalid_utf8"] = DOCUMENTS // 10
    ledger.left_out_documents["too_long"], ledger.left_out_tokens["too_long"] = DOCUMENTS, TOKENS
    for split in ledger.splits.values():
        split.documents, split.tokens, split.filler_tokens = DOCUMENTS, TOKENS, DOCUMENTS
        split.document_lengths[10], split.length_tokens[10] = DOCUMENTS, TOKENS
        split.sequences[1 << 17] = TOKENS >> 17
        split.dropped_documents["near_duplicate"], split.dropped_tokens["near_duplicate"] = DOCUMENTS, TOKENS
    return ledger


def test_a_large_ledger_is_whole():
    text = printed(ledger_table(large_ledger()))
    assert all(f"{number:,}" in text for number in (DOCUMENTS, TOKENS, 1 << 17))
    assert "dropped: near duplicate" in text
    by_source = printed(sources_table({f"web {number}": large_ledger() for number in range(3)}))
    assert f"{2 * TOKENS:,}" in by_source


@pytest.mark.parametrize(("threshold", "chosen"), [(0.8, "0.80"), (1.01, "none")])
def test_a_large_histogram_of_duplicates_is_whole(threshold: float, chosen: str):
    found: dict[str, Any] = {
        "threshold": threshold,
        "cosine_from": [0.5, 0.8, 0.99],
        "pairs": [20 * DOCUMENTS, DOCUMENTS, DOCUMENTS],
        "sampled": [64, 64, 64],
        "confirmed": [0, 32, 64],
    }
    text = printed(duplicates_table(found))
    assert f"threshold: {chosen}" in text
    assert text.count("all compared") == (2 if threshold < 1 else 0)
    assert "0.50" not in text, "a bin below 0.8 without near-duplicates is not shown"


LIB = "/opt/tools/python/versions/3.11/lib/python3.11"
LONG_NAMES = {
    f"record 8 of source 'py', input shard 3: {LIB}/asyncio/events.py": "record 8 of …/python3.11/asyncio/events.py",
    f"record 9 of source 'py', input shard 3: {LIB}/asyncio/tasks.py": "record 9 of …/python3.11/asyncio/tasks.py",
    f"record 7 of source 'a', input shard 0: {LIB}/{40 * '0'}7.json": "record 7 of 0000000000000000…0000000007.json",
    "record 12345678 of source 'common-crawl', input shard 9876": "record 12345678 of source 'comm…t shard 9876",
    "record 4 of source 'web', input shard 0": "record 4 of source 'web', input shard 0",
}
"""Titles of documents, and as they are shown."""


def test_long_names_keep_what_tells_documents_apart():
    entries = [{"title": title, "first_line": "", "neighbors": []} for title in LONG_NAMES]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(neighbors_table(entries))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for expected in LONG_NAMES.values():
        assert len(expected) <= TITLE
        assert sum(expected in line for line in lines) == 1


@pytest.mark.parametrize("width", range(8, 40))
def test_a_shortened_name_fits(width: int):
    for name in ("a/bc/defgh/ijklmnopq/rstuv.py", "/" + 30 * "x", "no path at all, but long", "/home/data/x/y/"):
        short = shortened(name, width)
        assert len(short) <= width
        assert (short == name) == (len(name) <= width)
        assert short.endswith(name[-width // 4 :])


def test_numbers_are_at_the_right_and_text_at_the_left():
    table = make_table("Title", "name", "count", "", text=("name",))
    assert [column.justify for column in table.columns] == ["left", "right", "left"]
    assert [len(bar(share, 20)) for share in (0, 0.5, 1)] == [0, 10, 20]


def test_a_name_of_a_record_is_no_emoji():
    """ ":a:" is a sign in rich's markup, and sample a of a tar file in a message."""
    ledger = Ledger()
    ledger.bad.enter("x.tar:a", BadRecord("missing_field", "no field"))
    manifest = SimpleNamespace(ledger=ledger, ledgers={"web": ledger}, lengths=(), config={})
    console = Console(width=80, file=io.StringIO(), record=True)
    print_ledgers(manifest, console)  # type: ignore[arg-type]
    assert "First record left out as missing field: x.tar:a: no field" in console.export_text()
