"""The last stages of an ordering: the layout, the shards, and a manifest like that of prepared data.

They work in `<directory>.partial/`:

    shards/000012/               tar shards of part 12
    work/layout/                 layout of both splits
    work/parts.json              number of parts; written last, so the layout is done
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
from ..format.document import NO_DOCUMENT, SPLITS
from ..format.ledger import Ledger, SplitLedger
from ..format.manifest import INPUTS_FILE, MANIFEST_FILE, REPORT_FILE, Manifest, file_hashes
from ..format.settings import settings_of
from ..format.shards import BucketWriter, ShardName
from ..format.store import LocalStore
from ..format.tokenizer import TOKENIZER_FILE
from ..order_config import OrderConfig
from ..prepare.merge import give_name, merge_parts, publish_part
from .contexts import Layout, lay_in_context, lay_long_buckets, read_sequence, stored
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
    """Write the layout of both splits and the number of parts; `path` is the documents in order, uint32 [steps]."""
    pairs, held_out = documents.column("pairs"), documents.column("held_out")
    lengths, tokens = order.lengths(data), 0
    for split in SPLITS:
        here = path[held_out[path] == (split == "held_out")]
        if order.mode == "in_context":
            layout = lay_in_context(here, pairs, lengths[0])
        else:
            layout = lay_long_buckets(here, pairs, lengths, (order.seed, split))
        layout.save(partial / "work" / "layout", split)
        tokens += sum(length * layout.sequences(length) for length in lengths)
    # Parts are equal shares of the sequences, so that each is about PART_SHARDS full shards.
    parts = max(1, round(tokens / (PART_SHARDS * data.shard_tokens)))
    write_text(partial / "work" / "parts.json", json.dumps(parts))


def num_parts(partial: Path) -> int:
    """Return the number of parts into which the sequences are divided for writing."""
    return json.loads((partial / "work" / "parts.json").read_text())


def make_part(
    data: DataConfig,
    order: OrderConfig,
    documents: Documents,
    partial: Path,
    number: int,
    on_progress: Callable[[float], None],
) -> None:
    """Write part `number` of every bucket of both splits: placement and shards, then the ledger.

    `on_progress` gets the fraction that is done.
    """
    manifest, parts = documents.manifest, num_parts(partial)
    begun = partial / "work" / f"part-{number:06d}"
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    ledger, counts = Ledger(), np.zeros(manifest.vocab_size, dtype=np.int64)
    begins: list[tuple[int, int, int]] = []  # (document, bucket, index of the sequence in which it begins)
    tables = []
    buckets = len(SPLITS) * len(order.lengths(data))
    for split in SPLITS:
        layout = Layout.load(partial / "work" / "layout", split, order.lengths(data))
        for length in order.lengths(data):
            # The part holds the stored sequences [first, last) of the bucket.
            first, last = (layout.sequences(length) * (number + side) // parts for side in (0, 1))
            name, dtype = ShardName(number, split, length, 0), np.dtype(manifest.dtype)
            writer = BucketWriter(begun, name, dtype, data.shard_tokens, counts if split == "train" else None)
            sequences = stored(layout, length, order.seed, split, np.arange(first, last))
            with writer:
                for index, sequence in enumerate(sequences.tolist(), first):
                    if not index % SEQUENCES_PER_REPORT:
                        on_progress((len(tables) + (index - first) / (last - first)) / buckets)
                    tokens, pieces = read_sequence(documents, layout, length, sequence, manifest.boundary_id)
                    # A piece with offset 0 begins its document; filler begins none.
                    first_pieces = [
                        document for document, offset, _ in pieces if not offset and document != NO_DOCUMENT
                    ]
                    begins += [(document, length, index) for document in first_pieces]
                    _enter(ledger.splits[split], length, pieces)
                    writer.append(tokens, [(_record(documents, piece[0]), *piece[1:]) for piece in pieces])
            tables.append(writer.shards())
    save(partial / "work" / "placement" / f"{number:06d}.npy", np.array(begins, dtype=np.int64).reshape(-1, 3))
    publish_part(partial, number, begun, ledger, counts, np.concatenate(tables))


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
        ledger, table = _sum_up(documents, partial, dropped)
        by_source = {"sources": _by_source(documents, dropped)}
        make_report(data, order, documents, embeddings, partial, path, lists, {**measured, **by_source})
        manifest = Manifest(
            files=file_hashes(partial, PLACEMENT_FILE, REPORT_FILE),
            vocab_size=prepared.vocab_size,
            boundary=prepared.boundary,
            boundary_id=prepared.boundary_id,
            dtype=prepared.dtype,
            config=prepared.config,
            lengths=order.lengths(data),
            has_boundaries=order.document_masks,
            sources={"ordered": num_parts(partial)},
            order=settings_of(order),
            ledgers={"ordered": ledger},
            shards=table,
            store=LocalStore(partial),
        )
        manifest.write(partial)
    give_name(partial, Path(order.directory))


def _by_source(documents: Documents, dropped: NDArray[np.uint32]) -> dict[str, dict[str, int]]:
    """Return the number of documents and tokens of each source, and of the dropped near-duplicates among them."""
    pairs, gone = documents.column("pairs"), np.sort(dropped[:, 0])
    found, shard = {}, 0
    for name, num_shards in documents.manifest.sources.items():
        # The input shards of a source are adjacent, and so are its documents.
        begin, end = documents.first[[shard, shard + num_shards]].tolist()
        mine = gone[slice(*np.searchsorted(gone, [begin, end]).tolist())]
        found[name] = {
            "documents": end - begin,
            "tokens": int(pairs[begin:end].sum()),
            "near_duplicate_documents": len(mine),
            "near_duplicate_tokens": int(pairs[mine].sum()),
        }
        shard += num_shards
    return found


def _sum_up(documents: Documents, partial: Path, left_out: NDArray[np.uint32]) -> tuple[Ledger, NDArray[np.void]]:
    """Write the tables of all parts; return the ledger, which adds up, and the table of shards [shards].

    `left_out` is (dropped document, kept document) [n, 2].
    """
    ledger = Ledger.from_json(documents.manifest.ledger.to_json())
    # Records and documents are those of the prepared data; the sequences are counted anew from the parts.
    for account in ledger.splits.values():
        account.sequences, account.packed_sequences, account.filler_tokens = Counter(), 0, 0
    ledgers, table = merge_parts(partial, num_parts(partial), documents.manifest.vocab_size)
    placement = np.zeros(len(documents), dtype=PLACEMENT_DTYPE)
    first_records = np.repeat(documents.first_record[:-1], np.diff(documents.first))
    placement["record"] = first_records + documents.column("record")
    for number, one in enumerate(ledgers):
        ledger.add(one)
        document, length, sequence = np.load(partial / "work" / "placement" / f"{number:06d}.npy").T
        placement["length"][document], placement["sequence"][document] = length, sequence
    gone, kept = left_out.T.astype(np.int64)
    # A dropped document keeps length 0 and points to the record that is kept.
    placement["sequence"][gone] = placement["record"][kept]
    pairs, held_out = documents.column("pairs")[gone], documents.column("held_out")[gone]
    for split in SPLITS:
        chosen = pairs[held_out == (split == "held_out")]
        if len(chosen):
            ledger.splits[split].dropped_documents["near_duplicate"] = len(chosen)
            ledger.splits[split].dropped_tokens["near_duplicate"] = int(chosen.sum())
    ledger.check()
    assert np.count_nonzero(placement["length"]) == len(documents) - len(gone), (
        "each document that is kept begins in one sequence"
    )
    np.save(partial / PLACEMENT_FILE, placement)
    return ledger, table
