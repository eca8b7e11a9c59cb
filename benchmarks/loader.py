"""Reading speed of one process beside plain webdataset, and the time until it resumes.

    python benchmarks/loader.py --json rows.json   # a minute
    python benchmarks/loader.py --quick            # a third of the documents
    python benchmarks/loader.py --peers  # other projects as well

The data is Python's own standard library in buckets of 256 to 8,192 tokens. For each bucket three readers take turns,
and the fastest turn counts:

- ours: `Loader` with one reading thread, micro-batches of 32,768 tokens in shuffled order, int64;
- webdataset: `WebDataset(urls).decode()`, the shards in order, whole samples as they come;
- rows: the same cut into micro-batches of int64, as a model needs them; still not shuffled.

With --peers the rows of each bucket are written in the formats of others, and read by their own data sets into the same
micro-batches, in order and in one process (lib/loader_peers.py). torchtitan's loader tokenizes text while it reads: its
tokenizer is replaced by one that returns ids. A reader that cannot run is in the record with its error.

Besides: seconds to resume at step 10^6, the wait of a model that takes 20 ms a micro-batch, and peak memory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from webdataset.compat import WebDataset

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.loader_peers import PEERS, Read, peer_versions
from lib.process import peak_megabytes
from lib.script import Row, make_parser, make_table, write_record
from longring.data.config import DataConfig, LoaderConfig
from longring.data.curriculum_config import CurriculumConfig
from longring.data.format.bucket import Bucket
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.format.shards import shard_name
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader
from longring.data.read.mix import training_order
from rich.console import Console

RANK_TOKENS = 32_768
LATE_STEP = 10**6


def prepared(folder: Path, limit_documents: int) -> Manifest:
    """Prepare the standard library, or some of its documents, and return its manifest."""
    config = DataConfig(
        directory=str(folder / "data"), min_bucket_tokens=256, max_bucket_tokens=8192, held_out_fraction=0.0
    )
    if limit_documents:
        config = replace(config, source=replace(config.source, limit_documents=limit_documents))
    prepare(config, Console(stderr=True))
    return open_prepared(config.directory)


def share(length: int) -> ReplicaShare:
    """Return the share of a batch that the only rank reads."""
    return ReplicaShare(0, 1, RANK_TOKENS // length)


def ours(manifest: Manifest, number: int, tokens: int) -> int:
    """Read about `tokens` tokens of one bucket with the Loader and return their number."""
    length, steps = manifest.lengths[number], max(1, tokens // (8 * RANK_TOKENS))
    curriculum = CurriculumConfig(min_bucket_tokens=length, max_bucket_tokens=length)
    order = training_order(
        manifest, curriculum, LoaderConfig(), steps=steps, global_batch_tokens=8 * RANK_TOKENS, seed=0
    )
    loader = Loader(manifest, order, LoaderConfig(workers=1), share)
    return sum(batch.rows.size - len(batch.rows) for batch in loader.batches(0, steps))


def plain(manifest: Manifest, bucket: Bucket, tokens: int, *, rows: bool) -> int:
    """Read at least `tokens` tokens of one bucket with webdataset and return their number."""
    urls = [str(manifest.store.path(shard_name(shard).path())) for shard in bucket.shards]
    done, wanted = 0, RANK_TOKENS // bucket.length
    while done < tokens:
        samples: Iterable[dict[str, Any]] = WebDataset(urls, shardshuffle=False).decode()  # type: ignore[assignment]
        for sample in samples:
            block = sample["tokens.npy"]
            for first in range(0, len(block), wanted if rows else len(block)):
                part = block[first : first + wanted].astype(np.int64) if rows else block
                done += part.size - len(part)
    return done


def peer_readers(manifest: Manifest, bucket: Bucket, folder: Path) -> dict[str, Read | str]:
    """Return each other project's reader, which has read a micro-batch, or the error that it ended with."""
    rows = manifest.reader(bucket).read(np.arange(bucket.sequences)).astype(np.uint16)
    found: dict[str, Read | str] = {}
    for name, make in PEERS.items():
        try:
            read = make(rows, folder / f"{name}-{bucket.length}", min(len(rows), RANK_TOKENS // bucket.length))
            read(1)
            found[name] = read
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def rates(readers: Sequence[Callable[[], int]], turns: int) -> list[float]:
    """Return the tokens per second of each reader's fastest turn; the readers take turns."""
    best = [0.0] * len(readers)
    for _ in range(turns):
        for number, read in enumerate(readers):
            started = time.perf_counter()
            best[number] = max(best[number], read() / (time.perf_counter() - started))
    return best


def resume_seconds(directory: Path, late_step: int) -> float:
    """Return the seconds from opening the directory to the first micro-batch of a late step."""
    started = time.perf_counter()
    manifest = open_prepared(directory)
    config = LoaderConfig()
    order = training_order(
        manifest, CurriculumConfig(cycles=8), config, steps=2 * late_step, global_batch_tokens=8 * RANK_TOKENS, seed=0
    )
    batches = Loader(manifest, order, config, share).batches(late_step - 1, late_step)
    next(batches)
    took = time.perf_counter() - started
    batches.close()
    return took


def waits(manifest: Manifest, step_ms: float, steps: int) -> tuple[float, float]:
    """Return the median and 99th percentile, in ms, of the wait of a model that takes `step_ms` a micro-batch."""
    order = training_order(
        manifest, CurriculumConfig(cycles=8), LoaderConfig(), steps=200, global_batch_tokens=8 * RANK_TOKENS, seed=0
    )
    # An entry is the time at which a step ended, until the next micro-batch replaces it by the wait.
    found = []
    for batch in Loader(manifest, order, LoaderConfig(workers=1), share).batches(0, steps):
        if found:
            found[-1] = time.perf_counter() - found[-1]
        assert batch.rows.size
        time.sleep(step_ms / 1e3)
        found.append(time.perf_counter())
    cuts = quantiles([1e3 * value for value in found[8:-1]], n=100)
    return cuts[49], cuts[98]


def main() -> int:
    parser = make_parser(__doc__ or "", quick="a third of the documents: about a minute")
    parser.add_argument("--peers", action="store_true", help="other projects' readers as well, or their errors")
    options = parser.parse_args()
    limit_documents, tokens, turns, late_step, steps = {
        "full": (0, 10**8, 3, LATE_STEP, 60),
        "quick": (600, 2 * 10**7, 3, LATE_STEP, 60),
        "smallest": (40, 10**5, 1, 100, 12),
    }[options.size]
    columns = ("bucket", "ours", "webdataset", "rows", "ours / webdataset", "ours / rows")
    table = make_table("Million tokens/s of one process", columns)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        manifest = prepared(Path(temporary), limit_documents)
        for number, bucket in enumerate(manifest.buckets("train")):
            if not bucket.sequences:
                continue
            readers = [
                partial(ours, manifest, number, tokens),
                partial(plain, manifest, bucket, tokens, rows=False),
                partial(plain, manifest, bucket, tokens, rows=True),
            ]
            peers = peer_readers(manifest, bucket, Path(temporary)) if options.peers else {}
            running = {name: partial(read, tokens) for name, read in peers.items() if not isinstance(read, str)}
            found = rates([*readers, *running.values()], turns)
            names = ("ours_tokens_per_s", "webdataset_tokens_per_s", "webdataset_rows_tokens_per_s")
            row: Row = {"bucket": bucket.length, **dict(zip(names, found, strict=False))}
            if options.peers:
                of_peers = dict(zip(running, found[len(names) :], strict=True))
                row["peers"] = {name: of_peers.get(name, made) for name, made in peers.items()}
            rows.append(row)
            shown = [f"{value / 1e6:,.0f}" for value in found[: len(names)]]
            ratios = (f"{found[0] / found[1]:.2f}", f"{found[0] / found[2]:.2f}")
            table.add_row(f"{bucket.length:,}", *shown, *ratios)
        resume_s = min(resume_seconds(Path(temporary, "data"), late_step) for _ in range(turns))
        wait_ms, wait_ms_p99 = waits(manifest, 20, steps)
    peak_mb = peak_megabytes()
    console = Console()
    console.print(table)
    for row in rows if options.peers else ():
        shown = [
            f"{name} {of / 1e6:,.0f}" if isinstance(of, float) else f"{name}: {of}" for name, of in row["peers"].items()
        ]
        console.print(f"bucket {row['bucket']:,}, million tokens/s: {', '.join(shown)}", highlight=False)
    console.print(
        f"resume at step {late_step:,} of {2 * late_step:,}: {resume_s:.2f} s (goal: 1 s)\n"
        f"a model of 20 ms a micro-batch waits {wait_ms:.2f} ms, at the 99th percentile {wait_ms_p99:.2f} ms\n"
        f"peak memory of this process: {peak_mb:,.0f} MB, libraries and page cache included"
    )
    figures = {"resume_s": resume_s, "wait_ms_median": wait_ms, "wait_ms_p99": wait_ms_p99, "peak_mb": peak_mb}
    write_record(options.json, {"peer_versions": peer_versions(), "rows": rows, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
