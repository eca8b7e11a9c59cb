"""Ledgers that follow from the mixes of ProLong and OLMo 3, over made corpora of the same shape.

    python benchmarks/published_mixes.py --json mixes.json    # ten minutes
    python benchmarks/published_mixes.py --quick              # two minutes

The recipes are launch/recipes/prolong-64k.toml, prolong-512k.toml and olmo-3-7b-64k.toml as they are, but for batch,
steps and tokenizer. The corpora have their sources, in several kinds of files, and lengths of documents as theirs, from
hundreds of tokens to a million; contents are random ids or pieces of Python's standard library, and sizes are chosen so
that some sources are read several times and others in part. Data is prepared as for a run. The tables show the mix as
`longring plan` does before a run, and the ledger as a run prints it at its end. Then every sequence of every step is
read without a model, and each row's source is taken from the shard: the tokens so counted must be the ledger's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import numpy as np
import pyarrow
import pyarrow.parquet
from lib import ROOT
from lib.megatron import write_megatron
from lib.script import Row, make_parser, write_record
from lib.standard_library import corpus
from longring.data.config import TokenizerConfig
from longring.data.format.manifest import Manifest
from longring.data.inspect.mix import mix_tables
from longring.data.prepare.prepare import prepare
from longring.data.prepare.train_tokenizer import train_tokenizer
from longring.data.read.batch_order import BatchOrder
from longring.launch.config import Recipe, load_recipe
from longring.launch.metrics import trained_table
from longring.launch.preflight import order_of
from rich.console import Console

VOCAB_SIZE = 4096
BOUNDARY = 0
CHARACTERS_OF_A_TOKEN = 3.5
LONGEST = 1_000_000


class Made(NamedTuple):
    """A made corpus."""

    kind: str
    """Kind of its files: tokens, megatron, parquet with ids, or json with texts."""
    million_tokens: float
    median: int
    """Median length of a document, in tokens."""
    spread: float
    """Standard deviation of the logarithm of the length."""
    first: tuple[int, ...] = ()
    """Lengths of the first documents, so that the smallest corpus has each length that the recipe names."""


PROLONG = {
    "repositories": Made("tokens", 60, 60_000, 1.2, (600_000, 600_000, 100_000)),
    "books": Made("megatron", 30, 110_000, 0.7, (600_000, 600_000, 100_000)),
    "fineweb-edu": Made("parquet", 12, 700, 1.0),
    "fineweb": Made("parquet", 12, 500, 1.1),
    "stackexchange": Made("json", 3, 500, 0.9),
    "wikipedia": Made("json", 3, 400, 1.1),
    "tulu": Made("json", 0.6, 500, 0.8),
    "arxiv": Made("parquet", 6, 12_000, 0.7),
    "openwebmath": Made("parquet", 4, 900, 1.0),
    "textbooks": Made("json", 0.6, 1_500, 0.7),
}
OLMO = {
    "pdf": Made("parquet", 40, 12_000, 1.0, (20_000,) * 9),
    "common-words": Made("parquet", 2.5, 30_000, 0.5, (30_000,)),
    "rewritten": Made("parquet", 6, 30_000, 0.5, (30_000,)),
    "midtraining": Made("tokens", 40, 700, 1.2),
}


class Shown(NamedTuple):
    """A recipe over made corpora."""

    recipe: str
    corpora: dict[str, Made]
    batch: int
    """Tokens of a step."""
    slot: int
    steps: int


SHOWN = (
    Shown("prolong-64k", PROLONG, 2**18, 2**16, 160),
    Shown("prolong-512k", PROLONG, 2**20, 2**19, 40),
    Shown("olmo-3-7b-64k", OLMO, 2**18, 2**16, 160),
)


def lengths_of(made: Made, share: float, rng: np.random.Generator) -> list[int]:
    """Return the lengths of a corpus of `share` of its tokens, in tokens."""
    lengths = list(made.first)
    while sum(lengths) < share * made.million_tokens * 1e6 or len(lengths) < 3:
        drawn = rng.lognormal(np.log(made.median), made.spread, 256).clip(32, LONGEST).astype(int)
        totals = sum(lengths) + np.cumsum(drawn)
        lengths += drawn[: 1 + np.searchsorted(totals, share * made.million_tokens * 1e6)].tolist()
    return lengths


def write(folder: Path, made: Made, lengths: list[int], text: str, rng: np.random.Generator) -> None:
    """Write the documents of a corpus, in the kind of its files, into a new folder."""
    folder.mkdir(parents=True)
    if made.kind == "json":
        with (folder / "a.jsonl").open("w") as file:
            for length in lengths:
                start = int(rng.integers(len(text)))
                piece = text[start : start + int(length * CHARACTERS_OF_A_TOKEN)]
                file.write(json.dumps({"text": piece or text[:99]}) + "\n")
        return
    flat = rng.integers(1, VOCAB_SIZE, sum(lengths) + len(lengths)).astype("<u2")
    ends = np.cumsum(np.array(lengths) + 1)
    flat[ends - 1] = BOUNDARY
    if made.kind == "tokens":
        flat.tofile(folder / "a.npy")
    elif made.kind == "megatron":
        write_megatron(folder / "a", flat, np.array(lengths) + 1)
    else:
        ids = pyarrow.ListArray.from_arrays(np.concatenate([[0], ends]).astype("<i4"), flat)
        table = pyarrow.table({"ids": ids, "compression": rng.random(len(lengths))})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=64)


def settings(shown: Shown, steps: int) -> list[str]:
    """Return the settings that replace those of the recipe."""
    return [
        *(f"train.global_batch_tokens={shown.batch}", f"curriculum.slot_tokens={shown.slot}", f"train.steps={steps}"),
        *("train.warmup_steps=1", "data.tokenizer.path=tokenizer.json", "data.tokenizer.boundary='<|endoftext|>'"),
    ]


def sequences_read(manifest: Manifest, order: BatchOrder) -> Iterator[tuple[int, str, int]]:
    """Read all rows of all steps; yield (bucket, source, sequence) of each, as its shard says it."""
    owners = [source for source, count in manifest.sources.items() for _ in range(count)]
    readers = {bucket.length: manifest.reader(bucket) for bucket in manifest.buckets("train")}
    for step in range(1, len(order.slots) + 1):
        for stretch in order.batch(step):
            length, sequences = order.lengths[stretch.bucket], order.sequences(stretch)
            assert readers[length].read(sequences).shape == (len(sequences), length + 1)
            for sequence, pieces in zip(sequences.tolist(), readers[length].pieces(sequences), strict=True):
                yield length, owners[pieces[0, 0]], sequence


def ledger(shown: Shown, recipe: Recipe, manifest: Manifest, order: BatchOrder) -> list[Row]:
    """Return what is asked, given and left of each cell, and the tokens that reading all steps has counted."""
    trained = order.trained(len(order.slots))
    counts = {(cell.length, cell.source): 0 for cell in trained}
    distinct: set[tuple[int, int]] = set()
    for length, source, sequence in sequences_read(manifest, order):
        counts[length, source] += length
        distinct.add((length, sequence))
    assert counts == {(cell.length, cell.source): cell.tokens for cell in trained}, "the ledger counts what is read"
    assert sum(length for length, _ in distinct) == sum(cell.reached_tokens for cell in trained)
    every, available = sum(cell.tokens for cell in trained), sum(cell.available * cell.length for cell in trained)
    shares = recipe.curriculum.shares
    return [
        {
            "recipe": shown.recipe,
            "source": cell.source,
            "bucket": cell.length,
            "of_the_data": cell.available * cell.length / available,
            "asked": shares.get(f"{cell.source}@{cell.length}"),
            "asked_of_source": shares.get(cell.source),
            "given": cell.tokens / every,
            "read_tokens": counts[cell.length, cell.source],
            "passes": cell.passes,
            "repeated_tokens": cell.repeated_tokens,
            "never_reached_tokens": cell.not_reached_tokens,
        }
        for cell in trained
    ]


def show(shown: Shown, recipe: Recipe, order: BatchOrder, console: Console) -> None:
    """Print the mix before a run and the ledger at its end."""
    console.print(f"[bold]{shown.recipe}[/], {len(order.slots):,} steps of {shown.batch:,} tokens", highlight=False)
    for table in (*mix_tables(order, recipe.curriculum), trained_table(order.trained(len(order.slots)))):
        console.print(table)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="a tenth of the corpora and steps: two minutes")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the mix of each recipe over its steps")
    options = parser.parse_args()
    share = {"full": 1.0, "quick": 0.1, "smallest": 0.01}[options.size]
    pictures, record = (path and path.absolute() for path in (options.pictures, options.json))
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        texts = corpus(2_000_000 if share == 1 else 200_000)
        Path("tokenizer.json").write_bytes(train_tokenizer(texts, TokenizerConfig(vocab_size=VOCAB_SIZE)))
        rng = np.random.default_rng(0)
        for name, made in (PROLONG | OLMO).items():
            write(Path("corpora", name), made, lengths_of(made, share, rng), "".join(texts), rng)
        for shown in SHOWN:
            file = ROOT / "launch" / "recipes" / f"{shown.recipe}.toml"
            recipe = load_recipe(file, settings(shown, max(4, round(share * shown.steps))))
            manifest = prepare(recipe.data, Console(file=sys.stderr), workers=1)
            order = order_of(manifest, recipe)
            show(shown, recipe, order, console)
            rows += ledger(shown, recipe, manifest, order)
            if pictures:
                from longring.data.inspect.picture import draw_mix  # the import of matplotlib takes a second

                draw_mix(order, pictures / f"mix_{shown.recipe.replace('-', '_')}.png")
    write_record(record, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
