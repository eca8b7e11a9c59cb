"""Needles and backtraces that a small model finds after an extension from 512 to 4,096 tokens, with and without knots.

    python benchmarks/untie_the_knots.py --directory runs/knots    # 4 hours
    python benchmarks/untie_the_knots.py --gpu --directory runs/knots-gpu

The corpus is that of benchmarks/corpus.py. A model is trained on sequences of at most 512 tokens, each of one document,
by benchmarks/untie_the_knots.toml. Then it goes on with concatenated documents at 4,096 tokens and eight times the RoPE
base, for the same steps with the shares 0, 0.3 and 0.8 of tied sequences; a document has at most half a context, so
that there are several to mix.
Beside them stands the short model as it is, and with the larger base alone. Rows have the gain of copying, the share of
right tokens of needles, by depth, and of backtraces, and the held-out loss, by length. The cells, a model with a seed,
are stored one by one: the same command goes on after a kill, several may share the cells, and --show prints what is
there.
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
from lib.cells import Cell, grid, measured_once, restore, results, run_cells
from lib.commands import longring
from lib.learning import (
    LONGEST_DOCUMENTS,
    checkpoints_of,
    copies,
    copying,
    evaluate,
    experiment_parser,
    keep_last_checkpoint,
    link_corpus,
    prepare_held_out,
    right_tokens,
    sequences_of,
    shown,
    spread,
    spread_text,
    train,
    train_shared,
)
from lib.learning_pictures import draw_knots
from lib.script import Row, make_table, write_record
from rich.console import Console

RECIPE = ROOT / "benchmarks" / "untie_the_knots.toml"
SHARES: Mapping[str, float] = {"share 0": 0.0, "share 0.3": 0.3, "share 0.8": 0.8}
"""Share of tied sequences of each extension."""
SHORT, LARGER_BASE, BASELINE = "not extended", "base alone", "share 0"
TASKS = ("copy", "needle", "backtrace")


class Case(NamedTuple):
    """One size of the experiment."""

    corpus: str
    """Size of the corpus."""
    steps: int
    """Steps of the short phase."""
    long_steps: int
    """Steps of the extension."""
    seeds: int
    short: int
    """Context of the short phase, tokens."""
    long: int
    """Context after the extension."""
    rope_base: float
    """RoPE base of the extension."""
    samples: int = 40
    settings: Sequence[str] = ()
    """Settings that replace those of the recipe."""
    arms: Sequence[str] = (SHORT, LARGER_BASE, *SHARES)

    @property
    def lengths(self) -> list[int]:
        """Lengths at which the models are evaluated."""
        return [self.short << power for power in range((self.long // self.short).bit_length())]


CASES: Mapping[str, Case] = {
    "full": Case("full", 2000, 1000, 3, 512, 4096, 8e4),
    "gpu": Case(
        "full",
        900,
        450,
        3,
        2048,
        16_384,
        8e4,
        settings=(
            *(
                "data.source.limit_documents=0",
                "data.tokenizer.vocab_size=8192",
                "model.num_layers=8",
                "model.hidden_size=512",
                "model.num_heads=8",
            ),
            *("model.num_kv_heads=8", "model.ffn_hidden_size=1536", "parallel.tokens_per_rank=65536"),
            *("train.global_batch_tokens=65536", "train.checkpoint_every_steps=300", "train.decay_steps=200"),
        ),
    ),
    "quick": Case("quick", 60, 30, 1, 512, 4096, 8e4, 8, ("train.warmup_steps=10", "train.decay_steps=10")),
    "smallest": Case(
        "smallest",
        2,
        2,
        1,
        256,
        1024,
        4e4,
        2,
        (
            *("data.tokenizer.vocab_size=512", "model.hidden_size=64", "model.num_heads=1", "model.num_kv_heads=1"),
            *("model.ffn_hidden_size=64", "train.global_batch_tokens=1024", "parallel.tokens_per_rank=1024"),
            *("train.warmup_steps=1", "train.decay_steps=1", "knots.min_sequence_tokens=1024"),
        ),
        ("share 0.8",),
    ),
}


def short_data(case: Case) -> list[str]:
    """Return the settings of the data of the short phase, sequences of one document each."""
    return [*case.settings, "data.directory=short", f"data.max_bucket_tokens={case.short}"]


def long_data(case: Case) -> list[str]:
    """Return the settings of the data of the extension: all documents of at most half a context, concatenated."""
    sizes = ["data.method=concat", f"data.min_bucket_tokens={case.long}", f"data.max_bucket_tokens={case.long}"]
    several = ["data.source.limit_documents=0", f"data.source.max_tokens={case.long // 2}"]
    return [*case.settings, "data.directory=long", *sizes, *several, "data.tokenizer.path=short"]


def sequences_by_phase(folder: Path) -> Row:
    """Return the sequences of both phases, by length."""
    return measured_once(folder, "data", lambda: {name: sequences_of(folder / name) for name in ("short", "long")})


def measure(case: Case, folder: Path, cell: Cell) -> Row:
    """Train a cell, or what is left of it, and return the scores of its last checkpoint."""
    base = f"runs/short-{cell.seed}"
    run = train_shared(folder, RECIPE, base, *short_data(case), f"train.seed={cell.seed}", f"train.steps={case.steps}")
    if cell.arm in SHARES:
        run = train(
            folder,
            RECIPE,
            f"runs/{cell.name}",
            *long_data(case),
            *(f"init.from={base}", f"model.rope_base={case.rope_base:g}", f"knots.share={SHARES[cell.arm]}"),
            *(f"train.seed={cell.seed}", f"train.steps={case.long_steps}"),
        )
        keep_last_checkpoint(run)
    rope = [f"model.rope_base={case.rope_base:g}"] if cell.arm == LARGER_BASE else []
    settings = (
        *("train.dtype=bfloat16", "evaluate.distractors=0"),
        f"evaluate.max_tokens_per_bucket={LONGEST_DOCUMENTS * case.long}",
        *(f"evaluate.samples={case.samples}", *rope),
    )
    [found] = evaluate(folder, checkpoints_of(run)[-1:], TASKS, *settings)
    return shown(found)


def summary(rows: Sequence[Row], case: Case) -> list[Row]:
    """Return a row for each model that has results and each length: loss and scores over the seeds.

    "more_needles" is the share of right tokens of needles that an extension has over the one without knots, by seed.
    """
    of = {(row["arm"], row["seed"]): row for row in rows}
    found = []
    for arm in case.arms:
        mine = [row for row in rows if row["arm"] == arm]
        paired = [(row, of[BASELINE, row["seed"]]) for row in mine if SHARES.get(arm) and (BASELINE, row["seed"]) in of]
        for number, length in enumerate(case.lengths if mine else ()):
            found.append(
                {
                    "arm": arm,
                    "seeds": len(mine),
                    "passed": sum(copies(row, case.lengths[0]) for row in mine),
                    "length": length,
                    "loss": spread([row["buckets"][number]["loss"] for row in mine]),
                    "copying": spread([copying(row, length)[0] for row in mine]),
                    "copied": spread([copying(row, length)[1] for row in mine]),
                    **{
                        task: spread([right_tokens(row, task, length) for row in mine])
                        for task in ("needle", "backtrace")
                    },
                    "more_needles": spread(
                        [
                            right_tokens(row, "needle", length) - right_tokens(base, "needle", length)
                            for row, base in paired
                        ]
                    ),
                }
            )
    return found


def show(rows: Sequence[Row], case: Case) -> None:
    """Print the scores of each model at each length, over its seeds."""
    table = make_table(
        f"Held-out loss, gain of copying in nats, right tokens; gate; over {BASELINE}",
        ("model", "length", "loss", "copying", "needles", "over", "backtrace"),
        {"model"},
    )
    for number, line in enumerate(summary(rows, case)):
        names = (line["arm"], f"gate {line['passed']}/{line['seeds']}", *[""] * len(case.lengths))
        table.add_row(
            names[number % len(case.lengths)],
            f"{line['length']:,}",
            spread_text(line["loss"], "{:.2f}"),
            spread_text(line["copying"], "{:z.2f}"),
            *(spread_text(line[key], "{:.0%}") for key in ("needle", "more_needles", "backtrace")),
        )
    Console().print(table)


def main() -> int:
    quick, picture = "one seed of 90 steps, ten minutes", "draw needles by depth, and all scores by length"
    options = experiment_parser(__doc__ or "", quick, picture, gpu=True).parse_args()
    case = CASES[options.size]
    cells = grid(case.arms, case.seeds)
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        if options.record:
            restore(folder, options.record, cells, ["data"])
        if not options.show:
            folder.mkdir(parents=True, exist_ok=True)
            link_corpus(folder, options.corpus, case.corpus)
            (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())
            for data in (short_data(case), long_data(case)):
                longring(folder, "prepare", RECIPE.name, *data)
            prepare_held_out(folder, RECIPE, "short", case.lengths, case.settings)
            run_cells(folder, cells, lambda cell: measure(case, folder, cell))
        rows = list(results(folder, cells))
        data = sequences_by_phase(folder) if rows else {}
    show(rows, case)
    if options.picture and rows:
        draw_knots(rows, case.arms, case.lengths, options.picture)
    Console().print(f"{len(rows)} of {len(cells)} cells are done")
    write_record(options.json, {"data": data, "summary": summary(rows, case), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
