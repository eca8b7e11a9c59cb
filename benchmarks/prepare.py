"""Speed of preparation on one core, beside its tokenizer alone and the script of Dataset Decomposition.

    python benchmarks/prepare.py --json rows.json   # five minutes
    python benchmarks/prepare.py --quick            # a quarter of the text
    python benchmarks/prepare.py --apple ../ml-dataset-decomposition

The text is Python's own standard library as JSON lines, the tokenizer a byte-level BPE of 8,192 trained on it. Three
members run on the same core in turns, and the fastest turn of each counts:

- bare: `encode_batch_fast` on the documents' texts, the faster of two batch sizes; the ids are dropped;
- ours: one input shard, from JSON lines to tar shards, with hashes and ledger;
- script: the method of make_dd_buckets.py in github.com/apple/ml-dataset-decomposition: `encode` document by
  document, power-of-two pieces, each list of 2^k + 1 ids as text in a tar member of its own;
- apple: with --apple DIR, a clone of that repository, its own `tokenize_and_shard`, which each process of the script
  runs, with the tokenizer of the others. It writes whole shards alone, 2^20 tokens each, and `kept` is the share of the
  tokens that it wrote. If it cannot run, the row has its error.

Peak memory is that of a fresh process on 1, 4 and 16 copies of the corpus in one input shard.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer's threads start

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.process import peak_megabytes, use_one_core
from lib.script import Row, make_parser, make_table, write_record
from lib.standard_library import corpus
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.tokenizer import DocumentTokenizer
from longring.data.prepare.input_shard import prepare_input_shard
from longring.data.prepare.merge import read_part
from longring.data.prepare.sources import input_shards
from longring.data.prepare.train_tokenizer import train_tokenizer
from rich.console import Console

MIN_TOKENS, MAX_TOKENS = 256, 8192
GOALS = {"bare": 0.85, "script": 1.15, "bytes_per_token_256": 2.2, "memory_growth": 1.1}


def settings(folder: Path, name: str) -> DataConfig:
    """Return the configuration of data prepared from the corpus in `folder`."""
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
    """Prepare the corpus in `folder` as one input shard and return its directory."""
    config = settings(folder, name)
    partial = folder / name
    partial.mkdir()
    (partial / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    [shard] = input_shards(config)
    prepare_input_shard(config, partial, 0, shard)
    return partial


def script(folder: Path, name: str, tokenizer: DocumentTokenizer) -> Path:
    """Decompose the corpus as the released script does: longest piece first, pieces below 256 tokens dropped."""
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


def apple(clone: Path, folder: Path) -> Callable[[str], Path]:
    """Return a function that prepares the corpus in `folder` into a new directory by the script of a clone.

    The clone is one of github.com/apple/ml-dataset-decomposition.
    """
    tokenize_and_shard = runpy.run_path(str(clone / "scripts" / "make_dd_buckets.py"))["tokenize_and_shard"]
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    shortest, *_, longest = (length.bit_length() - 1 for length in lengths())

    def prepared(name: str) -> Path:
        with redirect_stdout(io.StringIO()):  # the script tells of each shard
            files = [str(folder / "corpus.jsonl")]
            tokenize_and_shard(files, 0, str(folder / name), tokenizer, shortest, longest)
        return folder / name

    return prepared


def tried(clone: Path, folder: Path) -> Callable[[str], Path] | str:
    """Return `apple` after a first run of it, or the error that it ended with."""
    try:
        prepared = apple(clone, folder)
        prepared("tried")
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return prepared


def tokens_of(directory: Path) -> int:
    """Return the tokens in the shards that the clone's script has written, the last of each sequence not counted."""
    found = 0
    for length in lengths():
        for shard in (directory / f"{length.bit_length() - 1}").glob("*.tar"):
            if shard.stat().st_size:  # a bucket with too few sequences has an empty file
                with tarfile.open(shard) as tar:
                    found += length * len(tar.getnames())
    return found


def lengths() -> Iterable[int]:
    """Return the powers of two from the shortest to the longest piece."""
    return (1 << power for power in range(MIN_TOKENS.bit_length() - 1, MAX_TOKENS.bit_length()))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a call: the core may be shared."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_of_copies(folder: Path, copies: int) -> float:
    """Return the peak memory, in MB, of a process that prepares `copies` copies of the corpus."""
    many = folder / f"x{copies}"
    many.mkdir()
    content = (folder / "corpus.jsonl").read_bytes()
    with (many / "corpus.jsonl").open("wb") as file:
        for _ in range(copies):
            file.write(content)
    (many / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    command = [sys.executable, __file__, "--child", str(many)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(folder: Path, texts: list[str], rounds: int, copies_of: tuple[int, ...], clone: Path | None) -> Row:
    """Return the rates, bytes a token and peak memories of all members."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = train_tokenizer(texts, TokenizerConfig(vocab_size=8192))
    (folder / "tokenizer.json").write_bytes(content)
    tokenizer = DocumentTokenizer(content, "<|endoftext|>")
    tokens = sum(map(len, tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)))

    def bare(batch: int) -> None:
        for first in range(0, len(texts), batch):
            tokenizer.tokenizer.encode_batch_fast(texts[first : first + batch], add_special_tokens=False)

    of_clone = tried(clone, folder) if clone else None
    times: dict[str, list[float]] = {name: [] for name in ("ours", "bare", "script", *(["apple"] if of_clone else []))}
    for turn in range(rounds):
        times["bare"].append(min(cpu_seconds(lambda size=size: bare(size)) for size in (8, 128)))
        times["ours"].append(cpu_seconds(lambda name=f"ours{turn}": ours(folder, name)))
        times["script"].append(cpu_seconds(lambda name=f"script{turn}": script(folder, name, tokenizer)))
        if callable(of_clone):
            times["apple"].append(cpu_seconds(lambda name=f"apple{turn}": of_clone(name)))
    rate = {name: tokens / min(values) for name, values in times.items() if values}
    rows: list[Row] = [
        {"member": name, "tokens_per_s": value, "ours_is": rate["ours"] / value, "goal": GOALS.get(name)}
        for name, value in rate.items()
    ]
    if callable(of_clone):
        rows[-1]["kept"] = tokens_of(folder / "apple0") / tokens
    elif of_clone:
        rows.append({"member": "apple", "error": of_clone})
    _, shards = read_part(folder / "ours0", 0)
    shortest = shards[shards["length"] == MIN_TOKENS]
    theirs = folder / "script0" / f"D{MIN_TOKENS}.tar"
    with tarfile.open(theirs) as tar:
        their_tokens = MIN_TOKENS * len(tar.getnames())
    memory = {copies: peak_of_copies(folder, copies) for copies in copies_of}
    return {
        "tokens": tokens,
        "rows": rows,
        "bytes_per_token_256": int(shortest["size_bytes"].sum()) / (MIN_TOKENS * int(shortest["sequences"].sum())),
        "script_bytes_per_token_256": theirs.stat().st_size / their_tokens,
        **{f"peak_mb_x{copies}": value for copies, value in memory.items()},
        "memory_growth": memory[copies_of[-1]] / memory[1],
    }


def show(figures: Row) -> None:
    """Print the rates beside ours, bytes a token and peak memory, with their goals."""
    title = f"Preparing {figures['tokens']:,} tokens on one core"
    table = make_table(title, ("member", "tokens/s", "ours is", "goal"), left=("member",))
    errors = [row for row in figures["rows"] if "error" in row]
    for row in figures["rows"]:
        if row not in errors:
            beside = f"{row['ours_is']:.2f} of it", str(row["goal"] or "")
            table.add_row(row["member"], f"{row['tokens_per_s']:,.0f}", *beside)
    console = Console()
    console.print(table)
    for row in figures["rows"]:
        if "kept" in row:
            console.print(
                f"{row['member']} wrote {row['kept']:.0%} of the tokens; it drops the rests of shards and of documents"
            )
    for row in errors:
        console.print(f"{row['member']}: {row['error']}", highlight=False, markup=False)
    console.print(
        f"bytes a token at 256: ours {figures['bytes_per_token_256']:.2f} (goal {GOALS['bytes_per_token_256']}), "
        f"script {figures['script_bytes_per_token_256']:.2f}"
    )
    peaks = {name.removeprefix("peak_mb_x"): value for name, value in figures.items() if name.startswith("peak_mb_x")}
    megabytes = ", ".join(f"{value:.0f}" for value in peaks.values())
    console.print(
        f"peak memory at {', '.join(peaks)} times the text: {megabytes} MB, "
        f"growth {figures['memory_growth']:.2f} (goal {GOALS['memory_growth']})"
    )


def main() -> int:
    parser = make_parser(__doc__ or "", quick="a quarter of the text: about a minute")
    parser.add_argument(
        "--apple", type=Path, metavar="DIR", help="clone of ml-dataset-decomposition: its script as well"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        ours(options.child, "prepared")
        print(peak_megabytes())
        return 0
    use_one_core()
    limit_characters, rounds, copies_of = {
        "full": (2**40, 3, (1, 4, 16)),
        "quick": (8_000_000, 3, (1, 4, 16)),
        "smallest": (300_000, 1, (1, 2)),
    }[options.size]
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), corpus(limit_characters), rounds, copies_of, options.apple)
    show(figures)
    write_record(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
