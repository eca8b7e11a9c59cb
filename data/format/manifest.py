"""What a prepared directory holds: its manifest, read back with checks that name the file and both values.

`manifest.json` has the settings, the hashes of the files beside it and the ledger: some kB, whatever the corpus.
`shards.npy` is a table of all shards, 113 bytes each; where each block lies in a shard, the shard itself says.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig, LoaderConfig
from ..files import sha256_of, sha256_of_json, sync, write_text
from ..order_config import OrderConfig
from .document import Split
from .ledger import Ledger
from .reader import SequenceReader
from .shards import SHARD_DTYPE, shard_name
from .store import LocalStore, Store, differs, open_store
from .tokenizer import TOKENIZER_FILE, DocumentTokenizer

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SHARDS_FILE = "shards.npy"
INPUTS_FILE = "inputs.jsonl"
UNIGRAM_FILE = "unigram.npy"
AGAIN = "run longring prepare again"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source's sequences in a bucket: adjacent shards of its table."""

    source: str
    first_shard: int
    num_shards: int
    sequences: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """All sequences of one length in one split."""

    length: int
    shards: NDArray[np.void]
    """The bucket's part of the table, SHARD_DTYPE, ordered by input shard."""

    parts: tuple[Part, ...]
    """The sources in order; one without sequences is there too."""

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return sum(part.sequences for part in self.parts)

    @property
    def tokens(self) -> int:
        """Trained tokens in the bucket: `length` for each sequence, though length + 1 are stored."""
        return self.length * self.sequences


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The content of `manifest.json`, and the table of shards."""

    format_version: int = FORMAT_VERSION

    files: dict[str, str]
    """SHA-256 of the files beside the manifest. `unigram.npy`: how often each token is a target in the train split,
    int64 [vocab_size]. `inputs.jsonl`: what every input shard read and gave."""

    vocab_size: int
    """One past the highest token id."""

    boundary: str
    """Name of the token that opens and closes every document."""

    boundary_id: int
    """Its id."""

    dtype: str
    """Of stored tokens, as numpy writes it: "<u2" or "<u4"."""

    config: dict[str, Any]
    """The DataConfig that made it, without the directory: moving the data does not change it."""

    lengths: tuple[int, ...]
    """Of the buckets, ascending."""

    has_boundaries: bool
    """Whether sequences may hold several documents that attention must keep apart."""

    sources: dict[str, int]
    """The sources in order, and how many input shards each has; of ordered data one, as contexts mix them."""

    order: dict[str, Any] | None = None
    """The OrderConfig by which `longring order` arranged it, without the directories; None for data as prepared. The
    documents of ordered data are numbered as records of all input shards together, in the order of inputs.jsonl."""

    ledger: Ledger
    """Where every token went."""

    shards: NDArray[np.void] = field(repr=False)
    """The table, SHARD_DTYPE."""

    store: Store = field(repr=False)
    """Where the data lies."""

    @property
    def needs_starts(self) -> bool:
        """Whether who trains has to know where documents begin: for masks, or for positions."""
        return self.has_boundaries or bool(self.order and self.order["position_resets"])

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into the directory, whole, when the `files`, which are there, are on the disk."""
        content = {**vars(self), "ledger": self.ledger.to_json()}
        del content["shards"], content["store"]
        content["sha256"] = sha256_of_json(json.loads(json.dumps(content)))  # as it will be read: keys become text
        for name in self.files:
            sync(directory / name)
        text = json.dumps(content, indent=1) + "\n"
        write_text(directory / MANIFEST_FILE, text)

    @classmethod
    def load(cls, store: Store) -> "Manifest":
        """Read the manifest; ValueError when it is missing, unreadable or of another format version."""
        where = f"{store.name}/{MANIFEST_FILE}"
        file = store.path(MANIFEST_FILE)
        if not file.is_file():
            raise ValueError(f"{where} does not exist, so {store.name} is not prepared data; {AGAIN}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version == FORMAT_VERSION:
                # Data prepared by earlier versions has none.
                if (claimed := content.pop("sha256", None)) not in (None, (found := sha256_of_json(content))):
                    raise TypeError(f"its content has SHA-256 {found}, {claimed} in itself")
                files = {name: _checked(store, name, sha256) for name, sha256 in content["files"].items()}
                return cls(
                    **{
                        **content,
                        "lengths": tuple(content["lengths"]),
                        "ledger": Ledger.from_json(content["ledger"]),
                        "shards": np.load(files[SHARDS_FILE]).astype(SHARD_DTYPE, copy=False),
                        "store": store,
                    }
                )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is damaged ({error!r}); {AGAIN}") from error
        raise ValueError(f"{where} has format version {version}, this LongRing reads {FORMAT_VERSION}; {AGAIN}")

    def buckets(self, split: Split) -> tuple[Bucket, ...]:
        """Return the split's buckets, shortest first; one without sequences is there too."""
        ends = np.cumsum(list(self.sources.values()))
        buckets = []
        for length in self.lengths:
            chosen = (self.shards["length"] == length) & (self.shards["held_out"] == (split == "held_out"))
            shards = self.shards[chosen]
            source = np.searchsorted(ends, shards["input_shard"], side="right")
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
        """Return random access to one bucket's sequences."""
        return SequenceReader(self.store, bucket.length, bucket.shards, np.dtype(self.dtype))

    def tokenizer(self) -> DocumentTokenizer:
        """Return the tokenizer that made the tokens."""
        content = self.store.path(TOKENIZER_FILE, self.files[TOKENIZER_FILE]).read_bytes()
        return DocumentTokenizer(content, self.boundary)

    def unigram(self) -> NDArray[np.int64]:
        """Return how often each token is a target in the train split: [vocab_size]."""
        return np.load(self.store.path(UNIGRAM_FILE, self.files[UNIGRAM_FILE]))

    def inputs(self) -> list[dict[str, Any]]:
        """Return what every input shard read and gave: inputs.jsonl."""
        with self.store.path(INPUTS_FILE, self.files[INPUTS_FILE]).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def origin(self, input_shard: int, record: int) -> str:
        """Return the words for a record, as `SequenceReader.pieces` tells it."""
        inputs = self.inputs()
        if self.order is not None:
            first = np.cumsum([0, *(entry["records"] for entry in inputs)])
            input_shard = int(np.searchsorted(first, record, side="right")) - 1
            record -= int(first[input_shard])
        shard = inputs[input_shard]
        where = f"record {record} of source {shard['source']!r}, input shard {input_shard}"
        source = (self.config["sources"] or {"documents": self.config["source"]})[shard["source"]]
        if source["kind"] in ("python_stdlib", "text"):  # a document a file
            return f"{where}: {shard['files'][record]}"
        return f"{where}: {shard['files'][0]}" if len(shard["files"]) == 1 else where

    def check_made_from(self, config: DataConfig, order: OrderConfig | None = None) -> None:
        """Raise ValueError, naming the first setting that differs, unless `config` and `order` make just this data."""
        now, directory = {"data": settings_of(config), "order": None}, f"data.directory = {config.directory}"
        if order is not None and order.mode != "off":
            now["order"], directory = settings_of(order), f"order.directory = {order.directory}"
        for table, before in (("data", self.config), ("order", self.order)):
            for key, then, asked in differences(table, before, now[table]):
                raise ValueError(
                    f"{directory} was prepared with {key} = {then!r}, not {asked!r}; "
                    "name another directory, or delete this one to prepare it anew"
                )

    def check_sizes(self) -> None:
        """Raise ValueError when a shard is missing, or has another size; nothing is read unless one has."""
        for entry in self.shards:
            name, sha256 = shard_name(entry).path(), entry["sha256"].decode()
            file = self.store.path(name, sha256)
            if not file.is_file():
                raise ValueError(f"{file} is missing, {entry['size_bytes']} bytes in the manifest; {AGAIN}")
            if file.stat().st_size != entry["size_bytes"]:
                raise ValueError(differs(file, file, sha256))

    def verify(self) -> Iterator[int]:
        """Read every shard, yielding the bytes done so far; ValueError where a SHA-256 differs from the manifest's."""
        done = 0
        for entry in self.shards:
            _checked(self.store, shard_name(entry).path(), entry["sha256"].decode())
            done += int(entry["size_bytes"])
            yield done


def open_prepared(directory: str | Path, loader: LoaderConfig | None = None, *, check_shards: bool = True) -> Manifest:
    """Return the manifest of prepared data after the checks that cost no reading of shards.

    Raises ValueError naming the file and both values when the format version or a hash differs, or, if asked to check
    them, a shard of a local directory is missing or has another size. Shards from elsewhere are checked as they come;
    `Manifest.verify` reads all.
    """
    manifest = Manifest.load(open_store(directory, loader))
    if check_shards and isinstance(manifest.store, LocalStore):
        manifest.check_sizes()
    return manifest


def settings_of(config: DataConfig | OrderConfig) -> dict[str, Any]:
    """Return what decides the content of prepared or ordered data: all of the configuration but its place."""
    return {key: value for key, value in asdict(config).items() if key not in ("directory", "work_directory")}


def differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value now) of every setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now | before:
            yield from differences(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def file_hashes(directory: Path, *others: str) -> dict[str, str]:
    """Return the SHA-256 of each file that stands beside a manifest, the `others` included."""
    names = (TOKENIZER_FILE, UNIGRAM_FILE, SHARDS_FILE, INPUTS_FILE, *others)
    return {name: sha256_of(directory / name) for name in names}


def _checked(store: Store, name: str, sha256: str) -> Path:
    file = store.path(name, sha256)
    if not file.is_file():
        raise ValueError(f"{file} is missing; {AGAIN}")
    if sha256_of(file) != sha256:
        raise ValueError(differs(f"{store.name}/{name}", file, sha256))
    return file
