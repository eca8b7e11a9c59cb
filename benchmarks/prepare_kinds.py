"""Speed of preparation by kind of corpus, on one and two cores, and of ten million short documents.

    python benchmarks/prepare_kinds.py --json rows.json   # fifteen minutes
    python benchmarks/prepare_kinds.py --quick            # two minutes

The text is Python's own standard library, the tokenizer a byte-level BPE of 8,192 trained on it. The same documents
are written in every kind, and each member prepares them as one input shard, with hashes and ledger:

- bare: `encode_batch_fast` on the texts alone, in the faster of two batch sizes; the ids are dropped;
- text kinds: from the files to tar shards;
- kinds of token ids: the same without tokenizing.

The members run in turns on one core, in CPU seconds, each right after the bare tokenizer; the fastest turn of each
gives its rate, and the median of the turns its ratio to the bare tokenizer, so both meet the same load. Then fresh
processes prepare short documents (24 ids on average) from a Megatron .bin with its .idx: first a tenth of them, then
all. Last, JSON lines in eight input shards are prepared by one process and by two in turns. On a machine with other
load their seconds mean little; the CPU seconds of all processes tell what the second one costs.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer's threads start

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import datasets
import numpy as np
import psutil
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from lib.megatron import write_megatron
from lib.process import peak_megabytes, use_one_core
from lib.script import Row, make_parser, make_table, seconds_of, write_record
from lib.standard_library import corpus
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.tokenizer import DocumentTokenizer
from longring.data.prepare.input_shard import prepare_input_shard
from longring.data.prepare.prepare import prepare
from longring.data.prepare.sources import input_shards
from longring.data.prepare.train_tokenizer import train_tokenizer
from rich.console import Console

GOAL = 0.85
"""Goal: tokens/s of each text kind over those of the bare tokenizer."""


def write_texts(folder: Path, texts: list[str]) -> Iterator[tuple[str, SourceConfig]]:
    """Write the texts in every kind; yield (name, source)."""
    rows = [{"text": text} for text in texts]
    table = pyarrow.Table.from_pylist(rows)

    def source(kind: Any, name: str) -> tuple[str, SourceConfig]:
        return name, SourceConfig(kind=kind, path=str(folder / name))

    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    yield source("json", "a.jsonl")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    yield source("json", "a.jsonl.gz")
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    yield source("csv", "a.csv")
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:06d}.txt").write_text(text, newline="")
    yield source("text", "text")
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=256)
    yield source("parquet", "a.parquet")
    with pyarrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=256)
    yield source("arrow", "a.arrow")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, text in enumerate(texts):
            add(tar, f"{number:06d}.txt", text.encode())
    yield source("webdataset", "a.tar")
    datasets.Dataset(table).save_to_disk(str(folder / "disk"))
    yield source("disk", "disk")


def write_ids(folder: Path, ids: list[list[int]]) -> Iterator[tuple[str, SourceConfig]]:
    """Write documents of token ids in every kind that has them, ended by the boundary 0; yield (name, source)."""
    flat = np.concatenate([[*one, 0] for one in ids]).astype("<u2")
    flat.tofile(folder / "a.npy")
    yield "tokens", SourceConfig(kind="tokens", path=str(folder / "a.npy"))
    write_megatron(folder / "a", flat, np.array([len(one) + 1 for one in ids]))
    yield "megatron", SourceConfig(kind="megatron", path=str(folder / "a"))
    table = pyarrow.table({"ids": pyarrow.array(ids, type=pyarrow.list_(pyarrow.uint16()))})
    pyarrow.parquet.write_table(table, folder / "ids.parquet", row_group_size=256)
    yield "parquet", SourceConfig(kind="parquet", path=str(folder / "ids.parquet"), tokens_field="ids")
    rows = pyarrow.table({"ids": pyarrow.FixedSizeListArray.from_arrays(flat[: len(flat) // 2048 * 2048], 2048)})
    datasets.Dataset(rows).save_to_disk(str(folder / "rows"))
    stream: dict[str, Any] = {"tokens_field": "ids", "record_holds": "stream"}
    yield "disk, rows of a stream", SourceConfig(kind="disk", path=str(folder / "rows"), **stream)
    with tarfile.open(folder / "ids.tar", "w") as tar:
        for number, one in enumerate(ids):
            content = io.BytesIO()
            np.save(content, np.array(one, dtype=np.uint16))
            add(tar, f"{number:06d}.ids.npy", content.getvalue())
    yield "webdataset", SourceConfig(kind="webdataset", path=str(folder / "ids.tar"), tokens_field="ids.npy")
    (folder / "ids.jsonl").write_text("".join(json.dumps({"ids": one}) + "\n" for one in ids))
    yield "json", SourceConfig(kind="json", path=str(folder / "ids.jsonl"), tokens_field="ids")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def settings(folder: Path, name: str, source: SourceConfig) -> DataConfig:
    return DataConfig(
        directory=str(folder / name),
        source=source,
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer.json")),
        min_bucket_tokens=256,
        max_bucket_tokens=8192,
        held_out_fraction=0.0,
        input_shard_bytes=2**40,
    )


def prepare_once(config: DataConfig, tokenizer_file: Path) -> None:
    """Prepare a source as one input shard, in this process and without the merge."""
    partial = Path(config.directory)
    partial.mkdir()
    (partial / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    [shard] = input_shards(config)
    prepare_input_shard(config, partial, 0, shard)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a call: the core may be shared."""
    started = time.process_time()
    work()
    return time.process_time() - started


def by_kind(folder: Path, texts: list[str], rounds: int) -> list[Row]:
    """Return tokens/s and MB/s of the bare tokenizer and of each kind, and its median ratio to the bare tokenizer."""
    tokenizer = DocumentTokenizer((folder / "tokenizer.json").read_bytes(), "<|endoftext|>")
    ids = [one.ids for one in tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    tokens, megabytes = sum(map(len, ids)), sum(len(text.encode()) for text in texts) / 1e6

    def bare(batch: int) -> float:
        return cpu_seconds(lambda: encode(tokenizer, texts, batch))

    batch = min((8, 128), key=bare)
    members = [("text", *one) for one in write_texts(folder, texts)] + [("ids", *one) for one in write_ids(folder, ids)]
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}  # seconds of the bare tokenizer, and of the member
    for turn in range(rounds):
        for content, name, source in members:
            config = settings(folder, f"{content} {name.partition(',')[0]} {turn}", source)
            before = bare(batch)
            seconds = cpu_seconds(lambda config=config: prepare_once(config, folder / "tokenizer.json"))
            times.setdefault((content, name), []).append((before, seconds))
    fastest = min(before for turns in times.values() for before, _ in turns)

    def row(content: str, name: str, seconds: float, ratio: float) -> Row:
        rates = {"tokens_per_s": tokens / seconds, "text_mb_per_s": megabytes / seconds}
        return {"content": content, "kind": name, **rates, "over_bare": ratio}

    return [row("bare", "tokenizer", fastest, 1.0)] + [
        row(*member, min(seconds for _, seconds in turns), median(before / seconds for before, seconds in turns))
        for member, turns in times.items()
    ]


def encode(tokenizer: DocumentTokenizer, texts: list[str], batch: int) -> None:
    """Tokenize the texts, and drop the ids."""
    for first in range(0, len(texts), batch):
        tokenizer.tokenizer.encode_batch_fast(texts[first : first + batch], add_special_tokens=False)


def on_cores(folder: Path, rounds: int) -> list[Row]:
    """Return seconds and CPU seconds, medians of turns, in which one process and two prepare eight input shards."""
    (folder / "parts").mkdir()
    for part in range(8):
        (folder / "parts" / f"{part}.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    source = SourceConfig(kind="json", path=str(folder / "parts"))
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for turn in range(rounds):
        for processes, measured in found.items():
            config = replace(settings(folder, f"on {processes} {turn}", source), input_shard_bytes=1)
            before = cpu_seconds_of_all()
            seconds = seconds_of(lambda c=config, n=processes: prepare(c, Console(quiet=True), n))
            measured.append((seconds, cpu_seconds_of_all() - before))
    return [
        {
            "processes": processes,
            "seconds": median(seconds for seconds, _ in turns),
            "cpu_s": median(s for _, s in turns),
        }
        for processes, turns in found.items()
    ]


def cpu_seconds_of_all() -> float:
    """Return the CPU seconds so far of this process, of those below it, and of all that these have waited for."""
    mine = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (mine, *mine.children(recursive=True)))


def short_documents(folder: Path, documents: int) -> Row:
    """Return CPU seconds, seconds and peak memory of a process that prepares `documents` short documents."""
    lengths = np.random.default_rng(0).integers(4, 45, documents)
    ids = np.random.default_rng(1).integers(1, 4000, int(lengths.sum())).astype("<u2")
    write_megatron(folder / f"short{documents}", ids, lengths)
    del ids
    command = [sys.executable, __file__, "--child", str(folder), str(documents)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(folder: Path, documents: int) -> Row:
    config = replace(
        settings(folder, f"of short{documents}", SourceConfig(kind="megatron", path=str(folder / f"short{documents}"))),
        min_bucket_tokens=8,
    )
    started, cpu = time.perf_counter(), time.process_time()
    prepare_once(config, folder / "tokenizer.json")
    cpu_s = time.process_time() - cpu
    return {
        "documents": documents,
        "cpu_s": cpu_s,
        "seconds": time.perf_counter() - started,
        "cpu_us_per_document": cpu_s / documents * 1e6,
        "peak_mb": peak_megabytes(),
    }


def show(figures: Row) -> None:
    table = make_table(
        "Preparing by kind, one core",
        ("content", "kind", "tokens/s", "MB/s of text", "over bare"),
        left=("content", "kind"),
    )
    for row in figures["rows"]:
        cells = (f"{row['tokens_per_s']:,.0f}", f"{row['text_mb_per_s']:.2f}", f"{row['over_bare']:.2f}")
        table.add_row(row["content"], row["kind"], *cells)
    console = Console()
    console.print(table)
    console.print(f"goal for text: {GOAL} of the bare tokenizer", highlight=False)
    for row in figures["processes"]:
        console.print(
            f"eight input shards, processes: {row['processes']}; {row['seconds']:.1f} s, CPU {row['cpu_s']:.1f} s",
            highlight=False,
        )
    for row in figures["short_documents"]:
        console.print(
            f"{row['documents']:,} short documents: {row['cpu_s']:.1f} CPU s, {row['cpu_us_per_document']:.1f} µs "
            f"each, peak {row['peak_mb']:.0f} MB",
            highlight=False,
        )


def main() -> int:
    parser = make_parser(__doc__ or "", quick="a quarter of the text, 10^5 short documents: about two minutes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        use_one_core()
        print(json.dumps(child(Path(options.child[0]), int(options.child[1]))))
        return 0
    limit_characters, rounds, documents = {
        "full": (8_000_000, 3, 10_000_000),
        "quick": (2_000_000, 3, 100_000),
        "smallest": (200_000, 1, 1_000),
    }[options.size]
    with tempfile.TemporaryDirectory() as temporary:
        folder, texts = Path(temporary), corpus(limit_characters)
        datasets.disable_progress_bars()
        (folder / "tokenizer.json").write_bytes(train_tokenizer(texts, TokenizerConfig(vocab_size=8192)))
        cores = os.sched_getaffinity(0)
        use_one_core()
        figures: Row = {"load_average": [os.getloadavg()[0]], "rows": by_kind(folder, texts, rounds)}
        figures["short_documents"] = [short_documents(folder, documents // 10), short_documents(folder, documents)]
        os.sched_setaffinity(0, cores)
        figures["processes"] = on_cores(folder, rounds)
        figures["load_average"].append(os.getloadavg()[0])
    show(figures)
    write_record(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
