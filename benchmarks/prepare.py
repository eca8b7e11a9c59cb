"""Preparation on one core against its tokenizer alone, and against the released script of Dataset Decomposition.

    .venv/bin/python benchmarks/prepare.py [--quick] [--json FILE]

Text: Python's own standard library as JSON lines; tokenizer: a byte-level BPE of 8,192 trained on it. Each of

- bare: `encode_batch_fast` on the documents' texts, the faster of two batch sizes, ids not even looked at;
- ours: one input shard, JSON lines to tar shards, hashes, ledger and all;
- script: what `make_dd_buckets.py` does: `encode` document by document, power-of-two pieces, each list of 2^k + 1 ids
  as text in a tar member of its own (github.com/apple/ml-dataset-decomposition)

runs on the same core in turns, and the fastest of its turns counts. Peak memory is that of a fresh process on 1, 4 and
16 copies of the corpus in one input shard.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer's threads start

from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.tokenizer import DocumentTokenizer, train_tokenizer
from longring.data.prepare.input_shard import prepare_input_shard
from longring.data.prepare.sources import input_shards
from rich.console import Console
from rich.table import Table

MIN_TOKENS, MAX_TOKENS = 256, 8192
GOALS = {"bare": 0.85, "script": 1.15, "bytes_per_token_256": 2.2, "memory_growth": 1.1}


def corpus(limit_bytes: int) -> list[str]:
    texts, total = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts and total < limit_bytes:
            text = file.read_text(encoding="utf-8", errors="ignore")
            texts += [text] * bool(text)
            total += len(text)
    return texts


def settings(folder: Path, name: str) -> DataConfig:
    return DataConfig(
        directory=str(folder / name),
        source=SourceConfig(kind="json", path=str(folder / "corpus.jsonl")),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer.json")),
        min_bucket_tokens=MIN_TOKENS,
        max_bucket_tokens=MAX_TOKENS,
        held_out_fraction=0.0,
        input_shard_bytes=2**40,
    )


def ours(folder: Path, name: str) -> Path:
    config = settings(folder, name)
    partial = folder / name
    partial.mkdir()
    (partial / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    [shard] = input_shards(config)
    prepare_input_shard(config, partial, 0, shard)
    return partial


def script(folder: Path, name: str, tokenizer: DocumentTokenizer) -> Path:
    """The released script's method, with its settings: longest piece first, below 256 dropped."""
    target = folder / name
    target.mkdir()
    tars = {length: tarfile.TarFile(target / f"D{length}.tar", "w") for length in lengths()}
    number = 0
    with (folder / "corpus.jsonl").open() as lines:
        for line in lines:
            ids = [*tokenizer.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, 0]
            while len(ids) > MIN_TOKENS:
                length = min(1 << ((len(ids) - 1).bit_length() - 1), MAX_TOKENS)
                content = json.dumps(ids[: length + 1]).encode()
                ids = ids[length + 1 :]
                member = tarfile.TarInfo(f"{number:08d}.json")
                member.size = len(content)
                tars[length].addfile(member, io.BytesIO(content))
                number += 1
    for tar in tars.values():
        tar.close()
    return target


def lengths() -> Iterable[int]:
    return (1 << power for power in range(MIN_TOKENS.bit_length() - 1, MAX_TOKENS.bit_length()))


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time(), time.perf_counter()
    work()
    # CPU time: the core is not ours alone. Waiting for the disk shows in the other clock, which must not differ much.
    return time.process_time() - started[0]


def peak_megabytes(folder: Path, copies: int) -> float:
    """Of a process that prepares so many copies of the corpus."""
    many = folder / f"x{copies}"
    many.mkdir()
    content = (folder / "corpus.jsonl").read_bytes()
    with (many / "corpus.jsonl").open("wb") as file:
        for _ in range(copies):
            file.write(content)
    (many / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    command = [sys.executable, __file__, "--child", str(many)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the text; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        ours(options.child, "prepared")
        # Not getrusage: its peak counts the parent's memory, which the child shares until it is replaced.
        [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak.split()[1]) / 1024)
        return 0
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    texts = corpus(8_000_000 if options.quick else 2**40)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), texts, rounds=3)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(folder: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = train_tokenizer(texts, TokenizerConfig(vocab_size=8192))
    (folder / "tokenizer.json").write_bytes(content)
    tokenizer = DocumentTokenizer(content, "<|endoftext|>")
    tokens = sum(map(len, tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)))

    def bare(batch: int) -> None:
        for first in range(0, len(texts), batch):
            tokenizer.tokenizer.encode_batch_fast(texts[first : first + batch], add_special_tokens=False)

    times: dict[str, list[float]] = {"bare": [], "ours": [], "script": []}
    for turn in range(rounds):
        times["bare"].append(min(seconds(lambda size=size: bare(size)) for size in (8, 128)))
        times["ours"].append(seconds(lambda name=f"ours{turn}": ours(folder, name)))
        times["script"].append(seconds(lambda name=f"script{turn}": script(folder, name, tokenizer)))
    rate = {name: tokens / min(values) for name, values in times.items()}
    books = json.loads((folder / "ours0" / "work" / "books" / "000000.json").read_text())
    shortest = [row for row in books["shards"] if row[3] == MIN_TOKENS]
    theirs = folder / "script0" / f"D{MIN_TOKENS}.tar"
    with tarfile.open(theirs) as tar:
        their_tokens = MIN_TOKENS * len(tar.getnames())
    memory = {copies: peak_megabytes(folder, copies) for copies in (1, 4, 16)}
    return {
        "tokens": tokens,
        "rows": [
            {"member": name, "tokens_per_s": rate[name], "ours_is": rate["ours"] / rate[name], "goal": GOALS.get(name)}
            for name in ("ours", "bare", "script")
        ],
        "bytes_per_token_256": sum(row[5] for row in shortest) / sum(row[4] * row[3] for row in shortest),
        "script_bytes_per_token_256": theirs.stat().st_size / their_tokens,
        **{f"peak_mb_x{copies}": value for copies, value in memory.items()},
        "memory_growth": memory[16] / memory[1],
    }


def show(figures: dict[str, Any]) -> None:
    table = Table(title=f"Preparing {figures['tokens']:,} tokens on one core", title_justify="left")
    for column in ("", "tokens/s", "ours is", "goal"):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        beside = (f"{row['ours_is']:.2f} of it", str(row["goal"])) if row["goal"] else ()
        table.add_row(row["member"], f"{row['tokens_per_s']:,.0f}", *beside)
    console = Console()
    console.print(table)
    console.print(
        f"bytes a token at 256: ours {figures['bytes_per_token_256']:.2f} (goal {GOALS['bytes_per_token_256']}), "
        f"script {figures['script_bytes_per_token_256']:.2f}"
    )
    console.print(
        f"peak memory at 1, 4, 16 times the text: {figures['peak_mb_x1']:.0f}, {figures['peak_mb_x4']:.0f}, "
        f"{figures['peak_mb_x16']:.0f} MB, growth {figures['memory_growth']:.2f} (goal {GOALS['memory_growth']})"
    )


if __name__ == "__main__":
    sys.exit(main())
