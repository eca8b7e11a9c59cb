"""Documents to a prepared directory, in one or two passes over them; it appears whole or not at all."""

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .config import DataConfig
from .decompose import SPLITS, Split, bucket_lengths, decompose, split_of
from .ledger import Ledger
from .manifest import MANIFEST_FILE, UNIGRAM_FILE, Manifest, open_prepared, settings_of
from .shards import Bucket, BucketWriter, sha256_of
from .sources import Document, documents
from .tokenize import TOKENIZER_FILE, DocumentTokenizer, read_tokenizer, train_tokenizer

REPLACEMENT_CHARACTER = "\ufffd"


def prepare(config: DataConfig, console: Console) -> Manifest:
    """Make `config.directory`, or take it as it is when it was made from the same settings; return its manifest.

    Raises ValueError when the directory holds something else, when the source or the tokenizer cannot be read, and
    when no sequence comes out. Whatever is raised, the directory is as it was before.
    """
    directory = Path(config.directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        manifest = _existing(directory, config)
        console.print(f"{directory} is already prepared from these settings; using it")
        return manifest
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with _partial_directory(directory) as partial:
        with progress:
            content = _tokenizer_content(config, progress)
            (partial / TOKENIZER_FILE).write_bytes(content)
            tokenizer = DocumentTokenizer(content, config.tokenizer.boundary)
            splits, ledger, unigram = _write_sequences(config, tokenizer, partial, progress)
        np.save(partial / UNIGRAM_FILE, unigram)
        manifest = Manifest(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            boundary=tokenizer.boundary,
            boundary_id=tokenizer.boundary_id,
            dtype=tokenizer.dtype.str,
            unigram_sha256=sha256_of(partial / UNIGRAM_FILE),
            config=settings_of(config),
            splits=splits,
            ledger=ledger,
        )
        manifest.save(partial)
    return manifest


def _tokenizer_content(config: DataConfig, progress: Progress) -> bytes:
    """Return the bytes of the existing tokenizer, or of one trained on the documents that are not held out."""
    if config.tokenizer.path:
        return read_tokenizer(config.tokenizer.path)
    task = progress.add_task("training the tokenizer", total=None)
    texts = (
        document.text
        for document in _shown(documents(config.source), progress, task)
        if split_of(document.number, config.seed, config.held_out_fraction) == "train"
    )
    content = train_tokenizer(texts, config.tokenizer)
    progress.update(task, total=progress.tasks[task].completed)
    return content


def _write_sequences(
    config: DataConfig, tokenizer: DocumentTokenizer, partial: Path, progress: Progress
) -> tuple[dict[Split, tuple[Bucket, ...]], Ledger, NDArray[np.int64]]:
    """Write every split's shards; return its buckets, the ledger and the train targets' counts [vocab_size].

    Raises ValueError when there is nothing to train on.
    """
    lengths = bucket_lengths(config.min_bucket_tokens, config.max_bucket_tokens)
    ledger = Ledger()
    unigram = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    writers: dict[tuple[Split, int], BucketWriter] = {
        (split, length): BucketWriter(partial, split, length, tokenizer.dtype, config.shard_tokens)
        for split in SPLITS
        for length in lengths
    }
    # A pass that trained the tokenizer has counted the documents.
    total = progress.tasks[-1].total if progress.tasks else None
    task = progress.add_task("tokenizing, cutting, writing", total=total)
    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(writer)
        for document, stream in tokenizer.streams(_shown(documents(config.source), progress, task)):
            # An empty document is two boundaries: one pair that would teach nothing.
            num_pairs = len(stream) - 1 if len(stream) > 2 else 0
            split = split_of(document.number, config.seed, config.held_out_fraction)
            pieces = decompose(num_pairs, lengths)
            for offset, length in pieces:
                tokens = stream[offset : offset + length + 1]
                writers[split, length].append(tokens, document.number, offset)
                if split == "train":
                    np.add.at(unigram, tokens[1:], 1)
            ledger.record(split, num_pairs, pieces, replaced=REPLACEMENT_CHARACTER in document.text)
    ledger.check()
    if not ledger.splits["train"].sequences:
        raise ValueError(
            f"data.source gave {ledger.documents_in} documents with {ledger.tokens_in} tokens and not one training "
            f"sequence of at least data.min_bucket_tokens = {config.min_bucket_tokens}; add documents or lower it"
        )
    splits: dict[Split, tuple[Bucket, ...]] = {
        split: tuple(writers[split, length].bucket() for length in lengths) for split in SPLITS
    }
    return splits, ledger, unigram


def _shown(source: Iterable[Document], progress: Progress, task: TaskID) -> Iterator[Document]:
    for document in source:
        yield document
        progress.advance(task)


def _existing(directory: Path, config: DataConfig) -> Manifest:
    """Return the manifest of finished data made from `config`; ValueError for anything else."""
    if not (directory / MANIFEST_FILE).is_file():
        raise ValueError(f"data.directory = {directory} exists and is not prepared data; name another directory")
    manifest = open_prepared(directory)
    manifest.check_made_from(config)
    return manifest


@contextmanager
def _partial_directory(directory: Path) -> Iterator[Path]:
    """Give an empty directory beside `directory`; rename it to that at the end, or remove it on any exception.

    Its name carries host and process, for several may prepare on one file system; what a process of this host left
    behind when it died is removed first.
    """
    host = socket.gethostname()
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f"{directory.name}.partial-{host}-*"):
        if not _is_alive(int(leftover.name.rpartition("-")[2])):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = directory.with_name(f"{directory.name}.partial-{host}-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for path in chain(partial.rglob("*"), [partial]):
            _sync(path)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(directory.parent)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    """Ask the system to put a file's bytes, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
