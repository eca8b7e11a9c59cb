"""The work directory of `longring order`: the files of its stages, and how later stages read them.

The files of a stage lie in a folder named by a hash of the settings that decide them and of the stage before. A run
with other settings for contexts therefore reuses the embeddings, neighbours and path.

    <data.directory>.order/
      documents-<hash>/000012.npy     tables of the documents of input shard 12; train.npy and held_out.npy list a split
      embed-<hash>/000012.npy         vectors of these documents, float16; encoder.npz is the fitted default encoder
      neighbors-<hash>/000012.npy     neighbours of these documents within their source; also the indexes, their parts
                                      and recall.json; all-000012.npy has those of all sources, if there are several
      duplicates-<hash>/000012.npy    near-duplicate pairs of these documents; also histogram.json
      path-<hash>/path.npy            the path
    <order.directory>.partial/        the layout, the shards and, last, the manifest
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..format.document import SPLITS, Split
from ..format.manifest import open_prepared
from ..order_config import OrderConfig
from ..prepare.prepare import partial_directory
from . import duplicates, neighbors
from .documents import Documents, load, opened

NEIGHBOR_FIELDS = ("ids", "cosines")


class Group(NamedTuple):
    """Documents among which neighbours are searched: those of one source, or of all, in one split."""

    source: int | None
    """Index of the source; None for all sources."""
    split: Split
    """Split of the documents."""


@dataclass(frozen=True)
class WorkDirectory:
    """Settings of an ordering and the files of its stages; every task gets this object."""

    data: DataConfig
    order: OrderConfig
    manifest_sha256: str
    """SHA-256 of the manifest of the prepared data."""

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's files, named by a hash of the settings of this stage and all before it."""
        order = self.order
        # In the order of the stages: each key is hashed from the key before and the stage's own settings.
        settings_of: dict[str, tuple[Any, ...]] = {
            "documents": (),
            "embed": (order.encoder, order.embedding_dimensions, order.long_documents, order.window_tokens),
            # The text tells these files from those of versions that searched all sources together.
            "neighbors": ("within a source", order.neighbors, order.exact_documents),
            "duplicates": (order.duplicate_similarity, order.duplicate_overlap),
            "path": (order.by, order.seed if order.by != "path" else None),
        }
        key = self.manifest_sha256
        for name, settings in settings_of.items():
            key = hashlib.sha256(json.dumps([key, settings]).encode()).hexdigest()
            if name == stage:
                break
        # With 12 hexadecimal digits two of some 10^7 orderings would share a folder by chance.
        return self.root / f"{stage}-{key[:12]}"

    @property
    def root(self) -> Path:
        """Directory of the folders of all stages."""
        return Path(self.order.work_directory or f"{self.data.directory}.order")

    @property
    def partial(self) -> Path:
        """Directory in which the ordered data is built, until it gets its name."""
        return partial_directory(Path(self.order.directory))

    @property
    def num_shards(self) -> int:
        """Number of input shards of the prepared data."""
        return sum(open_prepared(self.data.directory, check_shards=False).sources.values())

    def documents(self) -> Documents:
        """Return the documents; stage documents must be done. Raises ValueError if the prepared data is damaged."""
        return opened(self.data.directory, self.folder("documents"))

    def embeddings(self) -> neighbors.Embeddings:
        """Return the vectors of all documents; stage embed must be done. Raises ValueError if a file is damaged."""
        return neighbors.opened(self.folder("embed"), tuple(self.documents().first.tolist()))

    def split_file(self, split: Split) -> Path:
        """Return the file that lists the documents of a split."""
        return self.folder("documents") / f"{split}.npy"

    def split_numbers(self, split: Split) -> NDArray[np.uint32]:
        """Return the documents of a split, ascending, uint32 [documents], mapped: 10^9 documents take 4 GB."""
        return load(self.split_file(split), mapped=True)

    def group_numbers(self, group: Group) -> NDArray[np.uint32]:
        """Return the documents of a group, ascending, uint32 [documents], mapped; stage split must be done."""
        numbers = self.split_numbers(group.split)
        if group.source is None:
            return numbers
        mine = self.documents().of_source(group.source)  # adjacent numbers, and `numbers` ascend
        return numbers[slice(*np.searchsorted(numbers, [mine.start, mine.stop]).tolist())]

    def scopes(self, source: int) -> dict[str, int | None]:
        """Return what the neighbours of a source's documents are searched in, by the beginning of the file's name.

        Near-duplicates are searched in all sources; the path takes neighbours within the source, whose file comes last.
        """
        several = len(self.documents().manifest.sources) > 1
        return {**({"all-": None} if several else {}), "": source}

    def approximate(self) -> list[Group]:
        """Return the groups with more than `exact_documents` documents, which are searched approximately."""
        sources = range(len(self.documents().manifest.sources))
        scopes = dict.fromkeys(scope for source in sources for scope in self.scopes(source).values())
        groups = [Group(scope, split) for scope in scopes for split in SPLITS]
        return [group for group in groups if len(self.group_numbers(group)) > self.order.exact_documents]

    def index(self, group: Group, name: str) -> Path:
        """Return a file of a group's IVF-PQ index; `name` is trained, merged, or the number of an input shard."""
        source = "all" if group.source is None else f"{group.source:06d}"
        return self.folder("neighbors") / f"{source}-{group.split}-{name}.faiss"

    def neighbor_lists(
        self, *, all_sources: bool = False
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]:
        """Yield `neighbor_list` of every input shard."""
        for number in range(self.documents().num_shards):
            yield self.neighbor_list(number, all_sources=all_sources)

    def neighbor_list(
        self, number: int, *, all_sources: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
        """Return an input shard's documents [n], their neighbours [n, k] and the cosines of these [n, k].

        Neighbours are of the document's own source, with `all_sources` of any.
        """
        prefix = next(iter(self.scopes(0))) if all_sources else ""  # the widest scope comes first
        found = load(self.folder("neighbors") / f"{prefix}{number:06d}.npy", mapped=True)
        return np.array(self.documents().of_shard(number)), *(found[field] for field in NEIGHBOR_FIELDS)

    def dropped(self) -> NDArray[np.uint32]:
        """Return (dropped document, kept document) for every near-duplicate, uint32 [dropped documents, 2]."""
        folder, count = self.folder("duplicates"), self.documents().num_shards
        # All pairs at once: the document that is kept may be in another input shard than its duplicate.
        pairs = np.concatenate([load(folder / f"{number:06d}.npy") for number in range(count)])
        return duplicates.choose_dropped(pairs, len(self.documents()))
