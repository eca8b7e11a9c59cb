"""Manifest of prepared data, written by `longring prepare` and `longring order`, and checked when read.

`manifest.json` holds the settings, the hashes of the files beside it and the ledger: some kB, whatever the corpus.
`shards.npy` is a table of all shards, 113 bytes each; each shard has an index of its own samples.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig, LoaderConfig
from ..files import read_patiently, sha256_of, sha256_of_json, sync, write_text
from ..order_config import OrderConfig
from .arrays import read_array
from .bucket import Bucket, Part
from .content import checked_content, read_inputs, read_json
from .damage import DamagedDataError, wrong_hash, wrong_size
from .document import Split
from .ledger import Ledger
from .reader import SequenceReader
from .settings import differences, settings_of
from .shards import load_shard_table, shard_name
from .store import LocalStore, Store, open_store
from .tokenizer import TOKENIZER_FILE, DocumentTokenizer

FORMAT_VERSION = 3
"""Version 2 had one ledger for all sources, and mixed them in ordered data; both versions are read."""

READ_VERSIONS = (2, FORMAT_VERSION)
MANIFEST_FILE = "manifest.json"
SHARDS_FILE = "shards.npy"
INPUTS_FILE = "inputs.jsonl"
UNIGRAM_FILE = "unigram.npy"
REPORT_FILE = "order.json"
"""Report of an ordering; only ordered data has it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """Content of `manifest.json`, and the table of shards."""

    format_version: int = FORMAT_VERSION

    files: dict[str, str]
    """SHA-256 of each file beside the manifest, by name. `unigram.npy`: number of times each token is a target in the
    train split, int64 [vocab_size]. `inputs.jsonl`: files, records, documents and tokens of each input shard."""

    vocab_size: int
    """One past the highest token id."""

    boundary: str
    """Name of the special token that opens and closes every document."""

    boundary_id: int
    """Id of the boundary token."""

    dtype: str
    """Type of stored tokens, as numpy writes it: "<u2" or "<u4"."""

    config: dict[str, Any]
    """DataConfig of the data, without the directory, so that moving the data does not change it."""

    lengths: tuple[int, ...]
    """Lengths of the buckets, ascending."""

    has_boundaries: bool
    """Whether sequences may hold several documents that attention must keep apart."""

    sources: dict[str, int]
    """Number of input shards of each source, in order; of ordered data, the number of its parts."""

    order: dict[str, Any] | None = None
    """OrderConfig of data made by `longring order`, without the directories; None for data made by `longring prepare`.
    The documents of ordered data are numbered as records of all input shards, in the order of inputs.jsonl."""

    extends: str | None = None
    """Name of the directory, beside that of this data, with the data of fewer sources that it was extended from."""

    ledgers: dict[str, Ledger]
    """Account of every record and token of each source, by name. Data of format version 2 has one account for all its
    sources, under their names joined."""

    shards: NDArray[np.void] = field(repr=False)
    """Table of all shards, SHARD_DTYPE [shards]."""

    store: Store = field(repr=False)
    """Storage of the data."""

    @cached_property
    def ledger(self) -> Ledger:
        """Account of every record and token of all sources."""
        total = Ledger()
        for ledger in self.ledgers.values():
            total.add(ledger)
        return total

    @property
    def needs_starts(self) -> bool:
        """Whether the trainer needs document boundaries, for masks or for RoPE resets."""
        return self.has_boundaries or bool(self.order and self.order["position_resets"])

    def write(self, directory: Path) -> None:
        """Write `manifest.json` to `directory` by `write_whole`, after flushing the `files` there to the disk."""
        content = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("shards", "store")
        }
        content["ledgers"] = {name: ledger.to_json() for name, ledger in self.ledgers.items()}
        content["sha256"] = sha256_of_json(json.loads(json.dumps(content)))  # as it will be read: JSON keys are text
        for name in self.files:
            sync(directory / name)
        text = json.dumps(content, indent=1) + "\n"
        write_text(directory / MANIFEST_FILE, text)

    @classmethod
    def load(cls, store: Store) -> "Manifest":
        """Read the manifest and the table of shards.

        Raises ValueError if one of the files is missing, is damaged or has another format version.
        """
        where = f"{store.name}/{MANIFEST_FILE}"
        file = store.path(MANIFEST_FILE)
        if not read_patiently(file, file.is_file):
            # Both commands refuse a directory that holds other files.
            other_files = isinstance(store, LocalStore) and file.parent.is_dir() and any(file.parent.iterdir())
            first = "name another directory, or delete this one if nothing in it is needed, and " if other_files else ""
            raise ValueError(
                f"{where}: does not exist, so {store.name} is not prepared data; {first}run {_makers(store, None)}"
            )
        content: Any = None
        try:
            content = read_json(file, MANIFEST_FILE)
            version = content["format_version"]
            if version in READ_VERSIONS:
                # Data prepared by earlier versions has no SHA-256 of its own.
                if (claimed := content.pop("sha256", None)) not in (None, (found := sha256_of_json(content))):
                    raise ValueError(f"SHA-256 is {found}, {claimed} in the manifest itself")
                content = checked_content(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where}: damaged ({reason:.300}); {_advice(store, content)}") from error
        if version not in READ_VERSIONS:
            raise ValueError(
                f"{where}: format_version = {version!r:.40}, and this LongRing reads version {FORMAT_VERSION}; "
                f"{_advice(store, content)}"
            )
        advice = _advice(store, content)
        # Every file is hashed before any is used.
        files = {name: _checked(store, name, sha256, advice) for name, sha256 in content["files"].items()}
        with _advised(advice):
            shards = load_shard_table(files[SHARDS_FILE], content["lengths"], sum(content["sources"].values()))
        return cls(**content, shards=shards, store=store)

    @property
    def command(self) -> str:
        """The command that made the data, and that repairs it."""
        return _command(self.order)

    def named_sources(self) -> dict[str, Any]:
        """Return the settings of the sources by name, as `DataConfig.named_sources` has them."""
        return self.config["sources"] or {"documents": self.config["source"]}

    def buckets(self, split: Split) -> tuple[Bucket, ...]:
        """Return the buckets of a split, shortest first, including buckets without sequences."""
        ends = np.cumsum(list(self.sources.values()))  # [sources]: one past the last input shard of each
        buckets = []
        for length in self.lengths:
            chosen = (self.shards["length"] == length) & (self.shards["held_out"] == (split == "held_out"))
            shards = self.shards[chosen]
            source = np.searchsorted(ends, shards["input_shard"], side="right")  # [shards], ascending
            # [sources + 1]: the shards of source s are bounds[s], ..., bounds[s + 1] - 1.
            bounds = np.searchsorted(source, np.arange(len(ends) + 1)).tolist()
            parts = (
                Part(
                    source=name,
                    first_shard=first,
                    num_shards=last - first,
                    sequences=int(shards["sequences"][first:last].sum()),
                )
                for name, first, last in zip(self.sources, bounds, bounds[1:], strict=False)
            )
            buckets.append(Bucket(length=length, shards=shards, parts=tuple(parts)))
        return tuple(buckets)

    def reader(self, bucket: Bucket) -> SequenceReader:
        """Return random access to the sequences of one bucket."""
        dtype = np.dtype(self.dtype)
        return SequenceReader(self.store, bucket.length, bucket.shards, dtype, self.vocab_size, self.command)

    def tokenizer(self) -> DocumentTokenizer:
        """Return the tokenizer that made the tokens. Raises ValueError if its file is not a tokenizer."""
        return DocumentTokenizer(self.tokenizer_json().encode(), self.boundary, f"{self.store.name}/{TOKENIZER_FILE}")

    def tokenizer_json(self) -> str:
        """Return the content of the `tokenizer.json` that made the tokens."""
        file = self.store.path(TOKENIZER_FILE, self.files[TOKENIZER_FILE])
        return read_patiently(file, lambda: file.read_text("utf-8"))

    def unigram(self) -> NDArray[np.int64]:
        """Return the number of times each token is a target in the train split, int64 [vocab_size]."""
        file = self.store.path(UNIGRAM_FILE, self.files[UNIGRAM_FILE])
        with _advised(_advice(self.store, vars(self))):
            return read_array(file, np.dtype(np.int64), (self.vocab_size,))

    def inputs(self) -> list[dict[str, Any]]:
        """Return source, files, records, documents and tokens of each input shard: the lines of inputs.jsonl.

        Raises ValueError if a line is not that of an input shard.
        """
        file = self.store.path(INPUTS_FILE, self.files[INPUTS_FILE])
        with _advised(_advice(self.store, vars(self))):
            return read_inputs(file, None if self.order is not None else sum(self.sources.values()))

    def origin(self, input_shard: int, record: int) -> str:
        """Return the source and, if known, the file of a record that `SequenceReader.pieces` names."""
        inputs = self.inputs()
        if self.order is not None:
            # Ordered data numbers the records of all input shards consecutively.
            first = np.cumsum([0, *(entry["records"] for entry in inputs)])
            input_shard = min(int(np.searchsorted(first, record, side="right")), len(inputs)) - 1
            record -= int(first[input_shard])
        shard = inputs[input_shard]
        where = f"record {record} of source {shard['source']!r}, input shard {input_shard}"
        source = self.named_sources().get(shard["source"].partition(".")[0], {})  # "web.1" is a score bin of web
        files = shard["files"]
        if source.get("kind") in ("python_stdlib", "text") and record < len(files):  # one document per file
            return f"{where}: {files[record]}"
        return f"{where}: {files[0]}" if len(files) == 1 else where

    def check_made_from(self, config: DataConfig, order: OrderConfig | None = None) -> None:
        """Raise ValueError, naming the first setting that differs, unless `config` and `order` describe this data."""
        if self.extends and (fewer := config.named_sources.keys()) < self.named_sources().keys():
            added = ", ".join(name for name in self.named_sources() if name not in fewer)
            beside, slash, _ = self.store.name.rstrip("/").rpartition("/")
            raise ValueError(
                f"data.directory = {config.directory}: has been extended by {added}; set it to "
                f"{beside}{slash}{self.extends}, the data before, or add these sources to the recipe"
            )
        now, name, directory = {"data": settings_of(config), "order": None}, "data.directory", config.directory
        if order is not None and order.mode != "off":
            now["order"], name, directory = settings_of(order), "order.directory", order.directory
        for table, before in (("data", self.config), ("order", self.order)):
            for key, then, wanted in differences(table, before, now[table]):
                raise ValueError(
                    f"{key} = {wanted!r:.200}: {name} = {directory} was made with {then!r:.200}; set it back, name "
                    f"another {name}, or delete {directory} and run `{_command(now['order'])} RECIPE`"
                )
        follow = {"lengths": config.lengths, "has_boundaries": config.has_boundaries}
        if self.order is not None and order is not None:
            follow = {"lengths": order.lengths(config), "has_boundaries": order.document_masks}
        for key, expected in follow.items():
            if (found := getattr(self, key)) != expected:
                raise ValueError(
                    f"{self.store.name}/{MANIFEST_FILE}: {key} = {found!r:.200}, and these settings make {expected}; "
                    f"{_advice(self.store, vars(self))}"
                )

    def check_sizes(self) -> None:
        """Raise ValueError if a shard is missing or has another size; a shard of the right size is not read."""
        for _, error in self.damaged_shards():
            raise error

    def damaged_shards(self, *, verify: bool = False) -> Iterator[tuple[int, DamagedDataError]]:
        """Yield (input shard, error) of each shard that is missing or has another size or, if `verify`, SHA-256."""

        def find(entry: Any) -> DamagedDataError | None:
            size_bytes, sha256 = int(entry["size_bytes"]), entry["sha256"].decode()
            file = self.store.path(shard_name(entry).path(), sha256, size_bytes)
            error = read_patiently(file, lambda: wrong_size(file, size_bytes, sha256, self.command))
            if error is None and verify:
                found = read_patiently(file, lambda: sha256_of(file))
                error = wrong_hash(file, found, sha256, self.command)
            return error

        with ThreadPoolExecutor() as pool:
            # Hashing releases the GIL; a look at a size is not worth a thread.
            found = pool.map(find, self.shards) if verify else map(find, self.shards)
            for entry, error in zip(self.shards, found, strict=True):
                if error is not None:
                    yield int(entry["input_shard"]), error

    def verify(self) -> Iterator[int]:
        """Read every shard and yield the bytes read so far.

        Raises ValueError at a shard that is missing or has another SHA-256 than the manifest says.
        """
        if isinstance(self.store, LocalStore):
            self.check_sizes()  # a shard cut short is found before the others are read
        done = 0
        for entry in self.shards:
            name, size_bytes = shard_name(entry).path(), int(entry["size_bytes"])
            advice = f"run `{self.command} RECIPE --verify`, which makes it again"
            _checked(self.store, name, entry["sha256"].decode(), advice, size_bytes)
            done += size_bytes
            yield done


def open_prepared(directory: str | Path, loader: LoaderConfig | None = None, *, check_shards: bool = True) -> Manifest:
    """Return the manifest of prepared data after the checks that read no shard.

    Raises ValueError if a file beside the manifest is missing or damaged, if the format version differs, or, with
    `check_shards`, if a shard of a local directory is missing or has another size. Shards of a remote directory are
    checked when they are downloaded; `Manifest.verify` reads all shards.
    """
    manifest = Manifest.load(open_store(directory, loader))
    if check_shards and isinstance(manifest.store, LocalStore):
        manifest.check_sizes()
    return manifest


def file_hashes(directory: Path, *others: str) -> dict[str, str]:
    """Return the SHA-256 of each file beside a manifest, `others` included, by name."""
    names = (TOKENIZER_FILE, UNIGRAM_FILE, SHARDS_FILE, INPUTS_FILE, *others)
    return {name: sha256_of(directory / name) for name in names}


def _command(order: dict[str, Any] | None) -> str:
    return "longring prepare" if order is None else "longring order"


def _advice(store: Store, content: Any) -> str:
    """Return the advice for a damaged file of prepared data; `content` is the manifest, or None if it is unreadable."""
    if not isinstance(store, LocalStore):
        return f"copy the prepared directory to {store.name} again"
    return f"delete {store.name} and run {_makers(store, content)}"


def _makers(store: Store, content: Any) -> str:
    """Return the command that made the data: `content` of the manifest names it, else a file beside the manifest.

    Without either, both commands are returned.
    """
    if isinstance(content, dict) and "order" in content:
        return f"`{_command(content['order'])} RECIPE`"
    if isinstance(store, LocalStore) and store.path(REPORT_FILE).is_file():
        return "`longring order RECIPE`"
    if isinstance(store, LocalStore) and store.path(SHARDS_FILE).is_file():
        return "`longring prepare RECIPE`"
    return "`longring prepare RECIPE`, or `longring order RECIPE` if it is the order.directory"


@contextmanager
def _advised(advice: str) -> Iterator[None]:
    """Append `advice` to the ValueError of a file that is read in the context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error


def _checked(store: Store, name: str, sha256: str, advice: str, size_bytes: int = 0) -> Path:
    """Return the path of file `name`; raise ValueError with `advice` if it is missing or has another SHA-256."""
    file = store.path(name, sha256, size_bytes)
    if not read_patiently(file, file.is_file):
        raise ValueError(f"{file}: missing; {advice}")
    if (found := read_patiently(file, lambda: sha256_of(file))) != sha256:
        # A damaged copy in the cache of a remote store is downloaded again.
        file = store.path(name, sha256, size_bytes, anew=True)
        if isinstance(store, LocalStore):
            raise ValueError(f"{file}: SHA-256 is {found}, {sha256} in the manifest; {advice}")
    return file
