"""Sampling of a source's documents without replacement, by their scores (QuRating, arXiv 2402.09739).

Each document has a key, score / temperature + Gumbel noise, and the documents with the largest keys are kept. That is
sampling one after another without replacement, each document with odds exp(score / temperature) (Efraimidis and
Spirakis, 2006; Vieira, 2014). The noise comes from the document's content and the seed, so the choice does not depend
on files, order or processes; copies with one score are kept or left out together.

The keys of a source are found by one pass over its files, in the processes that prepare it later:

    work/sampling/000012.npy   keys of the documents of input shard 12, float64 [documents]
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ..config import DataConfig, SourceConfig
from ..files import write_whole
from ..format.document import Document
from ..format.ledger import Filter
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer
from ..processes import process_pool
from .records import RecordReader
from .sources import InputShard


def sampling_key(document: Document, source: SourceConfig, seed: int) -> float:
    """Return the key of a document: its score over the temperature, plus standard Gumbel noise."""
    noise = hashlib.blake2b(document.digest, digest_size=8, salt=seed.to_bytes(8, "little"), person=b"sampling")
    # 52 bits and a half: a double holds them, and the draw is neither 0 nor 1.
    draw = ((int.from_bytes(noise.digest(), "little") >> 12) + 0.5) / 2**52
    return document.score / source.score_temperature - math.log(-math.log(draw))


def sampled(
    documents: Iterator[Document],
    shard: InputShard,
    source: SourceConfig,
    seed: int,
    leave_out: Callable[[Filter], object],
) -> Iterator[Document]:
    """Yield the documents that are kept; call `leave_out("not_sampled")` for each other one."""
    for document in documents:
        if shard.keep_from is None or sampling_key(document, source, seed) >= shard.keep_from:
            yield document
        else:
            leave_out("not_sampled")


def threshold(keys: NDArray[np.float64], fraction: float) -> float:
    """Return the smallest key that is kept, so that round(`fraction` x documents) of `keys` [documents] are.

    It lies between the last key that is kept and the next one, so that another processor's logarithm, which may differ
    in its last bit, makes the same choice. Equal keys are kept or left out together.
    """
    count = round(fraction * len(keys))
    if count == 0:
        largest = float(keys.max(initial=0.0))
        return max(largest + 1.0, math.nextafter(largest, math.inf))  # from 2^53 on, adding 1 may change nothing
    if count == len(keys):
        return float(keys.min()) - 1.0
    # Only the two keys at the border need their positions in the sorted order.
    ordered = np.partition(keys, [len(keys) - count - 1, len(keys) - count])
    left_out, kept = ordered[len(keys) - count - 1 : len(keys) - count + 1].tolist()
    middle = (left_out + kept) / 2
    # Between equal or adjacent numbers there is no other: the middle is then rounded to one of them.
    return middle if left_out < middle else kept


def with_thresholds(
    config: DataConfig, partial: Path, inputs: Sequence[InputShard], first: int, workers: int, progress: Progress
) -> list[InputShard]:
    """Return `inputs` with the threshold of each sampled source, which needs one pass over the source's documents.

    Input shards before `first` have theirs. `workers` processes read, or one per CPU if 0. Raises ValueError if a
    source cannot be read or too many of its records are bad.
    """
    _find_keys(config, partial, shards_to_read(config, inputs, first), workers, progress)
    found = list(inputs)
    for name, source in config.named_sources.items():
        read = [n for n, shard in shards_to_read(config, inputs, first).items() if shard.recipe_source == name]
        if not read:
            continue
        # All keys of a source at once: 8 bytes a document.
        keys = np.concatenate([np.load(keys_file(partial, n)) for n in read])
        keep_from = threshold(keys, source.sample_fraction)
        # One threshold for the source: its bins and input shards share the odds.
        for n, shard in enumerate(found):
            if n >= first and shard.recipe_source == name:
                found[n] = replace(shard, keep_from=keep_from)
    return found


def shards_to_read(config: DataConfig, inputs: Sequence[InputShard], first: int) -> dict[int, InputShard]:
    """Return, by number, the input shards from `first` on that are read for the keys of sampled sources.

    One input shard of each run of files reads the records of all bins.
    """
    sampled_sources = {name for name, source in config.named_sources.items() if source.sample_fraction < 1}
    numbered = list(enumerate(inputs))[first:]
    return {n: shard for n, shard in numbered if shard.recipe_source in sampled_sources and not shard.bin}


def _find_keys(
    config: DataConfig, partial: Path, shards: dict[int, InputShard], workers: int, progress: Progress
) -> None:
    """Write the keys of input shards by number, but of those that an earlier attempt has done."""
    left = {number: shard for number, shard in shards.items() if not keys_file(partial, number).exists()}
    if not left:
        return
    bar = progress.add_task("reading scores", total=len(shards), completed=len(shards) - len(left), line="")
    processes = min(workers or len(os.sched_getaffinity(0)), len(left))
    if processes == 1:
        for number, shard in left.items():
            write_keys(config, partial, number, shard)
            progress.advance(bar)
        return
    with process_pool(processes) as pool:
        tasks = [pool.submit(write_keys, config, partial, number, shard) for number, shard in left.items()]
        for task in as_completed(tasks):
            task.result()
            progress.advance(bar)


def write_keys(config: DataConfig, partial: Path, number: int, shard: InputShard) -> None:
    """Write the keys of the documents of input shard `number`, of all bins. Raises ValueError as RecordReader does."""
    source = config.named_sources[shard.recipe_source]
    marks = None
    if source.holds_tokens:
        file = partial / TOKENIZER_FILE
        marks = DocumentTokenizer(file.read_bytes(), config.tokenizer.boundary, str(file)).marks(source.bos, source.eos)
    reader = RecordReader(replace(shard, bin=None), source, config.max_bad_fraction, marks)
    keys = np.fromiter((sampling_key(one, source, config.seed) for one in reader.documents()), dtype=np.float64)
    write_whole(keys_file(partial, number), lambda begun: np.save(begun, keys))


def keys_file(partial: Path, number: int) -> Path:
    """Return the file of the sampling keys of input shard `number`."""
    return partial / "work" / "sampling" / f"{number:06d}.npy"
