"""The end of a preparation: the books of all input shards become one manifest, and the directory appears."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..files import sync
from ..format.ledger import Ledger
from ..format.manifest import (
    INPUTS_FILE,
    MANIFEST_FILE,
    SHARDS_FILE,
    UNIGRAM_FILE,
    Manifest,
    file_hashes,
    open_prepared,
    settings_of,
)
from ..format.shards import SHARD_DTYPE
from ..format.store import LocalStore
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer
from .input_shard import books_file, counts_file


def merge(config: DataConfig, partial: Path) -> Manifest:
    """Write the manifest and give the directory its name; no shard is read or moved.

    It may be killed and repeated at any point. Raises ValueError when an input shard is not done, or when nothing came
    out to train on.
    """
    directory = Path(config.directory)
    if not (partial / MANIFEST_FILE).exists():
        _write_manifest(config, partial)
    give_name(partial, directory)
    return open_prepared(directory)


def give_name(partial: Path, directory: Path) -> None:
    """Let finished data appear; its manifest is there, so nothing of the work is needed again."""
    sync(partial)
    shutil.rmtree(partial / "work", ignore_errors=True)
    if directory.exists():
        directory.rmdir()  # an empty one may be filled
    partial.rename(directory)
    sync(directory.parent)


def _write_manifest(config: DataConfig, partial: Path) -> None:
    tokenizer = DocumentTokenizer((partial / TOKENIZER_FILE).read_bytes(), config.tokenizer.boundary)
    with (partial / "work" / INPUTS_FILE).open(encoding="utf-8") as lines:
        inputs = [json.loads(line) for line in lines]
    missing = [number for number in range(len(inputs)) if not books_file(partial, number).exists()]
    if missing:
        raise ValueError(
            f"data.directory = {config.directory}: input shards {', '.join(map(str, missing[:5]))}"
            f"{' and others' if missing[5:] else ''} of {len(inputs)} are not prepared; prepare again to go on"
        )
    ledger = Ledger()
    unigram = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    tables = []
    with (partial / INPUTS_FILE).open("w", encoding="utf-8") as lines:
        for number, shard in enumerate(inputs):
            books = json.loads(books_file(partial, number).read_text())
            one = Ledger.from_json(books["ledger"])
            ledger.add(one)
            tables.append(np.array([(*row[:-1], row[-1].encode()) for row in books["shards"]], dtype=SHARD_DTYPE))
            unigram += np.load(counts_file(partial, number))
            entry = {**shard, "records": one.records, "documents": one.documents, "tokens": one.tokens}
            lines.write(json.dumps(entry) + "\n")
    ledger.check()
    if not ledger.splits["train"].sequences:
        raise ValueError(
            f"data.source gave {ledger.documents} documents with {ledger.tokens} tokens and not one training sequence "
            f"of at least {config.lengths[0]} tokens (data.min_bucket_tokens, or data.max_bucket_tokens for a "
            "baseline); add documents or lower it"
        )
    table = np.concatenate(tables)
    np.save(partial / UNIGRAM_FILE, unigram)
    np.save(partial / SHARDS_FILE, table)
    # A source's input shards lie together, so their numbers alone say whose a shard is.
    counts = Counter(shard["source"] for shard in inputs)
    manifest = Manifest(
        files=file_hashes(partial),
        vocab_size=tokenizer.vocab_size,
        boundary=tokenizer.boundary,
        boundary_id=tokenizer.boundary_id,
        dtype=tokenizer.dtype.str,
        config=settings_of(config),
        lengths=config.lengths,
        has_boundaries=config.has_boundaries,
        sources={name: counts[name] for name in config.named_sources},
        ledger=ledger,
        shards=table,
        store=LocalStore(partial),
    )
    manifest.write(partial)
