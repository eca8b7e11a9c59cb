"""What a prepared directory holds: its manifest, read back with checks that name the file and both values."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import DataConfig
from .decompose import SPLITS, Split
from .ledger import Ledger
from .shards import Block, Bucket, SequenceReader, Shard, sha256_of
from .tokenize import TOKENIZER_FILE, DocumentTokenizer

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
UNIGRAM_FILE = "unigram.npy"
AGAIN = "run longring prepare again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`: about 30 bytes for each block of 2^17 tokens, and 2 kB besides."""

    format_version: int = FORMAT_VERSION

    tokenizer_sha256: str
    """Of `tokenizer.json` beside the manifest."""

    vocab_size: int
    """One past the highest token id."""

    boundary: str
    """Name of the token that opens and closes every document."""

    boundary_id: int
    """Its id."""

    dtype: str
    """Of stored tokens, as numpy writes it: "<u2" or "<u4"."""

    unigram_sha256: str
    """Of `unigram.npy`: how often each token is a target in the train split, int64 [vocab_size]."""

    config: dict[str, Any]
    """The DataConfig that made it, without the directory: moving the data does not change it."""

    splits: dict[Split, tuple[Bucket, ...]]
    """The buckets of each split, shortest first; a bucket without sequences is there too."""

    ledger: Ledger
    """Where every token went."""

    def save(self, directory: Path) -> None:
        """Write `manifest.json`."""
        splits = {split: [asdict(bucket) for bucket in buckets] for split, buckets in self.splits.items()}
        content = {**vars(self), "splits": splits, "ledger": self.ledger.to_json()}
        (directory / MANIFEST_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read `manifest.json`; ValueError when it is missing, unreadable or of another format version."""
        file = directory / MANIFEST_FILE
        if not file.is_file():
            raise ValueError(f"{file} does not exist, so {directory} is not prepared data; {AGAIN}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version == FORMAT_VERSION:
                content["splits"] = {split: tuple(map(_bucket, content["splits"][split])) for split in SPLITS}
                return cls(**{**content, "ledger": Ledger.from_json(content["ledger"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); {AGAIN}") from error
        raise ValueError(f"{file} has format version {version}, this LongRing reads {FORMAT_VERSION}; {AGAIN}")

    def check_made_from(self, config: DataConfig) -> None:
        """Raise ValueError, naming the first setting that differs, unless `config` makes just this data."""
        difference = next(_differences("data", self.config, settings_of(config)), None)
        if difference is not None:
            key, before, now = difference
            raise ValueError(
                f"data.directory = {config.directory} was prepared with {key} = {before!r}, not {now!r}; "
                "name another directory, or delete this one to prepare it anew"
            )

    def reader(self, directory: Path, bucket: Bucket) -> SequenceReader:
        """Return random access to one bucket's sequences."""
        return SequenceReader(directory, bucket, np.dtype(self.dtype))

    def tokenizer(self, directory: Path) -> DocumentTokenizer:
        """Return the tokenizer that made the tokens."""
        return DocumentTokenizer((directory / TOKENIZER_FILE).read_bytes(), self.boundary)

    def unigram(self, directory: Path) -> NDArray[np.int64]:
        """Return how often each token is a target in the train split: [vocab_size]."""
        return np.load(directory / UNIGRAM_FILE)

    def verify(self, directory: Path) -> None:
        """Read every shard and `unigram.npy` and raise ValueError where a SHA-256 differs from the manifest's."""
        hashes = {
            shard.file: shard.sha256 for split in SPLITS for bucket in self.splits[split] for shard in bucket.shards
        }
        for name, expected in {UNIGRAM_FILE: self.unigram_sha256, **hashes}.items():
            _expect_sha256(directory / name, expected)


def open_prepared(directory: str | Path) -> Manifest:
    """Return the manifest of prepared data after the checks that cost no reading of shards.

    Raises ValueError naming the file and both values when the format version or the tokenizer differs, or a shard is
    missing or has another size. `Manifest.verify` also reads the shards.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    for name in (TOKENIZER_FILE, UNIGRAM_FILE):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing; {AGAIN}")
    _expect_sha256(directory / TOKENIZER_FILE, manifest.tokenizer_sha256)
    for buckets in manifest.splits.values():
        for shard in (shard for bucket in buckets for shard in bucket.shards):
            file = directory / shard.file
            if not file.is_file():
                raise ValueError(f"{file} is missing, {shard.size_bytes} bytes in the manifest; {AGAIN}")
            if (size := file.stat().st_size) != shard.size_bytes:
                raise ValueError(f"{file} has {size} bytes, {shard.size_bytes} in the manifest; {AGAIN}")
    return manifest


def settings_of(config: DataConfig) -> dict[str, Any]:
    """Return what decides the content of prepared data: all of the configuration but its place."""
    settings = asdict(config)
    del settings["directory"]
    return settings


def _differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now | before:
            yield from _differences(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def _expect_sha256(file: Path, expected: str) -> None:
    if (found := sha256_of(file)) != expected:
        raise ValueError(f"{file} has SHA-256 {found}, {expected} in the manifest; {AGAIN}")


def _bucket(entry: dict[str, Any]) -> Bucket:
    shards = (
        Shard(**{**shard, "blocks": tuple(Block(*block) for block in shard["blocks"])}) for shard in entry["shards"]
    )
    return Bucket(length=entry["length"], sequences=entry["sequences"], shards=tuple(shards))
