# pyright: reportMissingImports=false
"""Readers of other projects, for `loader.py --peers`, where these are installed: the rows of a bucket in their format.

Each function writes the rows into a new folder and returns a function that reads about as many tokens as it is asked
for, in micro-batches of int64 rows, as a model needs them, and returns their number. None shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from importlib import metadata
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch

Rows = np.ndarray
"""Rows of a bucket, uint16 [sequences, length + 1]."""
Read = Callable[[int], int]


def mosaicml_streaming(rows: Rows, folder: Path, micro_batch: int) -> Read:
    """Return mosaicml-streaming's reader of its own shards (MDS), a sample a row, in torch's DataLoader."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{rows.shape[1]}"}) as writer:
        for row in rows:
            writer.write({"tokens": row})
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=micro_batch)

    def collate(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))

    return _reader(rows, lambda: DataLoader(dataset, batch_size=micro_batch, collate_fn=collate))


def megatron_core(rows: Rows, folder: Path, micro_batch: int) -> Read:
    """Return a reader of Megatron's indexed data set, a sequence a row; Megatron's samplers and masks are left out."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from .megatron import write_megatron

    folder.mkdir()
    write_megatron(folder / "a", rows.ravel(), np.full(len(rows), rows.shape[1]))
    dataset = IndexedDataset(str(folder / "a"), multimodal=False, mmap=True)

    def batches() -> Iterator[torch.Tensor]:
        for first in range(0, len(rows) - micro_batch + 1, micro_batch):
            found = [dataset.get(first + at) for at in range(micro_batch)]
            yield torch.from_numpy(np.stack(found).astype(np.int64))

    return _reader(rows, batches)


def olmo_core(rows: Rows, folder: Path, micro_batch: int) -> Read:
    """Return a reader of OLMo-core's data set of one length over a flat file of ids, in torch's DataLoader."""
    from olmo_core.data import NumpyFSLDataset
    from torch.utils.data import DataLoader

    folder.mkdir()
    rows.ravel().tofile(folder / "a.npy")
    dataset = NumpyFSLDataset(
        str(folder / "a.npy"),
        sequence_length=rows.shape[1],
        pad_token_id=0,
        eos_token_id=0,
        vocab_size=2**16,
        include_instance_metadata=False,
    )

    def collate(samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.stack([sample["input_ids"] for sample in samples]).long()

    return _reader(rows, lambda: DataLoader(dataset, batch_size=micro_batch, collate_fn=collate))


def torchtitan(rows: Rows, folder: Path, micro_batch: int) -> Read:
    """Return torchtitan's loader of documents, each a row, from a data set of Hugging Face's on disk.

    The loader tokenizes while it reads, so the rows are ids in the place of text, and its tokenizer returns them.
    """
    from datasets import Dataset, load_from_disk
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

    class Ids(BaseTokenizer):
        def encode(self, ids: list[int], add_bos: bool, add_eos: bool) -> list[int]:
            return ids

        def decode(self, ids: list[int]) -> str:
            raise NotImplementedError

        def get_vocab_size(self) -> int:
            return 2**16

    Dataset.from_dict({"ids": list(rows)}).save_to_disk(folder)
    DATASETS["rows"] = DatasetConfig(path="", loader=load_from_disk, sample_processor=lambda sample: sample["ids"])
    config = HuggingFaceTextDataLoader.Config(dataset="rows", dataset_path=str(folder), infinite=False)

    def batches() -> Iterator[torch.Tensor]:
        length = rows.shape[1] - 1
        loader = HuggingFaceTextDataLoader(
            config, dp_world_size=1, dp_rank=0, tokenizer=Ids(), seq_len=length, local_batch_size=micro_batch
        )
        for inputs, _ in loader:  # inputs and targets are tensors of their own
            yield inputs["input"]

    return _reader(rows, batches)


def _reader(rows: Rows, batches: Callable[[], Iterable[Sized]]) -> Read:
    """Return a function that reads micro-batches until they have a number of tokens, pass after pass over the rows."""
    length = rows.shape[1] - 1  # a row has a token more

    def read(tokens: int) -> int:
        done = 0
        for batch in chain.from_iterable(make() for make in repeat(batches)):
            done += len(batch) * length
            if done >= tokens:
                break
        return done

    return read


PEERS: dict[str, Callable[[Rows, Path, int], Read]] = {
    "mosaicml-streaming": mosaicml_streaming,
    "megatron-core": megatron_core,
    "ai2-olmo-core": olmo_core,
    "torchtitan": torchtitan,
}
"""Readers by the names of their packages."""


def peer_versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
