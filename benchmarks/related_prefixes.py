"""What documents of one package before a document are worth to a small model, by the order in which it was trained.

    python benchmarks/related_prefixes.py --directory runs/related    # 4 hours
    python benchmarks/related_prefixes.py --gpu --directory runs/related-gpu

The corpus is that of benchmarks/corpus.py. A model is trained on parts of its documents alone, of at most 1,024 tokens,
until it copies. Then it goes on with short files, of which a context holds several: along the path of In-Context
Pretraining, in random order, and as buckets filled along the path.
A row is a model's loss of held-out documents behind K documents of their package, and behind K of another package, of
the same lengths; the difference is within one model, so its initial weights do not blur it. The cells, an order with a
seed, are stored one by one: the same command goes on after a kill, several may share the cells, and --show prints what
is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import numpy as np
from lib import ROOT
from lib.cells import Cell, grid, measured_once, restore, results, run_cells
from lib.commands import longring
from lib.learning import (
    HELD_OUT,
    LONGEST_DOCUMENTS,
    checkpoints_of,
    copies,
    copying,
    evaluate,
    experiment_parser,
    keep_last_checkpoint,
    link_corpus,
    prepare_held_out,
    shown,
    spread,
    spread_text,
    tokenizer_of,
    train,
    train_shared,
)
from lib.learning_pictures import draw_related
from lib.prefixes import BEGINNING, prefixes, rows_of, standard_error, texts
from lib.script import Row, make_table, write_record
from longring.data.format.manifest import open_prepared
from rich.console import Console

RECIPE = ROOT / "benchmarks" / "related_prefixes.toml"
ARMS: Mapping[str, Sequence[str]] = {
    "path": ("order.directory=path",),
    "random": ("order.directory=random", "order.by=random"),
    "filled": ("order.directory=filled", "order.mode=fill_long_buckets"),
}
"""Settings of each order."""
BASELINE = "random"
SHORT = (
    *("data.directory=short", "data.cut=random", "data.rest=drop", "order.mode=off", "order.directory="),
    *("data.source.min_tokens=0", "data.source.max_tokens=0", "data.source.limit_documents=6000"),
)
"""Settings of the short phase: sequences of one document each, of files of any length."""


class Case(NamedTuple):
    """One size of the experiment."""

    corpus: str
    """Size of the corpus."""
    short: int
    """Length of the longest sequences of the short phase, tokens."""
    short_steps: int
    """Steps of the short phase, with which all orders of a seed begin."""
    steps: int
    """Steps on contexts of several documents."""
    seeds: int
    context: int
    """Length of a context, tokens."""
    before: Sequence[int]
    """Numbers of documents before a document."""
    most_tokens: int
    """Largest number of tokens of a document that is scored or stands before one."""
    targets: int
    """Limit on the documents that are scored."""
    samples: int = 40
    settings: Sequence[str] = ()
    """Settings that replace those of the recipe."""
    arms: Sequence[str] = tuple(ARMS)


CASES: Mapping[str, Case] = {
    "full": Case("full", 1024, 1500, 1000, 3, 4096, (1, 2, 3, 5), 672, 96),
    "gpu": Case(
        "full",
        2048,
        600,
        400,
        3,
        16_384,
        (1, 2, 4, 8, 12),
        1024,
        256,
        settings=(
            *("data.max_bucket_tokens=16384", "model.num_layers=8", "model.hidden_size=512", "model.num_heads=8"),
            *("model.num_kv_heads=8", "model.ffn_hidden_size=1536", "parallel.tokens_per_rank=65536"),
            *("train.global_batch_tokens=65536", "data.tokenizer.vocab_size=8192", "data.source.max_tokens=4096"),
        ),
    ),
    "quick": Case("quick", 512, 30, 30, 1, 4096, (1, 5), 672, 8, 4, ("train.warmup_steps=10",)),
    "smallest": Case(
        "smallest",
        256,
        2,
        2,
        1,
        4096,
        (1, 2),
        1024,
        2,
        2,
        (
            *("data.tokenizer.vocab_size=512", "model.hidden_size=64"),
            *("model.ffn_hidden_size=64", "parallel.tokens_per_rank=4096", "train.global_batch_tokens=4096"),
            "train.warmup_steps=1",
        ),
        ("path",),
    ),
}


def short_settings(case: Case) -> list[str]:
    """Return the settings of the short phase."""
    return [*case.settings, *SHORT, f"data.max_bucket_tokens={case.short}"]


def settings_of(case: Case, arm: str) -> list[str]:
    """Return the settings of an order; the data of the short phase has trained the tokenizer of all."""
    return [*case.settings, *ARMS[arm], "data.tokenizer.path=short"]


def scored(case: Case, folder: Path, checkpoint: Path) -> Row:
    """Return mean losses of a checkpoint behind related documents and behind others, by their number."""
    manifest = open_prepared(folder / HELD_OUT)
    all_texts = texts(folder / "corpus" / "held_out.jsonl", tokenizer_of(folder, "data"), case.most_tokens)
    targets, found = prefixes(all_texts, case.before, case.targets)
    run = checkpoint.parents[1]
    tokens, starts, parts = rows_of(targets, found, manifest.boundary_id, case.context)
    np.savez(run / "rows.npz", tokens=tokens, starts=starts, parts=parts)
    command = [sys.executable, "-m", "lib.score_rows", str(checkpoint), str(folder / HELD_OUT)]
    files = [str(run / "rows.npz"), str(run / "sums.npy"), "train.dtype=bfloat16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    subprocess.run([*command, *files], check=True, cwd=Path(__file__).parent, env=environment)
    sums = np.load(run / "sums.npy")  # [rows, (beginning, later), (loss, targets)]
    packages = np.array([target.package for target in targets])
    losses: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for one, ((begin, begin_count), (later, later_count)) in zip(found, sums.tolist(), strict=True):
        whole = (begin + later) / (begin_count + later_count)
        losses[one.kind, len(one.before)].append((whole, later / later_count))
    rows = []
    for count in case.before:
        related, others = (np.array(losses[kind, count]) for kind in ("related", "other"))  # [targets, (whole, later)]
        gains = others - related
        rows.append(
            {
                "documents": count,
                "related": float(related[:, 0].mean()),
                "other": float(others[:, 0].mean()),
                "gain": float(gains[:, 0].mean()),
                "later_gain": float(gains[:, 1].mean()),
                "standard_error": standard_error(gains[:, 0], packages),
            }
        )
    return {
        "targets": len(targets),
        "packages": len(set(packages)),
        "alone": float(np.mean(losses["none", 0], axis=0)[0]),
        "behind": rows,
    }


def measure(case: Case, folder: Path, cell: Cell) -> Row:
    """Train a cell, or what is left of it, and return the losses and gains of its last checkpoint."""
    start, seed = f"runs/short-{cell.seed}", f"train.seed={cell.seed}"
    train_shared(folder, RECIPE, start, *short_settings(case), seed, f"train.steps={case.short_steps}")
    run = train(
        folder,
        RECIPE,
        f"runs/{cell.name}",
        *settings_of(case, cell.arm),
        *(f"init.from={start}", seed, f"train.steps={case.steps}"),
    )
    last = checkpoints_of(run)[-1]
    settings = (
        *("train.dtype=bfloat16", f"evaluate.samples={case.samples}"),
        f"evaluate.max_tokens_per_bucket={LONGEST_DOCUMENTS * case.context}",
    )
    [found] = evaluate(folder, [last], ["copy"], *settings)
    keep_last_checkpoint(run)
    return {**scored(case, folder, last), **shown(found)}


def documents_per_context(folder: Path, arms: Sequence[str]) -> Row:
    """Return for each order the mean number of documents that a context has a part of."""

    def of(arm: str) -> float:
        return json.loads((folder / arm / "order.json").read_text())["contexts"]["documents"]

    return measured_once(folder, "documents_per_context", lambda: {arm: of(arm) for arm in arms})


def summary(rows: Sequence[Row], case: Case) -> list[Row]:
    """Return a row for each order that has results, over its seeds: gains and losses by documents before, and copying.

    "later_gain" is that behind the beginning of the documents, "over_random" the gain less that of random order with
    the same seed. Spreads are over the seeds; "standard_error" is that over the packages, mean over the seeds.
    """
    gains = {(row["arm"], row["seed"]): [one["gain"] for one in row["behind"]] for row in rows}
    found = []
    for arm in case.arms:
        if not (mine := [row for row in rows if row["arm"] == arm]):
            continue
        shortest, *_, longest = sorted({task["length"] for task in mine[0]["tasks"]})
        paired = [row["seed"] for row in mine if (BASELINE, row["seed"]) in gains]
        found.append(
            {
                "arm": arm,
                "seeds": len(mine),
                "alone": spread([row["alone"] for row in mine]),
                "behind": [
                    {
                        "documents": count,
                        **{
                            key: spread([row["behind"][k][key] for row in mine])
                            for key in ("gain", "later_gain", "related", "other")
                        },
                        "over_random": spread([gains[arm, seed][k] - gains[BASELINE, seed][k] for seed in paired]),
                        "standard_error": mean(row["behind"][k]["standard_error"] for row in mine),
                    }
                    for k, count in enumerate(case.before)
                ],
                "loss": spread([row["loss"] for row in mine]),
                "copying": spread([copying(row, longest)[0] for row in mine]),
                "copied": spread([copying(row, longest)[1] for row in mine]),
                "passed": sum(copies(row, shortest) for row in mine),
            }
        )
    return found


def show(rows: Sequence[Row], case: Case) -> None:
    """Print the gain from related documents by their number, and the losses, of each order over its seeds."""
    gains = make_table(
        "Gain of related documents over others, nats, by their number",
        ("order", *map(str, case.before)),
        {"order"},
    )
    losses = make_table(
        f"Loss alone and behind {max(case.before)}; of all; gate; copying",
        ("order", "alone", "related", "others", "all", "gate", "copying", "right"),
        {"order"},
    )
    for line in summary(rows, case):
        kinds = {line["arm"]: "gain", f"beyond {BEGINNING}": "later_gain", f"over {BASELINE}": "over_random"}
        for name, key in kinds.items():
            if key != "over_random" or line["arm"] != BASELINE:
                gains.add_row(name, *(spread_text(one[key], "{:z.3f}") for one in line["behind"]))
        last = line["behind"][-1]
        losses.add_row(
            line["arm"],
            *(f"{found[0]:.3f}" for found in (line["alone"], last["related"], last["other"], line["loss"])),
            f"{line['passed']}/{line['seeds']}",
            *(f"{line['copying'][0]:.2f}", f"{line['copied'][0]:.0%}"),
        )
    Console().print(gains, losses)


def main() -> int:
    quick, picture = "one seed of 30 steps, ten minutes", "draw gains and losses by documents before"
    options = experiment_parser(__doc__ or "", quick, picture, gpu=True).parse_args()
    case = CASES[options.size]
    cells = grid(case.arms, case.seeds)
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        if options.record:
            restore(folder, options.record, cells, ["documents_per_context"])
        if not options.show:
            folder.mkdir(parents=True, exist_ok=True)
            link_corpus(folder, options.corpus, case.corpus)
            (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())
            longring(folder, "prepare", RECIPE.name, *short_settings(case))
            longring(folder, "prepare", RECIPE.name, *settings_of(case, case.arms[0]))
            for arm in case.arms:
                longring(folder, "order", RECIPE.name, *settings_of(case, arm), "--workers", "1")
            lengths = (case.context // 8, case.context // 4, case.context)
            prepare_held_out(folder, RECIPE, "short", lengths, case.settings)
            run_cells(folder, cells, lambda cell: measure(case, folder, cell))
        rows = list(results(folder, cells))
        in_contexts = documents_per_context(folder, case.arms) if rows else {}
    show(rows, case)
    if options.picture and rows:
        draw_related(rows, case.arms, options.picture)
    Console().print(f"{len(rows)} of {len(cells)} cells are done")
    write_record(options.json, {"documents_per_context": in_contexts, "summary": summary(rows, case), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
