"""Preparation of one input shard by one process: repeatable, and visible to others only when complete.

A preparation works in `<directory>.partial/`. Besides the results of its parts (merge.py) the directory holds

    tokenizer.json             tokenizer
    work/job.json              settings, and a hash of the files; a later attempt must have the same (job.py)
    work/inputs.jsonl          the input shards; offsets.bin, the first byte of each line
    work/progress/000012       documents and tokens done of input shard 12, and the document at work
    work/000012.<host>.<pid>/  unfinished tar shards of input shard 12
"""

import os
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..format.document import SPLITS, Document, Split
from ..format.ledger import Filter, Ledger
from ..format.shards import BucketWriter, ShardName
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer
from .decompose import Piece, decompose, split_of
from .merge import ledger_file, publish_part
from .packing import BestFitPacker, Concatenator, Row, Segment
from .progress import progress_file, written
from .records import RecordReader
from .sampling import sampled
from .sources import InputShard


def prepare_input_shard(config: DataConfig, partial: Path, number: int, shard: InputShard) -> None:
    """Prepare input shard `number` in `partial`, unless its ledger says that it is done.

    Raises ValueError if a source cannot be read or too many of its records are bad.
    """
    if ledger_file(partial, number).exists():
        return
    work, host = partial / "work", socket.gethostname()
    for leftover in work.glob(f"{number:06d}.{host}.*"):
        process = int(leftover.name.rpartition(".")[2])
        # The id of a dead process may have been given to another one, even to this one.
        if process == os.getpid() or not _is_alive(process):
            shutil.rmtree(leftover, ignore_errors=True)
    begun = work / f"{number:06d}.{host}.{os.getpid()}"
    begun.mkdir(parents=True)
    # Other processes see nothing of `begun`; publish_part renames it once every shard is complete.
    try:
        file = partial / TOKENIZER_FILE
        tokenizer = DocumentTokenizer(file.read_bytes(), config.tokenizer.boundary, str(file))
        writer = _InputShardWriter(config, tokenizer, begun, number, shard)
        writer.run(progress_file(partial, number))
        publish_part(partial, number, begun, writer.ledger, writer.counts, writer.shards())
    finally:
        shutil.rmtree(begun, ignore_errors=True)  # a failure leaves it behind, a success has renamed it


class _InputShardWriter:
    """Writer of the shards of one input shard, which counts in `ledger` and `counts` what it writes."""

    def __init__(self, config: DataConfig, tokenizer: DocumentTokenizer, folder: Path, number: int, shard: InputShard):
        self.ledger = Ledger()
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._config = config
        self._tokenizer = tokenizer
        self._shard = shard
        self._source = source = config.named_sources[shard.recipe_source]
        marks = tokenizer.marks(source.bos, source.eos) if source.holds_tokens else None
        self._reader = RecordReader(shard, source, config.max_bad_fraction, marks)
        # One writer per split and bucket. Packers and chains serve the methods that put several documents in a row.
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

    def shards(self) -> NDArray[np.void]:
        """Return the table of the shards written, SHARD_DTYPE [shards]."""
        return np.concatenate([writer.shards() for writer in self._writers.values()])

    def run(self, progress: Path) -> None:
        """Read, cut and write all documents; write the number done to the file `progress` now and then."""
        with ExitStack() as stack:
            stack.enter_context(written(progress, self._progress))
            for writer in self._writers.values():
                stack.enter_context(writer)
            for document, stream in self._streams():
                if rule := self._outside(len(stream) - 1):
                    self.ledger.leave_out(rule, len(stream) - 1)
                    continue
                split = split_of(document.digest, self._config.seed, self._config.held_out_fraction)
                self.ledger.splits[split].enter(len(stream) - 1)
                match self._config.method:
                    case "decompose":
                        self._decompose(split, document, stream)
                    case "best_fit":
                        self._best_fit(split, document, stream)
                    case "concat" | "concat_masked":
                        self._write_rows(split, self._chains[split].add(Segment(stream, document.number, 0)))
            for split in SPLITS:
                self._finish(split)
        self._reader.check()
        self.ledger.records, self.ledger.bad = self._reader.records, self._reader.bad
        self.ledger.check()

    def _outside(self, num_pairs: int) -> Filter | None:
        """Return the limit of the source that a document of `num_pairs` tokens does not keep, or None."""
        if num_pairs < self._source.min_tokens:
            return "too_short"
        return "too_long" if 0 < self._source.max_tokens < num_pairs else None

    def _progress(self) -> str:
        return f"{self.ledger.documents} {self.ledger.tokens} {self._tokenizer.at}"

    def _streams(self) -> Iterator[tuple[Document, NDArray]]:
        documents = sampled(
            self._reader.documents(), self._shard, self._source, self._config.seed, self.ledger.leave_out
        )
        return self._tokenizer.streams(documents, self._reader.reject, self.ledger.enter_word_cut)

    def _decompose(self, split: Split, document: Document, stream: NDArray) -> None:
        num_pairs = len(stream) - 1
        drawn = None
        if self._config.cut == "random":
            # The generator is the document's own, so its cuts do not depend on the documents before it.
            drawn = random.Random(document.digest + str(self._config.seed).encode())
        pieces = decompose(num_pairs, self._config.lengths, drawn)
        for piece in pieces:
            self._write_piece(split, document, stream, piece)
        done = pieces[-1].offset + pieces[-1].length if pieces else 0  # the pieces cover pairs [0, done)
        if done == num_pairs:
            return
        # The tail stream[done:] begins with the input of pair `done`.
        if self._config.rest == "pack":
            self._write_rows(
                split, self._packers[split].add(Segment(stream[done:], document.number, done)), packed=True
            )
        else:
            rule = "remainder" if pieces else "short_document"
            self.ledger.splits[split].drop(rule, num_pairs - done, whole=not pieces)

    def _best_fit(self, split: Split, document: Document, stream: NDArray) -> None:
        """Cut whole sequences from the start of a document and pack the rest, which is shorter than one."""
        num_pairs, length = len(stream) - 1, self._config.max_bucket_tokens
        for offset in range(0, num_pairs - length + 1, length):
            self._write_piece(split, document, stream, Piece(offset, length))
        if rest := num_pairs % length:
            segment = Segment(stream[num_pairs - rest :], document.number, num_pairs - rest)
            self._write_rows(split, self._packers[split].add(segment), packed=True)

    def _write_piece(self, split: Split, document: Document, stream: NDArray, piece: Piece) -> None:
        tokens = stream[piece.offset : piece.offset + piece.length + 1]  # [length + 1]
        self._writers[split, piece.length].append(tokens, [(document.number, piece.offset, 0)])
        self.ledger.splits[split].sequences[piece.length] += 1

    def _write_rows(self, split: Split, rows: Iterator[Row], *, packed: bool = False) -> None:
        for tokens, segments in rows:
            # Invariant: `start` is the position in the row at which the next segment begins.
            start, pieces = 0, []
            for segment in segments:
                pieces.append((segment.document, segment.offset, start))
                start += segment.pairs
            self._writers[split, len(tokens) - 1].append(tokens, pieces)
            self.ledger.splits[split].sequences[len(tokens) - 1] += 1
            self.ledger.splits[split].packed_sequences += packed

    def _finish(self, split: Split) -> None:
        packer, account = self._packers[split], self.ledger.splits[split]
        self._write_rows(split, packer.finish(), packed=True)
        account.filler_tokens = packer.filler
        for segment in self._chains[split].left_over:
            whole = segment.offset == 0  # the chain ends here, so a document that begins here is complete
            account.drop("end_of_input_shard", segment.pairs, whole=whole)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists and belongs to another user
    return True
