"""One input shard to sequences: the work of one process, repeatable, seen by the others only when it is whole.

A preparation works in `<directory>.partial/`:

    tokenizer.json             the tokenizer
    shards/000012/             the tar shards of input shard 12
    work/plan.json             settings and input shards: whoever goes on must have the same
    work/books/000012.json     its ledger and table of shards, written last: input shard 12 is done
    work/counts/000012.npy     how often each token is a target of its train split
    work/000012.<host>.<pid>/  what a process has begun
"""

import json
import os
import random
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..files import sync, write_text, write_whole
from ..format.document import SPLITS, Document, Split
from ..format.ledger import Ledger
from ..format.shards import BucketWriter, ShardName
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer
from .decompose import Piece, decompose, split_of
from .packing import BestFitPacker, Concatenator, Row, Segment
from .records import RecordReader
from .sources import InputShard

PROGRESS_SECONDS = 0.5


def books_file(partial: Path, number: int) -> Path:
    """Return the file whose presence says that input shard `number` is done."""
    return partial / "work" / "books" / f"{number:06d}.json"


def counts_file(partial: Path, number: int) -> Path:
    """Return the counts of train targets of input shard `number`, int64 [vocabulary]."""
    return partial / "work" / "counts" / f"{number:06d}.npy"


def progress_file(partial: Path, number: int) -> Path:
    """Return the file where its process says how many documents and tokens it has done."""
    return partial / "work" / "progress" / f"{number:06d}"


def prepare_input_shard(config: DataConfig, partial: Path, number: int, shard: InputShard) -> None:
    """Make input shard `number` in `partial`, unless that has been done."""
    if books_file(partial, number).exists():
        return
    work = partial / "work"
    host = socket.gethostname()
    for leftover in work.glob(f"{number:06d}.{host}.*"):
        process = int(leftover.name.rpartition(".")[2])
        # A dead process's number may come again, even to us.
        if process == os.getpid() or not _is_alive(process):
            shutil.rmtree(leftover, ignore_errors=True)
    begun = work / f"{number:06d}.{host}.{os.getpid()}"
    begun.mkdir(parents=True)
    try:
        tokenizer = DocumentTokenizer((partial / TOKENIZER_FILE).read_bytes(), config.tokenizer.boundary)
        writing = _Writing(config, tokenizer, begun, number, shard)
        writing.run(progress_file(partial, number))
        sync(begun)
        final = partial / "shards" / f"{number:06d}"
        # Whole but without books: a process died between the two renames, and its bytes were the same.
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(exist_ok=True)
        begun.rename(final)
    finally:
        shutil.rmtree(begun, ignore_errors=True)  # unless it has got its name
    counts = counts_file(partial, number)
    write_whole(counts, lambda path: np.save(path, writing.counts))
    shards = [[entry[name].item() for name in entry.dtype.names] for entry in writing.shards()]
    books = {"ledger": writing.ledger.to_json(), "shards": [[*row[:-1], row[-1].decode()] for row in shards]}
    write_text(books_file(partial, number), json.dumps(books) + "\n")


class _Writing:
    """The sequences of one input shard on their way into its shards."""

    def __init__(self, config: DataConfig, tokenizer: DocumentTokenizer, folder: Path, number: int, shard: InputShard):
        self.ledger = Ledger()
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._config = config
        self._tokenizer = tokenizer
        self._reader = RecordReader(shard, config.named_sources[shard.source], config.max_bad_fraction)
        self._writers = {
            (split, length): BucketWriter(
                folder,
                ShardName(number, split, length, 0),
                tokenizer.dtype,
                config.shard_tokens,
                self.counts if split == "train" else None,
            )
            for split in SPLITS
            for length in config.lengths
        }
        self._packers = {split: BestFitPacker(config.lengths[0], tokenizer.boundary_id) for split in SPLITS}
        self._chains = {split: Concatenator(config.max_bucket_tokens) for split in SPLITS}

    def shards(self) -> np.ndarray:
        """Return the table of what was written."""
        return np.concatenate([writer.shards() for writer in self._writers.values()])

    def run(self, progress: Path) -> None:
        """Read, cut and write everything."""
        progress.parent.mkdir(exist_ok=True)
        shown = 0.0
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.enter_context(writer)
            for document, stream in self._streams():
                split = split_of(document.digest, self._config.seed, self._config.held_out_fraction)
                self.ledger.splits[split].enter(len(stream) - 1)
                match self._config.method:
                    case "decompose":
                        self._decompose(split, document, stream)
                    case "best_fit":
                        self._best_fit(split, document, stream)
                    case "concat" | "concat_masked":
                        self._write_rows(split, self._chains[split].add(Segment(stream, document.number, 0)))
                if time.monotonic() > shown + PROGRESS_SECONDS:
                    shown = time.monotonic()
                    progress.write_text(f"{self.ledger.documents} {self.ledger.tokens}")
            for split in SPLITS:
                self._finish(split)
        self.ledger.records, self.ledger.bad = self._reader.records, self._reader.bad
        self.ledger.check()
        progress.write_text(f"{self.ledger.documents} {self.ledger.tokens}")

    def _streams(self) -> Iterator[tuple[Document, np.ndarray]]:
        return self._tokenizer.streams(self._reader.documents(), self._reader.reject)

    def _decompose(self, split: Split, document: Document, stream: np.ndarray) -> None:
        num_pairs = len(stream) - 1
        drawn = None
        if self._config.cut == "random":
            drawn = random.Random(document.digest + str(self._config.seed).encode())
        pieces = decompose(num_pairs, self._config.lengths, drawn)
        for piece in pieces:
            self._write_piece(split, document, stream, piece)
        done = pieces[-1].offset + pieces[-1].length if pieces else 0
        if done == num_pairs:
            return
        if self._config.rest == "pack":
            self._write_rows(
                split, self._packers[split].add(Segment(stream[done:], document.number, done)), packed=True
            )
        else:
            rule = "remainder" if pieces else "short_document"
            self.ledger.splits[split].drop(rule, num_pairs - done, whole=not pieces)

    def _best_fit(self, split: Split, document: Document, stream: np.ndarray) -> None:
        """A document longer than a sequence fills whole ones; packing gets the rest."""
        num_pairs, length = len(stream) - 1, self._config.max_bucket_tokens
        for offset in range(0, num_pairs - length + 1, length):
            self._write_piece(split, document, stream, Piece(offset, length))
        if rest := num_pairs % length:
            segment = Segment(stream[num_pairs - rest :], document.number, num_pairs - rest)
            self._write_rows(split, self._packers[split].add(segment), packed=True)

    def _write_piece(self, split: Split, document: Document, stream: np.ndarray, piece: Piece) -> None:
        tokens = stream[piece.offset : piece.offset + piece.length + 1]
        self._writers[split, piece.length].append(tokens, [(document.number, piece.offset, 0)])
        self.ledger.splits[split].sequences[piece.length] += 1

    def _write_rows(self, split: Split, rows: Iterator[Row], *, packed: bool = False) -> None:
        for tokens, segments in rows:
            start, pieces = 0, []
            for segment in segments:
                pieces.append((segment.document, segment.offset, start))
                start += segment.pairs
            self._writers[split, len(tokens) - 1].append(tokens, pieces)
            self.ledger.splits[split].sequences[len(tokens) - 1] += 1
            self.ledger.splits[split].packed_sequences += packed

    def _finish(self, split: Split) -> None:
        packer, books = self._packers[split], self.ledger.splits[split]
        self._write_rows(split, packer.finish(), packed=True)
        books.filler_tokens = packer.filler
        for segment in self._chains[split].left_over:
            whole = segment.offset == 0  # the chain ends with it, so what began here is all here
            books.drop("end_of_input_shard", segment.pairs, whole=whole)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
