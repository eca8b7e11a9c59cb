"""The last stages of an ordering: the layout, the shards, and a manifest like that of prepared data.

They work in `<directory>.partial/`:

    shards/000012/               tar shards of part 12
    work/layout/3/               layout of both splits of source 3
    work/parts.json              number of parts of each source; written last, so the layouts are done
    work/placement/000012.npy    documents that begin in part 12, and the sequences in which they begin
    work/counts, work/ledgers    other results of each part (prepare/merge.py)
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..files import write_text
from ..format.document import NO_DOCUMENT, SPLITS, Split
from ..format.ledger import Ledger, SplitLedger
from ..format.manifest import INPUTS_FILE, MANIFEST_FILE, REPORT_FILE, Manifest, file_hashes
from ..format.settings import settings_of
from ..format.shards import BucketWriter, ShardName
from ..format.store import LocalStore
from ..format.tokenizer import TOKENIZER_FILE
from ..order_config import OrderConfig
from ..prepare.merge import give_name, merge_parts, publish_part
from .contexts import Layout, lay_in_context, lay_long_buckets, layout_folder, read_sequence, stored
from .documents import Documents, save
from .neighbors import Embeddings
from .report import make_report

PLACEMENT_FILE = "placement.npy"
PLACEMENT_DTYPE = np.dtype([("record", "<u4"), ("length", "<u4"), ("sequence", "<i8")])
"""The placement of a document: the bucket and the index of the sequence in which it begins. A length of 0 means that
the document is dropped, and `sequence` is then the record of the near-duplicate that is kept."""

PART_SHARDS = 4
"""Approximate number of full shards in a part."""

SEQUENCES_PER_REPORT = 256
"""Number of sequences between two reports of a part's progress."""


def lay(data: DataConfig, order: OrderConfig, documents: Documents, path: NDArray[np.uint32], partial: Path) -> None:
    """Write the layout of both splits of each source and the number of its parts.

    `path` is the documents in order, source by source, uint32 [steps]. Sequences of two sources are never joined.
    """
    pairs, held_out = documents.column("pairs"), documents.column("held_out")
    lengths, parts = order.lengths(data), []
    for source in range(len(documents.manifest.sources)):
        mine, tokens = documents.of_source(source), 0
        # Sources ascend along the path, so comparing with a source's ends is monotonic, and bisection finds its steps.
        here = path[slice(*np.searchsorted(path, np.array([mine.start, mine.stop], dtype=path.dtype)).tolist())]
        for split in SPLITS:
            some = here[held_out[here] == (split == "held_out")]
            if order.mode == "in_context":
                layout = lay_in_context(some, pairs, lengths[0])
            else:
                layout = lay_long_buckets(some, pairs, lengths, (order.seed, split))
            layout.save(layout_folder(partial, source), split)
            tokens += sum(length * layout.sequences(length) for length in lengths)
        # Parts are equal shares of a source's sequences, so that each is about PART_SHARDS full shards.
        parts.append(max(int(tokens > 0), round(tokens / (PART_SHARDS * data.shard_tokens))))
    write_text(partial / "work" / "parts.json", json.dumps(parts))


def parts_of(partial: Path) -> list[int]:
    """Return the number of parts into which the sequences of each source are divided for writing, [sources]."""
    return json.loads((partial / "work" / "parts.json").read_text())


def make_part(
    data: DataConfig,
    order: OrderConfig,
    documents: Documents,
    partial: Path,
    number: int,
    on_progress: Callable[[float], None],
) -> None:
    """Write part `number` of every bucket of both splits of its source: placement and shards, then the ledger.

    `on_progress` gets the fraction that is done.
    """
    manifest, first_parts = documents.manifest, np.cumsum([0, *parts_of(partial)])  # [sources + 1]
    source = int(np.searchsorted(first_parts, number, side="right")) - 1
    nth, parts = number - int(first_parts[source]), int(first_parts[source + 1] - first_parts[source])
    begun = partial / "work" / f"part-{number:06d}"
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    ledger, counts = Ledger(), np.zeros(manifest.vocab_size, dtype=np.int64)
    # (document, bucket, index among the source's sequences of the one in which the document begins)
    begins: list[tuple[int, int, int]] = []
    tables = []
    buckets = len(SPLITS) * len(order.lengths(data))
    for split in SPLITS:
        layout = Layout.load(layout_folder(partial, source), split, order.lengths(data))
        for length in order.lengths(data):
            # The part holds the stored sequences [first, last) of the source in the bucket.
            first, last = (layout.sequences(length) * (nth + side) // parts for side in (0, 1))
            name, dtype = ShardName(number, split, length, 0), np.dtype(manifest.dtype)
            writer = BucketWriter(begun, name, dtype, data.shard_tokens, counts if split == "train" else None)
            sequences = stored(layout, length, order.seed, split, np.arange(first, last))
            with writer:
                for index, sequence in enumerate(sequences.tolist(), first):
                    if not index % SEQUENCES_PER_REPORT:
                        on_progress((len(tables) + (index - first) / (last - first)) / buckets)
                    begun_here = _write_sequence(documents, layout, length, sequence, writer, ledger.splits[split])
                    begins += [(document, length, index) for document in begun_here]
            tables.append(writer.shards())
    save(partial / "work" / "placement" / f"{number:06d}.npy", np.array(begins, dtype=np.int64).reshape(-1, 3))
    publish_part(partial, number, begun, ledger, counts, np.concatenate(tables))


def _write_sequence(
    documents: Documents, layout: Layout, length: int, number: int, writer: BucketWriter, account: SplitLedger
) -> list[int]:
    """Write sequence `number` of a bucket and count it in `account`; return the documents that begin in it."""
    tokens, pieces = read_sequence(documents, layout, length, number, documents.manifest.boundary_id)
    _enter(account, length, pieces)
    writer.append(tokens, [(_record(documents, piece[0]), *piece[1:]) for piece in pieces])
    # A piece with offset 0 begins its document; filler begins none.
    return [document for document, offset, _ in pieces if not offset and document != NO_DOCUMENT]


def _enter(account: SplitLedger, length: int, pieces: list[tuple[int, int, int]]) -> None:
    """Count a sequence of `length` tokens with these pieces in `account`."""
    account.sequences[length] += 1
    documents = [document for document, _, _ in pieces if document != NO_DOCUMENT]
    account.packed_sequences += len(documents) > 1
    if len(documents) < len(pieces):  # filler is the last piece
        account.filler_tokens += length - pieces[-1][2]


def _record(documents: Documents, document: int) -> int:
    """Return the index of a document's record among all records; NO_DOCUMENT for filler."""
    if document == NO_DOCUMENT:
        return NO_DOCUMENT
    shard, _ = documents.locate(document)
    return int(documents.first_record[shard]) + int(documents.entry(document)["record"])


def finish(
    data: DataConfig,
    order: OrderConfig,
    documents: Documents,
    embeddings: Embeddings,
    *,
    partial: Path,
    dropped: NDArray[np.uint32],
    path: NDArray[np.void],
    lists: Iterable[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]],
    measured: dict[str, Any],
) -> None:
    """Write the manifest and the files beside it, and give the directory its name; no shard is read or moved.

    The call may be killed and repeated at any point. `dropped` is (dropped document, kept document) [n, 2], `path`
    STEP_DTYPE [steps], `measured` the results of earlier stages for `order.json`.
    """
    prepared = documents.manifest
    if not (partial / MANIFEST_FILE).exists():
        for name in (TOKENIZER_FILE, INPUTS_FILE):
            shutil.copyfile(Path(data.directory, name), partial / name)
        ledgers, table = _sum_up(documents, partial, dropped)
        make_report(data, order, documents, embeddings, partial, path, lists, measured)
        manifest = Manifest(
            files=file_hashes(partial, PLACEMENT_FILE, REPORT_FILE),
            vocab_size=prepared.vocab_size,
            boundary=prepared.boundary,
            boundary_id=prepared.boundary_id,
            dtype=prepared.dtype,
            config=prepared.config,
            lengths=order.lengths(data),
            has_boundaries=order.document_masks,
            sources=dict(zip(prepared.sources, parts_of(partial), strict=True)),
            order=settings_of(order),
            ledgers=ledgers,
            shards=table,
            store=LocalStore(partial),
        )
        manifest.write(partial)
    give_name(partial, Path(order.directory))


def _sum_up(
    documents: Documents, partial: Path, left_out: NDArray[np.uint32]
) -> tuple[dict[str, Ledger], NDArray[np.void]]:
    """Write the tables of all parts; return the ledger of each source, which adds up, and the table of shards [shards].

    `left_out` is (dropped document, kept document) [n, 2].
    """
    # Records and documents are those of the prepared data; the sequences are counted anew from the parts.
    ledgers = {name: Ledger.from_json(ledger.to_json()) for name, ledger in documents.manifest.ledgers.items()}
    for account in (account for ledger in ledgers.values() for account in ledger.splits.values()):
        account.sequences, account.packed_sequences, account.filler_tokens = Counter(), 0, 0
    # Data of format version 2 has one ledger for all sources.
    ledger_of = [ledgers.get(name, next(iter(ledgers.values()))) for name in documents.manifest.sources]
    parts = parts_of(partial)
    of_parts, table = merge_parts(partial, range(sum(parts)), documents.manifest.vocab_size)
    sources = np.repeat(np.arange(len(parts)), parts).tolist()  # [parts]
    for source, one in zip(sources, of_parts, strict=True):
        ledger_of[source].add(one)
    pairs, held_out, gone = documents.column("pairs"), documents.column("held_out"), left_out[:, 0].astype(np.int64)
    for source, ledger in enumerate(ledger_of):
        mine = gone[documents.sources_of(gone) == source]
        for split in SPLITS:
            chosen = pairs[mine[held_out[mine] == (split == "held_out")]]
            if len(chosen):
                ledger.splits[split].dropped_documents["near_duplicate"] += len(chosen)
                ledger.splits[split].dropped_tokens["near_duplicate"] += int(chosen.sum())
    for ledger in ledgers.values():
        ledger.check()
    np.save(partial / PLACEMENT_FILE, _placement(documents, partial, sources, of_parts, left_out))
    return ledgers, table


def _placement(
    documents: Documents, partial: Path, sources: list[int], ledgers: list[Ledger], left_out: NDArray[np.uint32]
) -> NDArray[np.void]:
    """Return the placement of all documents, PLACEMENT_DTYPE [documents].

    `sources` [parts] and `ledgers` [parts] are the source and the account of each part; `left_out` is (dropped
    document, kept document) [n, 2].
    """
    placement, held_out = np.zeros(len(documents), dtype=PLACEMENT_DTYPE), documents.column("held_out")
    first_records = np.repeat(documents.first_record[:-1], np.diff(documents.first))
    placement["record"] = first_records + documents.column("record")
    # Sequences of each bucket written by all parts so far, and by those of the sources before.
    written: dict[Split, Counter[int]] = {split: Counter() for split in SPLITS}
    before, source = written, -1
    for number, ledger in enumerate(ledgers):
        if sources[number] != source:
            before, source = {split: counts.copy() for split, counts in written.items()}, sources[number]
        document, length, sequence = np.load(partial / "work" / "placement" / f"{number:06d}.npy").T
        for split in SPLITS:
            here = held_out[document] == (split == "held_out")
            for bucket, count in before[split].items():
                sequence[here & (length == bucket)] += count
            written[split].update(ledger.splits[split].sequences)
        placement["length"][document], placement["sequence"][document] = length, sequence
    gone, kept = left_out.T.astype(np.int64)
    # A dropped document keeps length 0 and points to the record that is kept.
    placement["sequence"][gone] = placement["record"][kept]
    assert np.count_nonzero(placement["length"]) == len(documents) - len(gone), (
        "each document that is kept begins in one sequence"
    )
    return placement
