"""Rates of the stages of `longring order` on one core, with which docs/ordering.md plans.

    python benchmarks/order_rates.py --json rows.json   # three minutes
    python benchmarks/order_rates.py --quick            # a smaller index

- stages: Python's standard library, prepared, through every stage in one process; CPU seconds of each;
- index: IVF-PQ over clustered unit vectors of 128 dimensions: filled, searched and compared with the exact search,
  and the histogram of the neighbours' cosines;
- open: the ms to read a document whose tables and tar shard are not mapped yet, as for a document of a context that
  comes from another input shard than all before.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.process import use_one_core
from lib.script import Row, make_parser, make_table, write_record
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.files import sha256_of
from longring.data.format.manifest import MANIFEST_FILE, open_prepared
from longring.data.order import duplicates, neighbors
from longring.data.order.stages import STAGES
from longring.data.order.work_directory import WorkDirectory
from longring.data.order_config import OrderConfig
from longring.data.prepare.prepare import prepare
from rich.console import Console

DIMENSIONS, COUNT = 128, 20


def stage_rates(folder: Path, limit_documents: int) -> list[Row]:
    """Return CPU seconds and rates of each stage."""
    data = DataConfig(
        directory=str(folder / "data"),
        source=SourceConfig(limit_documents=limit_documents),
        tokenizer=TokenizerConfig(vocab_size=8192),
        shard_tokens=1 << 25,
        held_out_fraction=0.0,
        rest="pack",
    )
    manifest = prepare(data, Console(quiet=True))
    order = OrderConfig(mode="in_context", directory=str(folder / "ordered"))
    directory = WorkDirectory(data, order, sha256_of(folder / "data" / MANIFEST_FILE))
    rows = []
    for stage in STAGES:
        started, tasks = time.process_time(), stage.tasks(directory)
        for number in range(tasks):
            stage.do(directory, number, lambda _: None)
        seconds = time.process_time() - started
        if tasks:
            documents, tokens = manifest.ledger.documents, manifest.ledger.tokens
            rows.append(
                {
                    "stage": stage.name,
                    "seconds": seconds,
                    "documents_per_s": documents / seconds,
                    "tokens_per_s": tokens / seconds,
                }
            )
    return rows


def open_milliseconds(folder: Path) -> float:
    """Return the elapsed ms to read one document from files that are not mapped; the file system has a part in it."""
    manifest = open_prepared(folder / "data")
    [tables] = (folder / "data.order").glob("documents-*")
    buckets = [bucket for bucket in manifest.buckets("train") if bucket.sequences]
    started, count = time.perf_counter(), 0
    for bucket in buckets:
        for number in range(min(bucket.sequences, 64)):
            for name in ("000000.npy", "000000.parts.npy"):
                np.load(tables / name, mmap_mode="r")
            manifest.reader(bucket).read([number])
            count += 1
    return (time.perf_counter() - started) / count * 1e3


def index_rates(folder: Path, count: int) -> Row:
    """Return rates, bytes and recall of an index over `count` vectors."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(count // 20 + 1, DIMENSIONS)).astype(np.float32)
    vectors = centres[generator.integers(0, len(centres), count)]
    vectors += 0.5 * generator.normal(size=vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(folder / "000000.npy", vectors.astype(np.float16))
    found = neighbors.Embeddings(folder, np.array([0, count]))
    numbers = np.arange(count)
    clock: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        clock[name] = time.process_time() - started
        return result

    trained, part, merged = (folder / f"{name}.faiss" for name in ("trained", "part", "merged"))
    timed("train", lambda: neighbors.train_index(found, numbers, trained))
    timed("fill", lambda: neighbors.fill_index(trained, found[numbers], numbers, part))
    timed("merge", lambda: neighbors.merge_index(trained, [part], folder / "merged.lists", merged))
    index = neighbors.merged_index(merged)
    sample = np.linspace(0, count - 1, neighbors.RECALL_QUERIES).astype(np.int64)
    queries = np.union1d(sample, numbers[:: max(1, count // 4_096)])
    ids, _ = timed("search", lambda: neighbors.nearest(index, found, queries, COUNT, exact=False))
    row_of = {int(query): row for row, query in enumerate(queries)}
    cosines = generator.random(ids.shape, dtype=np.float32)
    tokens = np.arange(64, dtype=np.uint16)
    duplicates.histogram(iter([(queries, ids, cosines)]), lambda _: tokens, 0.7)  # the first call takes the samples
    again = [(queries, ids, cosines)] * 20
    timed("histogram", lambda: duplicates.histogram(iter(again), lambda _: tokens, 0.7))
    hits, exact = timed("recall", lambda: neighbors.recall(found, numbers, lambda one: ids[row_of[one]], COUNT))
    return {
        "vectors": count,
        "lists": index.nlist,
        "train_seconds": clock["train"],
        "trained_on": min(count, max(neighbors.SAMPLES_PER_LIST * index.nlist, 39 * 256)),
        "fill_per_s": count / clock["fill"],
        "search_per_s": len(queries) / clock["search"],
        "bytes_per_vector": (part.stat().st_size - trained.stat().st_size) / count,
        "recall": hits / exact,
        "recall_vectors_per_s": count / clock["recall"],
        "histogram_pairs_per_s": ids.size * len(again) / clock["histogram"],
    }


def main() -> int:
    options = make_parser(__doc__ or "", quick="an index of 20,000 vectors: about a minute").parse_args()
    num_vectors, limit_documents = {"full": (200_000, 0), "quick": (20_000, 0), "smallest": (10_000, 60)}[options.size]
    use_one_core()
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        stages = stage_rates(Path(one), limit_documents)
        milliseconds = open_milliseconds(Path(one))
        index = index_rates(Path(two), num_vectors)
    columns = ("stage", "CPU s", "documents/s", "tokens/s")
    table = make_table("Stages over Python's standard library, one core", columns, left=("stage",))
    for row in stages:
        rates = f"{row['documents_per_s']:,.0f}", f"{row['tokens_per_s']:,.0f}"
        table.add_row(row["stage"], f"{row['seconds']:.2f}", *rates)
    console = Console()
    console.print(table)
    for key, value in index.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        console.print(f"index: {key.replace('_', ' ')} {shown}", highlight=False)
    console.print(f"open: {milliseconds:.2f} ms a document", highlight=False)
    write_record(options.json, {"stages": stages, "index": index, "open_milliseconds": milliseconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
