"""Results of the parts of prepared or ordered data, and their merge into one manifest.

A part is an input shard of `longring prepare`, or a share of the contexts of `longring order`. Both keep these files
in `<directory>.partial/`:

    shards/000012/             tar shards of part 12
    work/counts/000012.npy     number of times each token is a target of its train split
    work/ledgers/000012.json   its ledger and its table of shards, written last: part 12 is done
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..files import sync, write_text, write_whole
from ..format.ledger import Ledger
from ..format.manifest import (
    INPUTS_FILE,
    MANIFEST_FILE,
    SHARDS_FILE,
    UNIGRAM_FILE,
    Manifest,
    file_hashes,
    open_prepared,
)
from ..format.settings import settings_of
from ..format.shards import SHARD_DTYPE, save_shard_table
from ..format.store import LocalStore
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer
from .extend import extended_by, kept_name, link_shards


def ledger_file(partial: Path, number: int) -> Path:
    """Return the file whose presence says that part `number` is done."""
    return partial / "work" / "ledgers" / f"{number:06d}.json"


def publish_part(
    partial: Path, number: int, begun: Path, ledger: Ledger, counts: NDArray[np.int64], table: NDArray[np.void]
) -> None:
    """Move the finished shards of part `number` from `begun` to their final directory, then write its other results.

    `counts` [vocab_size] are its train targets and `table` [shards] its shards. The ledger file is written last.
    """
    # The shards are on the disk before the ledger file says that the part is done.
    sync(begun)
    final = partial / "shards" / f"{number:06d}"
    # The directory exists already if a process died after this rename; it held the same bytes.
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(exist_ok=True)
    begun.rename(final)
    write_whole(_counts_file(partial, number), lambda path: np.save(path, counts))
    # [shards][fields]: plain values for JSON, which has no bytes; the SHA-256, the last field, is hexadecimal text.
    rows = [[entry[name].item() for name in entry.dtype.names] for entry in table]
    content = {"ledger": ledger.to_json(), "shards": [[*row[:-1], row[-1].decode()] for row in rows]}
    write_text(ledger_file(partial, number), json.dumps(content) + "\n")


def read_part(partial: Path, number: int) -> tuple[Ledger, NDArray[np.void]]:
    """Return the ledger and the table of shards [shards] of part `number`, which is done."""
    content = json.loads(ledger_file(partial, number).read_text())
    table = np.array([(*row[:-1], row[-1].encode()) for row in content["shards"]], dtype=SHARD_DTYPE)
    return Ledger.from_json(content["ledger"]), table


def merge_parts(
    partial: Path, numbers: Iterable[int], vocab_size: int, base: Manifest | None = None
) -> tuple[list[Ledger], NDArray[np.void]]:
    """Write unigram.npy and shards.npy of the parts of `base`, if it is given, and of parts `numbers`, which follow.

    Return the ledger of each of `numbers`, and the table of all shards [shards].
    """
    unigram = np.zeros(vocab_size, dtype=np.int64) if base is None else base.unigram()
    ledgers, tables = [], [] if base is None else [base.shards]
    # One part at a time, in order: the table is sorted by part, and memory holds one part's counts.
    for number in numbers:
        ledger, table = read_part(partial, number)
        ledgers.append(ledger)
        tables.append(table)
        unigram += np.load(_counts_file(partial, number))
    table = np.concatenate(tables)
    np.save(partial / UNIGRAM_FILE, unigram)
    save_shard_table(partial / SHARDS_FILE, table)
    return ledgers, table


def restore_parts(partial: Path, manifest: Manifest, directory: Path, numbers: Iterable[int]) -> None:
    """Move the shards of parts `numbers`, made again in `partial`, into the finished data, and remove `partial`.

    Raises ValueError, and changes nothing but `partial`, if the shards are not the ones of the manifest.
    """
    # Every part is compared with the manifest before the first file is moved.
    for number in numbers:
        _, table = read_part(partial, number)
        if not np.array_equal(table, manifest.shards[manifest.shards["input_shard"] == number]):
            shutil.rmtree(partial)
            raise cannot_restore(manifest, directory, f"input shard {number} has other bytes when made again")
    # File by file: each replaces its damaged one at once, and no reader finds the folder gone.
    for number in numbers:
        folder = directory / "shards" / f"{number:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (partial / "shards" / folder.name).iterdir():
            file.replace(folder / file.name)
        sync(folder)
    shutil.rmtree(partial)


def cannot_restore(manifest: Manifest, directory: Path, reason: object) -> ValueError:
    """Return the error of damaged data whose shards cannot be made again."""
    return ValueError(
        f"{directory}: shards are missing or damaged, and their sources are not the ones they were made from "
        f"({reason}); bring the sources back, or delete {directory}, and run `{manifest.command} RECIPE`"
    )


def merge(config: DataConfig, partial: Path) -> Manifest:
    """Write the manifest of a preparation and rename `partial` to its directory; no shard is read or moved.

    The shards of the data that is extended, if any, are linked. The merge may be killed and repeated at any point.
    Raises ValueError if an input shard is not done, or if there is no training sequence.
    """
    directory = Path(config.directory)
    if not (partial / MANIFEST_FILE).exists():
        _write_manifest(config, partial)
    give_name(partial, directory, Manifest.load(LocalStore(partial)).extends)
    return open_prepared(directory)


def give_name(partial: Path, directory: Path, before: str | None = None) -> None:
    """Rename `partial`, which has its manifest, to `directory`, and remove its folder `work`.

    Data in `directory` that is extended gets the name `before` beside it. Raises OSError if `directory` exists and is
    not empty.
    """
    sync(partial)
    # The manifest is written, so a merge that is killed here and repeated reads nothing in `work`.
    shutil.rmtree(partial / "work", ignore_errors=True)
    if before is not None and (directory / MANIFEST_FILE).exists():
        # If this process ends between the two renames, the next merge finds no directory and does the second.
        directory.rename(directory.with_name(before))
    elif directory.exists():
        directory.rmdir()
    partial.rename(directory)
    sync(directory.parent)


def _write_manifest(config: DataConfig, partial: Path) -> None:
    base = extended_by(config)
    tokenizer = DocumentTokenizer((partial / TOKENIZER_FILE).read_bytes(), config.tokenizer.boundary)
    with (partial / "work" / INPUTS_FILE).open(encoding="utf-8") as lines:
        inputs = [json.loads(line) for line in lines]
    first = 0 if base is None else sum(base.sources.values())
    if missing := [number for number in range(first, len(inputs)) if not ledger_file(partial, number).exists()]:
        raise ValueError(
            f"data.directory = {config.directory}: input shards {', '.join(map(str, missing[:5]))}"
            f"{' and others' if missing[5:] else ''} of {len(inputs)} are not prepared; run `longring prepare RECIPE` "
            "to continue"
        )
    ledgers, table = merge_parts(partial, range(first, len(inputs)), tokenizer.vocab_size, base)
    entries = [] if base is None else base.inputs()
    by_source = {} if base is None else dict(base.ledgers)
    for shard, one in zip(inputs[first:], ledgers, strict=True):
        by_source.setdefault(shard["source"], Ledger()).add(one)
        entries.append({**shard, "records": one.records, "documents": one.documents, "tokens": one.tokens})
    (partial / INPUTS_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    _check_trained(config, by_source)
    if base is not None:
        link_shards(base, partial)
    manifest = Manifest(
        files=file_hashes(partial),
        vocab_size=tokenizer.vocab_size,
        boundary=tokenizer.boundary,
        boundary_id=tokenizer.boundary_id,
        dtype=tokenizer.dtype.str,
        config=settings_of(config),
        lengths=config.lengths,
        has_boundaries=config.has_boundaries,
        # The input shards of a source are adjacent, so that their number alone gives the source of a shard. Sources
        # that are added come last, wherever they stand in the recipe.
        sources=dict(Counter(entry["source"] for entry in entries)),
        extends=None if base is None else kept_name(base, Path(config.directory)),
        ledgers=by_source,
        shards=table,
        store=LocalStore(partial),
    )
    manifest.write(partial)


def _check_trained(config: DataConfig, ledgers: dict[str, Ledger]) -> None:
    """Raise ValueError if the data has no training sequence; `ledgers` are those of its sources, and add up."""
    for ledger in ledgers.values():
        ledger.check()
    if not any(ledger.splits["train"].sequences for ledger in ledgers.values()):
        key = "min_bucket_tokens" if config.method == "decompose" else "max_bucket_tokens"
        documents, tokens = (sum(getattr(one, name) for one in ledgers.values()) for name in ("documents", "tokens"))
        raise ValueError(
            f"data.{key} = {config.lengths[0]}: {documents} documents with {tokens} tokens give no training sequence "
            "of this length; lower it, or add documents"
        )


def _counts_file(partial: Path, number: int) -> Path:
    return partial / "work" / "counts" / f"{number:06d}.npy"
