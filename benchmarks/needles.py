"""Needles that a small model finds over rings of 4 ranks, before and after it learns to copy.

    python benchmarks/needles.py --picture needles.png    # 11 min of one core
    python benchmarks/needles.py --smallest               # 2 min

The chain is that of any run, by the commands that a user would type: `longring prepare`, `longring train` with
benchmarks/needles.toml, and `longring evaluate` of two checkpoints over 4 ranks. The documents are samples of the tasks
themselves, of another seed than that of the evaluation, which draws keys and values anew. Their lengths grow from 16 to
2,048 tokens. The haystack is held-out generated sentences.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.commands import longring
from lib.script import Row, Size, make_parser, make_table, write_record
from longring.data.config import BYTES_AND_BOUNDARY, TokenizerConfig
from longring.data.files import write_text
from longring.data.prepare.train_tokenizer import train_tokenizer
from longring.data.tasks.catalog import TASKS, samples
from longring.data.tasks.draws import Draws
from longring.data.tasks.material import Material
from longring.data.tasks.sample import TooShortError
from longring.data.tasks.words import sentence
from longring.launch.records import read_records
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

RECIPE = ROOT / "benchmarks" / "needles.toml"
TRAINED = (
    *("copy_random", "needle_single_1", "needle_single_2", "needle_single_3"),
    *("needle_multikey_2", "needle_multikey_3"),
)
"""Tasks whose samples are the documents."""
SEED = 1
"""Seed of the documents; that of evaluations is train.seed, 0."""
HAYSTACK = (
    *("data.directory=haystack", "data.source.path=haystack.jsonl", "data.source.tokens_field="),
    "data.held_out_fraction=0.5",
)
"""Settings that prepare the haystack."""
EVALUATION = (
    *("--tasks", "copy_random,needle_single", "evaluate.distractors=0"),
    *("evaluate.max_tokens_per_bucket=16384", "train.dtype=bfloat16"),
)


class Case(NamedTuple):
    """Sizes of one run of the benchmark, and of its measurements."""

    steps: Mapping[int, int]
    """Steps of 2,048 tokens on the documents of each length."""
    before: int
    """Step of the checkpoint that does not copy yet."""
    vocab_size: int
    ranks: int
    """Ranks of the evaluation, which share the longest sequences."""
    least_tokens: int
    """Shortest length of the evaluation."""
    settings: Sequence[str] = ()
    """Settings that replace those of the recipe."""


SMALL = Case(
    {16: 60, 32: 40, 64: 20, 128: 30},
    before=30,
    vocab_size=512,
    ranks=2,
    least_tokens=64,
    settings=(
        *("model.hidden_size=128", "model.ffn_hidden_size=256", "data.max_bucket_tokens=128"),
        *("train.ranks_per_node=1", "train.checkpoint_every_steps=30", "train.keep_checkpoint_every_steps=30"),
        *("parallel.tokens_per_rank=2048", "train.decay_steps=30", "model.window_tokens=2"),
    ),
)
CASES: Mapping[Size, Case] = {
    "full": Case(
        {16: 100, 32: 180, 64: 40, 128: 120, 256: 80, 512: 80, 1024: 100, 2048: 460},
        before=100,
        vocab_size=1024,
        ranks=4,
        least_tokens=256,
    ),
    "quick": SMALL,
    "smallest": SMALL,
}


def material_of(tokenizer: Tokenizer) -> Material:
    """Return what samples are made of, with generated sentences as documents."""
    boundary_id = tokenizer.token_to_id(TokenizerConfig().boundary)
    assert boundary_id is not None
    return Material(tokenizer, boundary_id)


def trained_tokenizer(vocab_size: int) -> bytes:
    """Return a tokenizer that is trained on texts of the tasks, whose words and pairs of digits are then tokens."""
    of_bytes = Tokenizer.from_str(train_tokenizer([], TokenizerConfig(vocab_size=BYTES_AND_BOUNDARY)).decode())
    rows = (
        sample.rows[0].tolist()
        for name in TRAINED[1:]
        for sample in samples(name, material_of(of_bytes), 4096, count=60, distractors=0, seed=SEED)
    )
    return train_tokenizer(map(of_bytes.decode, rows), TokenizerConfig(vocab_size=vocab_size))


def rows(material: Material, length: int) -> Iterator[list[int]]:
    """Yield samples of the trained tasks in turn, without boundary tokens; a task ends at a sample that is too long."""
    names = list(TRAINED)
    for number in count():
        for name in names[:]:
            try:
                sample = TASKS[name].make(material, length, number, 0, Draws(SEED, name, length, number))
            except TooShortError:
                names.remove(name)
                continue
            yield sample.rows[0, 1:].tolist()


def make_documents(folder: Path, case: Case) -> None:
    """Write the documents, those of the haystack, and their tokenizer into a directory, unless they are there."""
    if (folder / "haystack.jsonl").exists():
        return
    content = trained_tokenizer(case.vocab_size)
    (folder / "tokenizer.json").write_bytes(content)
    material = material_of(Tokenizer.from_str(content.decode()))
    # Some more than are trained, since a part is held out.
    documents = (
        {"tokens": row}
        for length, steps in case.steps.items()
        for row in islice(rows(material, length), int(1.05 * steps * 2048 / length) + 2)
    )
    draws = Draws("haystack")
    haystack = ({"text": "".join(sentence(draws) for _ in range(30 + draws.below(400)))} for _ in range(100))
    for file, made in (("rows.jsonl", documents), ("haystack.jsonl", haystack)):
        write_text(folder / file, "".join(json.dumps(one) + "\n" for one in made))


def train_and_evaluate(folder: Path, case: Case, picture: Path | None) -> Row:
    """Return what two checkpoints of a run in this directory can do, and how the commands got there."""
    make_documents(folder, case)
    recipe, steps = RECIPE.name, sum(case.steps.values())
    (folder / recipe).write_bytes(RECIPE.read_bytes())
    settings = [f"train.steps={steps}", *case.settings]
    checkpoints = [f"run/checkpoints/step-{step:08d}" for step in (case.before, steps)]
    evaluation = ["--data", "haystack", "--ranks", str(case.ranks), *EVALUATION, "--json", "found.json"]
    drawn = ["--picture", str(picture.absolute())] if picture else []
    commands = [
        longring(folder, "prepare", recipe, *settings),
        longring(folder, "prepare", recipe, *settings, *HAYSTACK, f"data.min_bucket_tokens={case.least_tokens}"),
        longring(folder, "train", recipe, *settings),
        longring(folder, "evaluate", *checkpoints, *evaluation, *drawn),
    ]
    trained = read_records(folder / "run" / "metrics.jsonl")
    return {
        "commands": commands,
        "tokens": trained[-1]["tokens"],
        "rows": json.loads((folder / "found.json").read_text())["targets"],
    }


def table_of(results: Sequence[Row]) -> Table:
    """Return gain and exact match by task and length, a column for each step."""
    table = make_table(
        "Gain of copying, nats a token; exact match of needles",
        ["task", "length", "ring", *(f"step {one['step']}" for one in results)],
        left={"task"},
    )
    for entries in zip(*(one["tasks"] for one in results), strict=True):
        task, length, ring = (entries[0][key] for key in ("task", "length", "cp"))
        shown = (f"{one['exact']:.0%}" if one["gain"] is None else f"{one['gain']:z.2f}" for one in entries)
        table.add_row(task, f"{length:,}", str(ring), *shown)
    return table


def main() -> int:
    parser = make_parser(__doc__ or "", "a tiny model that learns to copy 128 tokens, two minutes")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw exact match by depth and length")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep the run in an empty directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = train_and_evaluate(folder, CASES[options.size], options.picture)
    Console().print(table_of(found["rows"]))
    write_record(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
