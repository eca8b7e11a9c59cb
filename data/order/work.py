"""Where the stages of `longring order` keep what they make, and how the next ones read it.

What a stage makes lies in the work directory, in a folder named by a hash of the settings that decide it and of the
folder it was made from: another choice of contexts finds embeddings, neighbours and path as they were.

    <data.directory>.order/
      documents-<hash>/000012.npy     where the documents of input shard 12 lie; train.npy, held_out.npy, each split's
      embed-<hash>/000012.npy         their vectors, float16; encoder.npz, the fitted default encoder
      neighbors-<hash>/000012.npy     their neighbours; the index, its parts, recall.json
      duplicates-<hash>/000012.npy    near-duplicate pairs; histogram.json
      path-<hash>/path.npy            the path
    <order.directory>.partial/        layout, shards, and at last the manifest
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Work:
    """What all tasks know: settings, and the data they are for."""

    data: DataConfig
    order: OrderConfig
    manifest_sha256: str

    def folder(self, stage: str) -> Path:
        """Return where a stage's files are: named by the settings that decide them, and by those of the one before."""
        order = self.order
        decides: dict[str, tuple[Any, ...]] = {
            "documents": (),
            "embed": (order.encoder, order.embedding_dimensions, order.long_documents, order.window_tokens),
            "neighbors": (order.neighbors, order.exact_documents),
            "duplicates": (order.duplicate_similarity, order.duplicate_overlap),
            "path": (order.by, order.seed if order.by != "path" else None),
        }
        key = self.manifest_sha256
        for name, settings in decides.items():
            key = hashlib.sha256(json.dumps([key, settings]).encode()).hexdigest()
            if name == stage:
                break
        root = Path(order.work_directory or f"{self.data.directory}.order")
        return root / f"{stage}-{key[:12]}"

    @property
    def partial(self) -> Path:
        """Where the ordered data grows."""
        return partial_directory(Path(self.order.directory))

    @property
    def num_shards(self) -> int:
        """Number of input shards."""
        return sum(open_prepared(self.data.directory, check_shards=False).sources.values())

    def documents(self) -> Documents:
        """Return the documents, once their tables are there."""
        return opened(self.data.directory, self.folder("documents"))

    def embeddings(self) -> neighbors.Embeddings:
        """Return the vectors, once they are there."""
        return neighbors.opened(self.folder("embed"), tuple(self.documents().first.tolist()))

    def split_file(self, split: Split) -> Path:
        """Return where the split's documents are listed."""
        return self.folder("documents") / f"{split}.npy"

    def split_numbers(self, split: Split) -> NDArray[np.uint32]:
        """Return the split's documents, ascending; of 10^9 they are 4 GB, mapped."""
        return load(self.split_file(split), mapped=True)

    def approximate(self) -> list[Split]:
        """Return the splits that are too large to be searched exactly."""
        books = self.documents().manifest.ledger.splits
        return [split for split in SPLITS if books[split].documents > self.order.exact_documents]

    def index(self, split: Split, name: str) -> Path:
        """Return a file of the split's IVF-PQ index: trained, merged, or the number of an input shard."""
        return self.folder("neighbors") / f"{split}-{name}.faiss"

    def lists(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]:
        """Yield each input shard's documents [n] with their neighbours' numbers and cosines [n, k]."""
        for number in range(self.documents().num_shards):
            yield self.neighbor_list(number)

    def neighbor_list(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
        """Return one input shard's of them."""
        found = load(self.folder("neighbors") / f"{number:06d}.npy", mapped=True)
        return np.array(self.documents().of_shard(number)), *(found[field] for field in NEIGHBOR_FIELDS)

    def left_out(self) -> NDArray[np.uint32]:
        """Return (near-duplicate left out, document kept) of all near-duplicates."""
        folder, count = self.folder("duplicates"), self.documents().num_shards
        pairs = np.concatenate([load(folder / f"{number:06d}.npy") for number in range(count)])
        return duplicates.left_out(pairs, len(self.documents()))
