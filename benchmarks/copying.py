"""The smallest model and budget that copies after training on Python files: the gate of the experiments on learning.

    python benchmarks/copying.py --directory runs/lengths    # hours of one core
    python benchmarks/copying.py --smallest

A comparison of ways to train on long contexts tells nothing as long as a model does not use its context at all. A model
passes if held-out text that stands twice in a sequence has a loss at least 1 nat lower the second time, and half of its
tokens are right. Rows have both at each checkpoint, by length, and the same of random tokens, which are harder. All
models train on the corpus of benchmarks/corpus.py by the recipe of benchmarks/decomposition.py, and may share its
directory. Cells are stored one by one, and the same command goes on after a kill; --show prints what is there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.cells import Cell, grid, restore, results, run_cells
from lib.commands import longring
from lib.learning import (
    checkpoints_of,
    copies,
    copying,
    evaluate,
    experiment_parser,
    keep_last_checkpoint,
    link_corpus,
    prepare_held_out,
    shown,
    train,
)
from lib.learning_pictures import draw_copying
from lib.script import Row, make_table, write_record
from longring.launch.config import load_recipe
from rich.console import Console

RECIPE = ROOT / "benchmarks" / "decomposition.toml"
LENGTHS = (512, 1024, 2048, 4096)
"""Lengths of the sequences in which tokens stand twice."""


def wide(width: int, *others: str) -> tuple[str, ...]:
    """Return the settings of two layers of a width, with heads of 64."""
    heads = width // 64
    sizes = (f"model.hidden_size={width}", f"model.ffn_hidden_size={3 * width}")
    return (*sizes, f"model.num_heads={heads}", f"model.num_kv_heads={heads}", *others)


CONCAT = ("data.directory=concat", "data.method=concat", "data.tokenizer.path=decomposed")
ARMS: Mapping[str, Sequence[str]] = {
    "128 wide": wide(128),
    "64 wide": wide(64),
    "128 wide, concat": wide(128, *CONCAT),
    "128 wide, RoPE": wide(128, 'model.layer_pattern=["window", "full"]'),
    "128 wide, full": wide(128, 'model.layer_pattern=["full"]', "model.window_tokens=0"),
}
"""Settings of each model: sizes, and then what the aids are worth, lengths that grow, no RoPE and a window."""


class Case(NamedTuple):
    """One size of the search."""

    corpus: str
    """Size of the corpus."""
    steps: int
    evaluations: int
    """Number of checkpoints that are evaluated."""
    samples: int
    settings: Sequence[str] = ()
    """Settings that replace those of the recipe."""
    arms: Sequence[str] = tuple(ARMS)
    lengths: Sequence[int] = LENGTHS


CASES: Mapping[str, Case] = {
    "full": Case("full", 2400, 6, 20),
    "quick": Case("quick", 100, 2, 10, ("train.warmup_steps=10",), ("128 wide",)),
    "smallest": Case(
        "smallest",
        2,
        1,
        2,
        (
            *("data.max_bucket_tokens=512", "data.tokenizer.vocab_size=512", "train.warmup_steps=1"),
            *("train.global_batch_tokens=1024", "parallel.tokens_per_rank=1024"),
        ),
        ("64 wide",),
        (512,),
    ),
}


def measure(case: Case, folder: Path, cell: Cell) -> Row:
    """Train a model, or what is left of it, and return how well each checkpoint copies."""
    every = case.steps // case.evaluations
    longring(folder, "prepare", RECIPE.name, *case.settings, *ARMS[cell.arm])
    run = train(
        folder,
        RECIPE,
        f"runs/{cell.name}",
        *case.settings,
        *ARMS[cell.arm],
        *(f"train.seed={cell.seed}", f"train.steps={case.steps}", f"train.checkpoint_every_steps={every}"),
        f"train.keep_checkpoint_every_steps={every}",
    )
    settings = ("train.dtype=bfloat16", "evaluate.max_tokens_per_bucket=16384", f"evaluate.samples={case.samples}")
    found = [shown(one) for one in evaluate(folder, checkpoints_of(run), ["copy"], *settings)]
    keep_last_checkpoint(run)
    batch = load_recipe(RECIPE, case.settings).train.global_batch_tokens
    return {"checkpoints": [{"tokens": batch * one["step"], **one} for one in found]}


def passed(rows: Sequence[Row], length: int) -> Row | None:
    """Return the first checkpoint that copies sequences of a length, and after which all do."""
    found = None
    for row in reversed(rows):
        if not copies(row, length):
            break
        found = row
    return found


def show(rows: Sequence[Row], case: Case) -> None:
    """Print gain and share at each checkpoint for the shortest and the longest sequences, and the first that passes."""
    for length in (case.lengths[0], case.lengths[-1]):
        table = make_table(
            f"{length:,} tokens, the second half as the first: gain in nats, and share that is right, by step",
            ("model", "of", *(f"{one['step']:,}" for one in (rows[0]["checkpoints"] if rows else ()))),
            {"model", "of"},
        )
        for row in rows:
            first = passed(row["checkpoints"], length)
            text, random = (
                [copying(one, length, task) for one in row["checkpoints"]] for task in ("copy_text", "copy_random")
            )
            table.add_row(row["arm"], "text", *(f"{gain:z.2f}" for gain, _ in text))
            copies_at = "" if first is None else f"  {first['tokens'] / 1e6:.1f}M tokens"
            table.add_row(copies_at, "", *(f"{right:.0%}" for _, right in text))
            table.add_row("", "random", *(f"{gain:z.2f}" for gain, _ in random))
            table.add_row("", "", *(f"{right:.0%}" for _, right in random))
        Console().print(table)
    Console().print("Under a model's name: the tokens at which it passes.")


def main() -> int:
    quick, picture = "100 steps of one model, some minutes", "draw the gain of copying by tokens"
    options = experiment_parser(__doc__ or "", quick, picture, gpu=False).parse_args()
    case = CASES[options.size]
    cells = grid(case.arms, seeds=1)
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        if options.record:
            restore(folder, options.record, cells)
        if not options.show:
            folder.mkdir(parents=True, exist_ok=True)
            link_corpus(folder, options.corpus, case.corpus)
            (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())
            longring(folder, "prepare", RECIPE.name, *case.settings)
            prepare_held_out(folder, RECIPE, "decomposed", case.lengths, case.settings)
            run_cells(folder, cells, lambda cell: measure(case, folder, cell))
        rows = list(results(folder, cells))
    show(rows, case)
    if options.picture and rows:
        draw_copying(rows, (case.lengths[0], case.lengths[-1]), options.picture)
    Console().print(f"{len(rows)} of {len(cells)} cells are done")
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
