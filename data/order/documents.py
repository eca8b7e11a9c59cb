"""The documents of prepared data, read whole and in any order.

Preparation cuts documents and packs their parts, but the documents of an input shard lie in the tar shards of that
input shard alone, and each part names its record. So the sources are not read again and no text is stored twice: a
document takes a table entry of 21 bytes, and 32 bytes for each of its parts.
"""

import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole
from ..format.document import NO_DOCUMENT, SPLITS
from ..format.manifest import Manifest, open_prepared
from ..format.reader import MAX_OPEN_SHARDS
from ..format.tokenizer import DocumentTokenizer

TEXT_TOKENS = 1 << 16
"""Number of tokens that are decoded at once: a list of them takes 40 bytes a token."""

DOCUMENT_DTYPE = np.dtype([("record", "<u4"), ("held_out", "?"), ("pairs", "<i8"), ("first_part", "<i8")])
"""A document: its record's number in the input shard, its split, its number of pairs, the index of its first part."""

PART_DTYPE = np.dtype(
    [("offset", "<i8"), ("sequence", "<i8"), ("length", "<i8"), ("position", "<u4"), ("pairs", "<u4")]
)
"""A part, `pairs` adjacent pairs of a document from `offset` on: `sequence` is the index of the sequence that holds it
in the bucket `length` of the document's split, `position` that of its first pair there."""


def save(file: Path, array: NDArray) -> None:
    """Write an array as an npy file; the file appears whole or not at all."""
    write_whole(file, lambda begun: np.save(begun, array))


def load(file: Path, *, mapped: bool = False) -> Any:
    """Return the content of a stage's npy or npz file, mapped if `mapped`. Raises ValueError if it is damaged."""
    try:
        return np.load(file, mmap_mode="r" if mapped else None)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> ValueError:
    """Return the error to raise for a stage's file that cannot be read."""
    return ValueError(f"{file}: is damaged ({error}); delete it and run the same command again, which makes it anew")


def write_tables(manifest: Manifest, folder: Path, number: int) -> None:
    """Write the tables of the documents of input shard `number` and of their parts; the documents' table comes last.

    Raises ValueError if parts of a document are missing.
    """
    found, origins = [], []
    for split in SPLITS:
        for bucket in manifest.buckets(split):
            first = np.cumsum([0, *bucket.shards["sequences"]])
            # A bucket's shards are ordered by input shard.
            begin, end = np.searchsorted(bucket.shards["input_shard"], [number, number + 1]).tolist()
            if begin == end:
                continue
            sequences = np.arange(int(first[begin]), int(first[end]))
            pieces = manifest.reader(bucket).pieces(sequences)
            counts = [len(table) for table in pieces]
            table = np.concatenate(pieces)  # [parts, (input shard, record, offset, position in the sequence)]
            parts = np.empty(len(table), dtype=PART_DTYPE)
            parts["offset"], parts["position"], parts["length"] = table[:, 2], table[:, 3], bucket.length
            parts["sequence"] = np.repeat(sequences, counts)
            # A part ends at the position at which the next part of its sequence begins, the last one at the end.
            last = np.cumsum(counts) - 1
            ends = np.append(table[1:, 3], 0)
            ends[last] = bucket.length
            parts["pairs"] = ends - table[:, 3]
            found.append(parts)
            origins.append(np.stack([table[:, 1], np.full(len(table), split == "held_out")], axis=1))
    parts = np.concatenate(found) if found else np.empty(0, dtype=PART_DTYPE)
    origin = np.concatenate(origins) if origins else np.empty((0, 2), dtype=np.int64)
    # `origin` is [parts, (record, is held out)]; filler belongs to no document.
    real = origin[:, 0] != NO_DOCUMENT
    parts, origin = parts[real], origin[real]
    order = np.lexsort((parts["offset"], origin[:, 0]))
    parts, origin = parts[order], origin[order]
    first_parts = np.flatnonzero(np.diff(origin[:, 0], prepend=-1))  # [documents]
    # Parts are sorted by record and offset: each must begin at the offset at which the one before ends.
    ends = parts["offset"] + parts["pairs"]
    expected = np.append(0, ends[:-1])
    expected[first_parts] = 0
    if wrong := np.flatnonzero(parts["offset"] != expected).tolist():
        raise ValueError(
            f"{manifest.store.name}: record {origin[wrong[0], 0]} of input shard {number} has a part from pair "
            f"{parts['offset'][wrong[0]]} and none from pair {expected[wrong[0]]}, so the data was made wrongly; do "
            f"not use it, or delete its directory and run `{manifest.command} RECIPE`"
        )
    documents = np.empty(len(first_parts), dtype=DOCUMENT_DTYPE)
    documents["record"], documents["held_out"] = origin[first_parts].T
    documents["first_part"] = first_parts
    documents["pairs"] = np.add.reduceat(parts["pairs"], first_parts, dtype=np.int64) if len(parts) else 0
    save(folder / f"{number:06d}.parts.npy", parts)
    save(folder / f"{number:06d}.npy", documents)


class Documents:
    """All documents of prepared data, numbered in the order of input shards and records, and read whole or in part.

    `prepared` is the directory of the prepared data, `folder` that of the tables. Raises ValueError if a file of either
    is damaged.
    """

    def __init__(self, prepared: str, folder: Path):
        self.manifest = open_prepared(prepared, check_shards=False)
        self._folder = folder
        inputs = self.manifest.inputs()
        self.first = np.cumsum([0, *(entry["documents"] for entry in inputs)], dtype=np.int64)
        """int64 [input shards + 1], the first document of each input shard, then the number of documents."""
        self.first_record = np.cumsum([0, *(entry["records"] for entry in inputs)], dtype=np.int64)
        """int64 [input shards + 1], the first of all records in each input shard, then the number of records."""
        self._first_shard = np.cumsum([0, *self.manifest.sources.values()], dtype=np.int64)  # [sources + 1]
        # Each mapped file holds a descriptor, and many systems allow a process 1,024 of them.
        self._opened = lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open)
        self._readers = {
            (split == "held_out", bucket.length): self.manifest.reader(bucket)
            for split in SPLITS
            for bucket in self.manifest.buckets(split)
        }
        self._boundary_id = self.manifest.boundary_id

    @property
    def num_shards(self) -> int:
        """Number of input shards."""
        return sum(self.manifest.sources.values())

    def __len__(self) -> int:
        return int(self.first[-1])

    def of_shard(self, number: int) -> range:
        """Return the documents of an input shard."""
        return range(int(self.first[number]), int(self.first[number + 1]))

    def shards_of(self, source: int) -> range:
        """Return the input shards of the source with this index; they are adjacent, and so are their documents."""
        return range(int(self._first_shard[source]), int(self._first_shard[source + 1]))

    def of_source(self, source: int) -> range:
        """Return the documents of the source with this index."""
        return range(*self.first[self._first_shard[source : source + 2]].tolist())

    def source_of_shard(self, number: int) -> int:
        """Return the index of the source of an input shard."""
        return int(np.searchsorted(self._first_shard, number, side="right")) - 1

    def sources_of(self, numbers: NDArray[np.integer]) -> NDArray[np.uint16]:
        """Return the index of the source of each of documents `numbers` [n], uint16 [n]."""
        ends = self.first[self._first_shard[1:]]  # [sources]
        return np.searchsorted(ends.astype(numbers.dtype), numbers, side="right").astype(np.uint16)

    def shard_column(self, number: int, name: str) -> NDArray:
        """Return the field `name` of DOCUMENT_DTYPE of an input shard's documents, [documents of the shard]."""
        return load(self._folder / f"{number:06d}.npy")[name]

    def column(self, name: str) -> NDArray:
        """Return the field `name` of DOCUMENT_DTYPE of all documents, [documents]."""
        return np.concatenate([self.shard_column(number, name) for number in range(self.num_shards)])

    def locate(self, number: int) -> tuple[int, int]:
        """Return the input shard of a document and the document's index there."""
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        return shard, number - int(self.first[shard])

    def entry(self, number: int) -> NDArray:
        """Return a document's table entry, a scalar of DOCUMENT_DTYPE."""
        shard, index = self.locate(number)
        return self._opened(shard)[0][index]

    def tokens(self, number: int, offset: int = 0, pairs: int | None = None) -> NDArray[np.unsignedinteger]:
        """Return `pairs` pairs of a document from `offset` on, or all pairs to its end, as tokens [pairs + 1].

        The tokens are the input of the first pair and then the target of every pair. The first input is the boundary
        if `offset` is 0, and the token before otherwise.
        """
        shard, index = self.locate(number)
        table, parts = self._opened(shard)
        document = table[index]
        last_part = int(table["first_part"][index + 1]) if index + 1 < len(table) else len(parts)
        stop = int(document["pairs"]) if pairs is None else offset + pairs
        start = max(offset - 1, 0)
        # Targets [start, stop) of the document; the target before `offset` is the input of the first pair.
        found = [] if offset else [np.array([self._boundary_id], dtype=self.manifest.dtype)]
        for part in parts[int(document["first_part"]) : last_part]:
            begin, end = int(part["offset"]), int(part["offset"]) + int(part["pairs"])
            if begin < stop and end > start:
                reader = self._readers[bool(document["held_out"]), int(part["length"])]
                targets = reader.read([int(part["sequence"])])[0, int(part["position"]) + 1 :]
                found.append(targets[max(start - begin, 0) : min(stop, end) - begin])
        return np.concatenate(found)

    def texts(self, numbers: Iterable[int]) -> Iterator[str]:
        """Yield the texts of documents `numbers`, decoded from their tokens."""
        for number in numbers:
            yield "".join(self.text_parts(number))

    def text_parts(self, number: int) -> Iterator[str]:
        """Yield the text of a document, decoded from its tokens, in parts of up to TEXT_TOKENS tokens.

        A character whose bytes are cut between two parts becomes U+FFFD.
        """
        tokens = self.tokens(number)[1:-1]
        for start in range(0, max(len(tokens), 1), TEXT_TOKENS):
            yield self._tokenizer.decode(tokens[start : start + TEXT_TOKENS].tolist())

    @cached_property
    def _tokenizer(self) -> DocumentTokenizer:
        return self.manifest.tokenizer()

    def _open(self, number: int) -> tuple[NDArray, NDArray]:
        names = f"{number:06d}.npy", f"{number:06d}.parts.npy"
        table, parts = (load(self._folder / name, mapped=True) for name in names)
        # Tables written by earlier versions have another name for `position`; a view matches the fields by position.
        return table, parts.view(PART_DTYPE)


@lru_cache(maxsize=2)
def opened(prepared: str, folder: Path) -> Documents:
    """Return the documents of `prepared`, of which a process keeps the last two open."""
    return Documents(prepared, folder)
