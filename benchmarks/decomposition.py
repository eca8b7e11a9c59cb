"""Held-out losses of a small model under Dataset Decomposition and its baselines, for equal tokens and equal seconds.

    python benchmarks/decomposition.py --directory runs/lengths     # 10 hours
    python benchmarks/decomposition.py --gpu --directory runs/gpu   # a GPU

The corpus is that of benchmarks/corpus.py. The model of benchmarks/decomposition.toml is first trained on sequences of
at most 1,024 tokens, until it copies. Every arm goes on from there on the same number of tokens, with the same seeds:

- grow-p2: sequences of all lengths, cut at random as in the paper's code, its best curriculum, 8 cycles
- one cycle, own draw, uniform, largest first: the same with one of these settings changed
- concat, masked, best fit: sequences of the longest length alone; concatenated, with documents kept apart, packed

A step's CPU seconds are measured by length, in turns. "grow-p2, seconds" trains as many steps as take the seconds of
concat. Rows have the loss of the beginnings of held-out documents, by length and position, the gain of copying and the
right tokens of needles. The cells, an arm with a seed, are stored in the directory one by one: the same command
goes on after a kill, several may share the cells, and --show prints what is there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
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
    steps_by_bucket,
    train,
    train_shared,
)
from lib.learning_pictures import draw_lengths
from lib.script import Row, make_table, write_record
from lib.step_seconds import step_seconds
from longring.data.format.manifest import open_prepared
from longring.launch.config import load_recipe
from rich.console import Console

RECIPE = ROOT / "benchmarks" / "decomposition.toml"
SHORT = ("data.directory=short", "data.tokenizer.path=decomposed", "curriculum.odds=natural")
"""Settings of the short phase, beside its longest sequences: it is that of related_prefixes.py."""
DECOMPOSED = ("data.directory=decomposed",)
ARMS: Mapping[str, Sequence[str]] = {
    "grow-p2": DECOMPOSED,
    "concat": ("data.directory=concat", "data.method=concat"),
    "grow-p2, seconds": DECOMPOSED,
    "masked": ("data.directory=masked", "data.method=concat_masked"),
    "best fit": ("data.directory=best_fit", "data.method=best_fit"),
    "one cycle": (*DECOMPOSED, "curriculum.cycles=1"),
    "own draw": (*DECOMPOSED, "curriculum.draw=odds_times_left"),
    "uniform": (*DECOMPOSED, "curriculum.odds=uniform"),
    "largest first": ("data.directory=largest_first", "data.cut=largest_first"),
}
"""Settings of each arm; the most important come first, since results come arm by arm."""
BASELINE, SAME_SECONDS = "concat", "grow-p2, seconds"
EVALUATION = ("train.dtype=bfloat16", "evaluate.distractors=0")
"""Settings of evaluations beside those of the recipe, which `longring evaluate --data` does not read."""


class Case(NamedTuple):
    """One size of the experiment."""

    corpus: str
    """Size of the corpus."""
    short_steps: int
    """Steps of the short phase, with which all arms of a seed begin."""
    steps: int
    """Steps of an arm."""
    seeds: int
    lengths: Sequence[int]
    """Lengths of the held-out documents; the longest is that of the contexts."""
    short: int = 1024
    """Length of the longest sequences of the short phase."""
    evaluations: int = 8
    """Number of checkpoints of an arm that are evaluated, the last included: one at the end of each Grow-P2 cycle."""
    samples: int = 40
    """Samples of each task and length after the last step; a quarter of them before."""
    rounds: int = 25
    """Number of rounds in which the steps are timed."""
    settings: Sequence[str] = ()
    """Settings that replace those of the recipe."""
    arms: Sequence[str] = tuple(ARMS)


CASES: Mapping[str, Case] = {
    "full": Case("full", 1500, 1600, 3, (512, 1024, 2048, 4096)),
    "gpu": Case(
        "full",
        600,
        1600,
        3,
        (512, 1024, 2048, 4096, 8192, 16_384),
        settings=(
            *(
                "data.max_bucket_tokens=16384",
                "data.source.limit_documents=0",
                "data.tokenizer.vocab_size=8192",
                "model.num_layers=8",
            ),
            *("model.hidden_size=512", "model.num_heads=8", "model.num_kv_heads=8", "model.ffn_hidden_size=1536"),
            *("parallel.tokens_per_rank=65536", "train.global_batch_tokens=65536"),
        ),
    ),
    "quick": Case(
        "quick",
        30,
        60,
        1,
        (256, 512, 1024),
        short=256,
        evaluations=2,
        settings=("data.max_bucket_tokens=1024", "train.warmup_steps=10"),
    ),
    "smallest": Case(
        "smallest",
        2,
        4,
        1,
        (128, 512),
        short=128,
        evaluations=1,
        samples=4,
        rounds=1,
        settings=(
            *("data.max_bucket_tokens=512", "data.tokenizer.vocab_size=512", "train.warmup_steps=1"),
            *("model.hidden_size=64", "model.ffn_hidden_size=64", "train.global_batch_tokens=1024"),
            *("parallel.tokens_per_rank=1024",),
        ),
        arms=("concat", "grow-p2, seconds"),
    ),
}


def prepare_all(case: Case, folder: Path, corpus: Path | None) -> None:
    """Prepare the data of every arm, with one tokenizer, and the held-out documents, unless they are there."""
    link_corpus(folder, corpus, case.corpus)
    (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())
    data = {directory_of(arm): arm for arm in reversed(case.arms)}
    # Decomposed data come first: they have the tokenizer of all.
    for _, arm in sorted(data.items(), key=lambda one: one[0] != "decomposed"):
        longring(folder, "prepare", RECIPE.name, *settings_of(case, arm))
    longring(folder, "prepare", RECIPE.name, *short_settings(case))
    prepare_held_out(folder, RECIPE, "decomposed", case.lengths, case.settings)


def short_settings(case: Case) -> list[str]:
    """Return the settings of the short phase."""
    return [*case.settings, *SHORT, f"data.max_bucket_tokens={case.short}"]


def settings_of(case: Case, arm: str) -> list[str]:
    """Return the settings of an arm's data, model and curriculum; decomposed data has trained the tokenizer of all."""
    tokenizer = () if "data.directory=decomposed" in ARMS[arm] else ("data.tokenizer.path=decomposed",)
    return [*case.settings, *ARMS[arm], *tokenizer]


def seconds_by_length(case: Case, folder: Path) -> dict[str, dict[str, float]]:
    """Return the seconds of a step by arm and length, measured once for a directory of results."""
    here = {arm: [*settings_of(case, arm), f"data.directory={folder / directory_of(arm)}"] for arm in case.arms}
    return measured_once(folder, "seconds", lambda: step_seconds(RECIPE, here, rounds=case.rounds))


def sequences_by_arm(case: Case, folder: Path) -> Row:
    """Return the sequences of each directory of data, by length."""
    directories = dict.fromkeys(directory_of(arm) for arm in case.arms)
    return measured_once(folder, "data", lambda: {name: sequences_of(folder / name) for name in directories})


def directory_of(arm: str) -> str:
    """Return the directory of an arm's data."""
    return ARMS[arm][0].partition("=")[2]


def steps_of(case: Case, folder: Path, arm: str) -> int:
    """Return the number of steps of an arm: that of all, or as many as take the seconds of the baseline."""
    if arm != SAME_SECONDS:
        return case.steps
    seconds = seconds_by_length(case, folder)
    buckets = open_prepared(folder / directory_of(arm)).buckets("train")
    tokens = {str(bucket.length): bucket.length * bucket.sequences for bucket in buckets}
    # A curriculum trains on each length as many tokens as its data has of it.
    mean_seconds = sum(tokens[length] * seconds[arm][length] for length in tokens) / sum(tokens.values())
    [baseline] = seconds[BASELINE].values()
    return round(case.steps * baseline / mean_seconds)


def measure(case: Case, folder: Path, cell: Cell) -> Row:
    """Train a cell, or what is left of it, and return the losses and scores of its checkpoints.

    The first is that of the short phase, before any token of the arm.
    """
    start, seed = f"runs/short-{cell.seed}", f"train.seed={cell.seed}"
    short = train_shared(folder, RECIPE, start, *short_settings(case), seed, f"train.steps={case.short_steps}")
    steps = steps_of(case, folder, cell.arm)
    every = -(-steps // case.evaluations)
    run = train(
        folder,
        RECIPE,
        f"runs/{cell.name}",
        *settings_of(case, cell.arm),
        *(f"init.from={start}", seed, f"train.steps={steps}"),
        *(f"train.checkpoint_every_steps={every}", f"train.keep_checkpoint_every_steps={every}"),
    )
    seconds, of_step = 0.0, seconds_by_length(case, folder)[cell.arm]
    seconds_at = {0: 0.0}
    for step, bucket in steps_by_bucket(run):
        seconds += of_step[str(bucket)]
        seconds_at[step] = seconds
    *before, last = [checkpoints_of(short)[-1], *checkpoints_of(run)]
    settings = (*EVALUATION, f"evaluate.max_tokens_per_bucket={LONGEST_DOCUMENTS * max(case.lengths)}")
    few, all_of_them = (f"evaluate.samples={samples}" for samples in (case.samples // 4, case.samples))
    beginning, *found = evaluate(folder, before, ["copy_text"], *settings, few)
    found += evaluate(folder, [last], ["copy", "needle_single"], *settings, all_of_them)
    keep_last_checkpoint(run)
    batch = load_recipe(RECIPE, case.settings).train.global_batch_tokens
    rows = [(0, beginning), *((one["step"], one) for one in found)]
    return {
        "steps": steps,
        "checkpoints": [{"tokens": batch * step, "seconds": seconds_at[step], **shown(one)} for step, one in rows],
    }


def reached(rows: Sequence[Row], loss: float, by: str) -> float | None:
    """Return the tokens or seconds at which the losses of a run's checkpoints come down to `loss`, None if they do not.

    Between two checkpoints the loss is taken for a straight line.
    """
    for before, after in pairwise(rows):
        if before["loss"] >= loss >= after["loss"]:
            share = (before["loss"] - loss) / max(before["loss"] - after["loss"], 1e-12)
            return before[by] + share * (after[by] - before[by])
    return None


def summary(rows: Sequence[Row], arms: Sequence[str]) -> list[Row]:
    """Return a row for each arm that has results, over its seeds: losses beside the baseline's of the same seeds."""
    of = {(row["arm"], row["seed"]): row["checkpoints"] for row in rows}
    found = []
    for arm in arms:
        seeds = [seed for name, seed in of if name == arm]
        if not seeds:
            continue
        last = [of[arm, seed][-1] for seed in seeds]
        paired = [seed for seed in seeds if (BASELINE, seed) in of]
        target = {seed: of[BASELINE, seed][-1] for seed in paired}
        longest = last[0]["buckets"][-1]["length"]
        shortest = min(task["length"] for task in last[0]["tasks"])
        shares = {
            by: [
                at / target[seed][by]
                for seed in paired
                if (at := reached(of[arm, seed], target[seed]["loss"], by)) is not None
            ]
            for by in ("tokens", "seconds")
        }
        found.append(
            {
                "arm": arm,
                "seeds": len(seeds),
                "tokens": last[0]["tokens"],
                "seconds": mean(one["seconds"] for one in last),
                "loss": spread([one["loss"] for one in last]),
                "less": spread([of[arm, seed][-1]["loss"] - target[seed]["loss"] for seed in paired]),
                "by_length": {
                    str(bucket["length"]): spread([one["buckets"][number]["loss"] for one in last])
                    for number, bucket in enumerate(last[0]["buckets"])
                },
                "reached": len(shares["tokens"]),
                **{f"{by}_to_baseline": spread(values) for by, values in shares.items()},
                "copying": spread([copying(one, longest)[0] for one in last]),
                "copied": spread([copying(one, longest)[1] for one in last]),
                "passed": sum(copies(one, shortest) for one in last),
                "needles": spread([right_tokens(one, "needle", longest) for one in last]),
            }
        )
    return found


def show(rows: Sequence[Row], case: Case) -> None:
    """Print the losses of each arm, and what it takes to reach the baseline's."""
    lines = summary(rows, case.arms)
    title = f"Held-out loss, nats a token; less: than {BASELINE}; shares: to its last loss, by the same seed"
    table = make_table(title, ("arm", "loss", "less", "seconds", "of tokens", "of seconds"), {"arm"})
    lengths = [f"{int(length):,}" for length in lines[0]["by_length"]] if lines else []
    title = f"Loss by length; gate at the shortest; copying, needles at {max(case.lengths):,}"
    scores = make_table(title, ("arm", *lengths, "gate", "copying", "right", "needles"), {"arm"})
    for line in lines:
        table.add_row(
            line["arm"],
            *(spread_text(line[key], "{:z.3f}") for key in ("loss", "less")),
            f"{line['seconds']:,.0f}",
            *(spread_text(line[f"{by}_to_baseline"], "{:.2f}") for by in ("tokens", "seconds")),
        )
        scores.add_row(
            line["arm"],
            *(f"{one[0]:.3f}" for one in line["by_length"].values()),
            f"{line['passed']}/{line['seeds']}",
            *(f"{line['copying'][0]:.2f}", f"{line['copied'][0]:.0%}", f"{line['needles'][0]:.0%}"),
        )
    Console().print(table, scores)


def main() -> int:
    quick, picture = "one seed of 60 steps at 1,024 tokens, ten minutes", "draw losses by position, length and cost"
    options = experiment_parser(__doc__ or "", quick, picture, gpu=True).parse_args()
    case = CASES[options.size]
    cells = grid(case.arms, case.seeds)
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        if options.record:
            restore(folder, options.record, cells, ["seconds", "data"])
        if not options.show:
            folder.mkdir(parents=True, exist_ok=True)
            prepare_all(case, folder, options.corpus)
            seconds_by_length(case, folder)
            run_cells(folder, cells, lambda cell: measure(case, folder, cell))
        rows = list(results(folder, cells))
        data = sequences_by_arm(case, folder) if rows else {}
        seconds = seconds_by_length(case, folder) if rows else {}
    show(rows, case)
    if options.picture and rows:
        draw_lengths(rows, summary(rows, case.arms), BASELINE, options.picture)
    Console().print(f"{len(rows)} of {len(cells)} cells are done")
    write_record(options.json, {"data": data, "seconds": seconds, "summary": summary(rows, case.arms), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
