"""Extension of finished data by further sources: what is made stays, and its shards are linked, not made again.

The extended data has the input shards of the data before, in their order, and then those of the new sources. It is made
in `<directory>.partial` like any data, and takes the directory's name; the data before stays whole beside it, for runs
that have begun with it. The tokenizer stays that of the first preparation.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..config import DataConfig
from ..files import sha256_of, sync, write_whole
from ..format.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..format.shards import shard_name


def extended_by(config: DataConfig) -> Manifest | None:
    """Return the finished data in `config.directory` to which `config` adds sources, or None if it adds none.

    Raises ValueError, naming the first, if `config` changes any other setting than the sources that it adds.
    """
    directory = Path(config.directory)
    if not (directory / MANIFEST_FILE).is_file():
        return None
    manifest = open_prepared(directory, check_shards=False)
    before, now = manifest.named_sources(), config.named_sources
    if not before.keys() < now.keys():
        return None
    kept = {name: now[name] for name in before}
    # A lone source has no name in a recipe; it is extended as `data.sources.documents`.
    lone = {"source": kept["documents"], "sources": {}} if not manifest.config["sources"] else {"sources": kept}
    manifest.check_made_from(replace(config, **lone))
    return manifest


def new_sources(config: DataConfig, base: Manifest) -> DataConfig:
    """Return `config` with the sources alone that `base` lacks, in the order of the recipe."""
    before = base.named_sources()
    return replace(config, sources={name: one for name, one in config.sources.items() if name not in before})


def kept_name(base: Manifest, directory: Path) -> str:
    """Return the name, beside `directory`, that the data before an extension gets: it ends with its manifest's hash."""
    return f"{directory.name}.{sha256_of(base.store.path(MANIFEST_FILE))[:12]}"


def link_shards(base: Manifest, directory: Path) -> None:
    """Give `directory` the shards of `base`: as hard links, or as copies where the file system has none.

    A shard that is missing is left out; the next `longring prepare` makes it again.
    """
    folders = set()
    for entry in base.shards:
        name = shard_name(entry).path()
        old, new = base.store.path(name), directory / name
        folders.add(new.parent)
        if new.exists() or not old.exists():  # linked by an attempt that was killed, or missing
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old, new)
        except OSError:
            # A crash leaves no half of a link, but it can of a copy.
            write_whole(new, lambda begun, old=old: shutil.copyfile(old, begun))
    for folder in folders:
        sync(folder)
