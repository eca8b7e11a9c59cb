"""One loader process against plain webdataset reading of the same shards; resuming at step 10^6; memory; waiting.

    .venv/bin/python benchmarks/loader.py [--quick] [--json FILE]

Python's own standard library in buckets of 256 to 8,192 tokens. For each bucket, in turns, the fastest turn counting:

- ours: `Loader` with one reading thread, micro-batches of 32,768 tokens in shuffled order, int64;
- webdataset: `WebDataset(urls).decode()`, the shards in order, blocks as they come;
- webdataset, rows: the same cut into micro-batches of int64, as a model needs them; still not shuffled.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import numpy as np
import webdataset
from longring.data.config import CurriculumConfig, DataConfig, LoaderConfig
from longring.data.format.manifest import Bucket, Manifest, open_prepared
from longring.data.format.shards import shard_name
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import BatchOrder, Share, bucket_orders
from longring.data.read.loader import Loader, training_order
from rich.console import Console
from rich.table import Table

RANK_TOKENS = 32_768
LATE_STEP = 10**6


def prepared(folder: Path, quick: bool) -> Manifest:
    config = DataConfig(
        directory=str(folder / "data"), min_bucket_tokens=256, max_bucket_tokens=8192, held_out_fraction=0.0
    )
    if quick:
        config = DataConfig(**{**vars(config), "source": type(config.source)(limit_documents=600)})
    prepare(config, Console(stderr=True))
    return open_prepared(config.directory)


def share(length: int) -> Share:
    return Share(0, 1, RANK_TOKENS // length)


def ours(manifest: Manifest, number: int, tokens: int) -> int:
    """Read about so many tokens of one bucket -> tokens."""
    orders = bucket_orders(manifest.buckets("train"), {}, 0, 0)
    steps = max(1, tokens // (8 * RANK_TOKENS))
    chosen = np.full(steps, number, dtype=np.uint8)
    loader = Loader(
        manifest, BatchOrder(manifest.lengths, orders, chosen, 8 * RANK_TOKENS), LoaderConfig(workers=1), share
    )
    return sum(batch.rows.size - len(batch.rows) for batch in loader.batches(0, steps))


def plain(manifest: Manifest, bucket: Bucket, tokens: int, *, rows: bool) -> int:
    urls = [str(manifest.store.path(shard_name(shard).path())) for shard in bucket.shards]
    done, wanted = 0, RANK_TOKENS // bucket.length
    while done < tokens:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            block = sample["tokens.npy"]
            for first in range(0, len(block), wanted if rows else len(block)):
                part = block[first : first + wanted].astype(np.int64) if rows else block
                done += part.size - len(part)
    return done


def rate(read: Callable[[], int], turns: int = 3) -> float:
    best = 0.0
    for _ in range(turns):
        started = time.perf_counter()
        best = max(best, read() / (time.perf_counter() - started))
    return best


def resume_seconds(directory: Path) -> float:
    """From nothing but the directory to the first micro-batch of a step in a run of twice as many."""
    started = time.perf_counter()
    manifest = open_prepared(directory)
    config = LoaderConfig()
    order = training_order(
        manifest, CurriculumConfig(cycles=8), config, steps=2 * LATE_STEP, global_batch_tokens=8 * RANK_TOKENS, seed=0
    )
    batches = Loader(manifest, order, config, share).batches(LATE_STEP - 1, LATE_STEP)
    next(batches)
    took = time.perf_counter() - started
    batches.close()
    return took


def waits(manifest: Manifest, step_ms: float) -> tuple[float, float]:
    """Wait of a model that takes `step_ms` for each micro-batch -> median and 99th percentile, ms."""
    order = training_order(
        manifest,
        CurriculumConfig(cycles=8),
        LoaderConfig(),
        steps=200,
        global_batch_tokens=8 * RANK_TOKENS,
        seed=0,
    )
    found = []
    for batch in Loader(manifest, order, LoaderConfig(workers=1), share).batches(0, 60):
        if found:
            found[-1] = time.perf_counter() - found[-1]
        assert batch.rows.size
        time.sleep(step_ms / 1e3)
        found.append(time.perf_counter())
    cuts = quantiles([1e3 * value for value in found[8:-1]], n=100)
    return cuts[49], cuts[98]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the documents; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures here")
    options = parser.parse_args()
    console = Console()
    table = Table(title="Million tokens/s of one process", title_justify="left")
    for column in ("bucket", "ours", "webdataset", "rows", "ours / webdataset", "ours / rows"):
        table.add_column(column, justify="right")
    rows: list[dict[str, float]] = []
    figures: dict[str, object] = {"rows": rows}
    with tempfile.TemporaryDirectory() as temporary:
        manifest = prepared(Path(temporary), options.quick)
        tokens = 2 * 10**7 if options.quick else 10**8
        for number, bucket in enumerate(manifest.buckets("train")):
            rates = [
                rate(lambda number=number: ours(manifest, number, tokens)),
                rate(lambda bucket=bucket: plain(manifest, bucket, tokens, rows=False)),
                rate(lambda bucket=bucket: plain(manifest, bucket, tokens, rows=True)),
            ]
            names = ("ours_tokens_per_s", "webdataset_tokens_per_s", "webdataset_rows_tokens_per_s")
            rows.append({"bucket": bucket.length, **dict(zip(names, rates, strict=True))})
            shown = [f"{value / 1e6:,.0f}" for value in rates]
            ratios = (f"{rates[0] / rates[1]:.2f}", f"{rates[0] / rates[2]:.2f}")
            table.add_row(f"{bucket.length:,}", *shown, *ratios)
        figures["resume_s"] = min(resume_seconds(Path(temporary, "data")) for _ in range(3))
        figures["wait_ms_median"], figures["wait_ms_p99"] = waits(manifest, 20)
        figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(table)
    console.print(
        f"resume at step {LATE_STEP:,} of {2 * LATE_STEP:,}: {figures['resume_s']:.2f} s (goal 1)\n"
        f"a model of 20 ms a micro-batch waits {figures['wait_ms_median']:.2f} ms, {figures['wait_ms_p99']:.2f} ms at "
        f"the 99th percentile\npeak memory of all this: {figures['peak_mb']:,.0f} MB, libraries and page cache included"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
