"""Speed and memory of preparation on odd documents, beside ordinary text.

    python benchmarks/prepare_odd.py --json rows.json   # twenty minutes
    python benchmarks/prepare_odd.py --quick            # an eighth of the bytes

Each row is one text in one JSON record (the first row: many), prepared as an input shard by a fresh process on one
core, with a byte-level BPE of 8,192 tokens:

- MB/s: UTF-8 bytes of the text in each CPU second, from JSON lines to tar shards with hashes and ledger;
- training MB/s: the same for training a tokenizer of 8,192 on the first eighth of the text;
- peak MB: the most memory of the process that prepares; start MB, before it reads the text;
- cuts: cuts inside words or runs of white space, as the ledger counts them.

The full size ends with a document of one gigabyte.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before the tokenizer's threads start

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.process import peak_megabytes, use_one_core
from lib.script import Row, make_parser, make_table, write_record
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.prepare.input_shard import prepare_input_shard
from longring.data.prepare.merge import read_part
from longring.data.prepare.sources import input_shards
from longring.data.prepare.train_tokenizer import train_tokenizer
from rich.console import Console

DRAW = random.Random(0)
GOAL = 3.0
"""Goal: ordinary text in many documents is at most as many times as fast as any odd kind."""


def ordinary(size: int) -> str:
    """Return `size` characters of the standard library, repeated as needed."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    return (text * (size // len(text) + 1))[:size]


KINDS: dict[str, Callable[[int], str]] = {
    "ordinary": ordinary,
    "one word of random letters": lambda size: "".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=size)),
    "one letter repeated": lambda size: "a" * size,
    "dashes": lambda size: "-" * size,
    "spaces": lambda size: " " * size,
    "line ends": lambda size: "\r\n" * (size // 2),
    "base64": lambda size: base64.b64encode(DRAW.randbytes(size * 3 // 4)).decode(),
    "random bytes as Latin-1": lambda size: DRAW.randbytes(size * 2 // 3).decode("latin-1"),
    "zero bytes": lambda size: "\x00" * size,
    "combining marks": lambda size: "e" + "\u0301" * (size // 2),
    "Chinese without spaces": lambda size: "".join(map(chr, DRAW.choices(range(0x4E00, 0x9FA5), k=size // 3))),
}


def child(folder: Path) -> None:
    """Prepare the text in `folder` and print the figures of this process as JSON."""
    config = DataConfig(
        directory=str(folder / "prepared"),
        source=SourceConfig(kind="json", path=str(folder / "corpus.jsonl")),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer.json")),
        min_bucket_tokens=256,
        max_bucket_tokens=8192,
        held_out_fraction=0.0,
        input_shard_bytes=2**40,
    )
    partial = folder / "prepared"
    partial.mkdir()
    (partial / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    [shard] = input_shards(config)
    start_mb = peak_megabytes()
    started = time.process_time()
    prepare_input_shard(config, partial, 0, shard)
    seconds = time.process_time() - started
    ledger, _ = read_part(partial, 0)
    figures = {"seconds": seconds, "start_mb": start_mb, "peak_mb": peak_megabytes()}
    print(
        json.dumps(
            {**figures, "tokens": ledger.tokens, "cuts": ledger.word_cuts, "first": ledger.word_cut_examples[:1]}
        )
    )


def measure(folder: Path, name: str, texts: list[str], tokenizer: bytes) -> Row:
    """Return the row of texts that are one record each."""
    num_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        inside = Path(temporary)
        (inside / "tokenizer.json").write_bytes(tokenizer)
        with (inside / "corpus.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        command = [sys.executable, __file__, "--child", temporary]
        done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {
        "kind": name,
        "documents": len(texts),
        "mb": num_bytes / 1e6,
        "mb_per_s": num_bytes / 1e6 / done["seconds"],
        **done,
    }


def training_rate(text: str) -> float:
    """Return the MB of `text` in each CPU second of training a tokenizer on it."""
    started = time.process_time()
    train_tokenizer([text], TokenizerConfig(vocab_size=8192))
    return len(text.encode()) / 1e6 / (time.process_time() - started)


def all_rows(folder: Path, size: int, gigabyte: int) -> list[Row]:
    """Return the rows of all kinds, `size` bytes each, and of one document of `gigabyte` bytes unless that is 0."""
    text = ordinary(size)
    tokenizer = train_tokenizer([text[: 8 * 10**6]], TokenizerConfig(vocab_size=8192))
    records = [text[start : start + 8_000] for start in range(0, size, 8_000)]
    rows = [
        {**measure(folder, "ordinary, 8 kB each", records, tokenizer), "training": training_rate(text[: size // 8])}
    ]
    for name, make in KINDS.items():
        text = make(size)
        row = measure(folder, name, [text], tokenizer)
        rows.append({**row, "training": training_rate(text[: len(text) // 8])})
    if gigabyte:
        rows.append(measure(folder, "ordinary", [ordinary(gigabyte)], tokenizer))
    for row in rows:
        row["ordinary_is"] = rows[0]["mb_per_s"] / row["mb_per_s"]
    return rows


def show(rows: list[Row]) -> None:
    """Print the rates beside those of ordinary text."""
    columns = ("one document of", "MB", "MB/s", "ordinary is", "training MB/s", "start MB", "peak MB", "cuts")
    table = make_table("Preparing odd documents on one core", columns, left=("one document of",))
    for row in rows:
        training = f"{row['training']:.2f}" if "training" in row else ""
        rates = (f"{row['mb']:,.1f}", f"{row['mb_per_s']:.2f}", f"{row['ordinary_is']:.2f} x", training)
        table.add_row(row["kind"], *rates, f"{row['start_mb']:,.0f}", f"{row['peak_mb']:,.0f}", f"{row['cuts']:,}")
    console = Console()
    console.print(table)
    console.print(f"goal: ordinary text is at most {GOAL:.0f} times as fast as any kind")


def main() -> int:
    parser = make_parser(__doc__ or "", quick="an eighth of the bytes, without the gigabyte: two minutes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return 0
    use_one_core()
    size, gigabyte = {"full": (2**25, 10**9), "quick": (2**22, 0), "smallest": (2**17, 0)}[options.size]
    with tempfile.TemporaryDirectory() as temporary:
        rows = all_rows(Path(temporary), size, gigabyte)
    show(rows)
    write_record(options.json, {"goal": GOAL, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
