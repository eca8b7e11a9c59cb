"""Division of sources into input shards: runs of adjacent files, or parts of a file or data set, each for one process.

Files are sorted by path. This order and `input_shard_bytes` alone decide the runs, so that any number of processes
makes the same shards.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from fsspec.core import url_to_fs

from ..config import DataConfig, SourceConfig

SUFFIXES = {
    "text": ("",),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "webdataset": (".tar", ".tar.gz", ".tar.zst"),
    "tokens": (".npy", ".bin", ".raw"),
    "megatron": (".bin",),
}
"""Endings of the files that are read from a directory, by kind."""

DIVISIBLE = ("tokens", "megatron")
"""Kinds of which one file may be read in parts."""


@dataclass(frozen=True, kw_only=True)
class InputShard:
    """Input of one process: a run of files, or part `part` of the `parts` of a file or data set."""

    source: str
    """Name of the source; "web.1" is score bin 1 of the source `web` of the recipe."""

    files: tuple[str, ...] = ()
    """Paths or addresses, in order; empty for a data set."""

    size_bytes: int = 0
    """Size of all files as stored; 0 if unknown."""

    part: int = 0
    """Index of the part of the one file, or of a data set."""

    parts: int = 1
    """Number of parts of the file or data set; 1 for several files."""

    bin: int | None = None
    """Score bin whose records are read; None: the source has no bins, or the records of all are read."""

    keep_from: float | None = None
    """Smallest sampling key of a document that is kept; None: all documents are."""

    @property
    def recipe_source(self) -> str:
        """Name of the source in the recipe."""
        return self.source.partition(".")[0]  # no name in a recipe has a dot

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        """Return the input shard of a line of inputs.jsonl, in the job or beside a manifest."""
        # A line of an earlier version lacks the fields that came later.
        kept = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        return cls(**{**kept, "files": tuple(entry["files"])})


def input_shards(config: DataConfig) -> list[InputShard]:
    """Return the input shards of all sources, in order.

    Raises ValueError if a path matches no file or a data set cannot be opened.
    """
    shards = []
    for name, source in config.named_sources.items():
        runs = list(_input_shards(name, source, config.input_shard_bytes))
        for part, one in source.bins(name).items():
            shards += [replace(run, source=part, bin=one) for run in runs]
    return shards


def _input_shards(name: str, source: SourceConfig, input_shard_bytes: int) -> Iterator[InputShard]:
    """Yield the input shards that read every record of a source once."""
    if source.kind in ("hub", "disk"):
        from .kinds.data_sets import num_parts  # the import takes a second, which files need not spend

        parts = 1 if source.limit_documents else num_parts(source, input_shard_bytes)
        yield from (InputShard(source=name, part=part, parts=parts) for part in range(parts))
        return
    limit = float("inf") if source.limit_documents else input_shard_bytes
    for run in _runs(name, _sized_files(source), limit):
        divided = source.kind in DIVISIBLE and run.size_bytes > limit  # then it is one file
        parts = -(-run.size_bytes // input_shard_bytes) if divided else 1
        yield from (replace(run, part=part, parts=parts) for part in range(parts))


def _runs(name: str, files: list[tuple[str, int]], run_bytes: float) -> Iterator[InputShard]:
    """Yield runs of adjacent files, each as long as `run_bytes` allows; a larger file is a run of its own."""
    run: list[str] = []
    total = 0
    for file, size in files:
        if run and total + size > run_bytes:
            yield InputShard(source=name, files=tuple(run), size_bytes=total)
            run, total = [], 0
        run.append(file)
        total += size
    yield InputShard(source=name, files=tuple(run), size_bytes=total)


def _sized_files(source: SourceConfig) -> list[tuple[str, int]]:
    """Return the files of a source with their sizes, sorted; its path is a file, a directory or a glob."""
    if source.kind == "python_stdlib":
        return [(str(file), file.stat().st_size) for file in _standard_library()]
    try:
        filesystem, path = url_to_fs(source.path)
        if source.kind == "megatron" and not filesystem.isdir(path):
            path = path.removesuffix(".idx").removesuffix(".bin") + ".bin"  # Megatron's own tools name neither
        if filesystem.isfile(path):
            found = {path: filesystem.info(path)}
        elif filesystem.isdir(path):
            inside = filesystem.find(path, detail=True)
            # Files and folders below `path` whose names begin with "." are skipped.
            below = len(path.rstrip("/")) + 1
            found = {
                name: info
                for name, info in inside.items()
                if name.endswith(SUFFIXES[source.kind])
                and not any(part.startswith(".") for part in name[below:].split("/"))
            }
        else:
            found = {name: info for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"}
    except Exception as error:  # the library of a store may raise anything
        raise ValueError(
            f"data.source.path = {source.path!r}: cannot be listed ({error}); correct it, or install the fsspec "
            "package of its protocol"
        ) from error
    if not found:
        endings = " or ".join(ending for ending in SUFFIXES[source.kind] if ending)
        raise ValueError(
            f"data.source.path = {source.path!r}: matches no file; name a file, a glob, or a directory with "
            f"{endings or 'text'} files"
        )
    remote = "file" not in filesystem.protocol
    return [
        (str(filesystem.unstrip_protocol(name)) if remote else name, int(found[name]["size"] or 0))
        for name in sorted(found)
    ]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    return sorted(file for file in root.rglob("*.py") if installed.isdisjoint(file.relative_to(root).parts))
