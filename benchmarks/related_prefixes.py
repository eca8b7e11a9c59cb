"""What documents of one package before a document are worth to a small model, by the order in which it was trained.

    python benchmarks/related_prefixes.py --directory runs/related    # 6 h
    python benchmarks/related_prefixes.py --gpu --directory runs/related-gpu

The corpus is that of benchmarks/corpus.py, its short files alone, so that a context holds several. The same documents
are trained in contexts along the path of In-Context Pretraining, in random ones, and as buckets filled along the path.
A row is a model's loss of held-out documents behind K documents of their package, and behind K of others of the same
lengths; the difference is within one model, so its initial weights do not blur it. The cells, an order with a seed, are
stored one by one: the same command goes on after a kill, several may share the cells, and --show prints what is there.
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
from lib.cells import Cell, grid, results, run_cells
from lib.commands import longring
from lib.corpus import hashed
from lib.learning import (
    HELD_OUT,
    checkpoints_of,
    copies,
    copying,
    evaluate,
    keep_last_checkpoint,
    link_corpus,
    prepare_held_out,
    shown,
    spread,
    spread_text,
    tokenizer_of,
    train,
)
from lib.learning_pictures import draw_related
from lib.script import Row, make_parser, make_table, write_record
from longring.data.format.manifest import open_prepared
from numpy.typing import NDArray
from rich.console import Console

RECIPE = ROOT / "benchmarks" / "related_prefixes.toml"
ARMS: Mapping[str, Sequence[str]] = {
    "path": ("order.directory=path",),
    "random": ("order.directory=random", "order.by=random"),
    "filled": ("order.directory=filled", "order.mode=fill_long_buckets"),
}
"""Settings of each order."""


class Case(NamedTuple):
    """One size of the experiment."""

    corpus: str
    """Size of the corpus."""
    steps: int
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
    "full": Case("full", 2000, 3, 8192, (1, 2, 4, 6), 1024, 96),
    "gpu": Case(
        "full",
        600,
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
    "quick": Case("quick", 30, 1, 8192, (1, 4), 1024, 8, 4, ("train.warmup_steps=10",)),
    "smallest": Case(
        "smallest",
        2,
        1,
        4096,
        (1, 2),
        1024,
        2,
        2,
        (
            *("data.max_bucket_tokens=4096", "data.tokenizer.vocab_size=512", "model.hidden_size=64"),
            *("model.ffn_hidden_size=64", "parallel.tokens_per_rank=4096", "train.global_batch_tokens=4096"),
            "train.warmup_steps=1",
        ),
        ("path",),
    ),
}


class Text(NamedTuple):
    """A held-out document."""

    package: str
    folder: str
    """Directory of the file, within its package."""
    path: str
    tokens: list[int]


class Prefixed(NamedTuple):
    """A document behind others."""

    target: int
    """Number of the document among those that are scored."""
    kind: str
    """Relation of the documents before it: "none", "related" or "other"."""
    before: list[Text]


def texts(case: Case, folder: Path) -> list[Text]:
    """Return the held-out documents that are short enough, in an order that does not follow their names."""
    tokenizer, found = tokenizer_of(folder, "data"), []
    with (folder / "corpus" / "held_out.jsonl").open() as lines:
        for line in lines:
            entry = json.loads(line)
            ids = tokenizer.encode(entry["text"], add_special_tokens=False).ids
            if 64 <= len(ids) <= case.most_tokens:
                path = Path(entry["path"])
                found.append(Text(entry["package"], str(path.parent), entry["path"], ids))
    return sorted(found, key=lambda text: hashed(text.path))


def prefixes(case: Case, all_texts: Sequence[Text]) -> tuple[list[Text], list[Prefixed]]:
    """Return the documents that are scored, and each behind none, behind related ones and behind others.

    Related documents are of the same package, of the same directory first. Each of the others has the length of one of
    them as nearly as any document of another package, and stands in its position.
    """
    most = max(case.before)
    of_package: dict[str, list[Text]] = defaultdict(list)
    for text in all_texts:
        of_package[text.package].append(text)
    # Packages in turns, so that no large one has most of the targets.
    turns = sorted(
        (number, hashed(package), text)
        for package, mine in of_package.items()
        if len(mine) > most
        for number, text in enumerate(mine)
    )
    targets, found = [text for _, _, text in turns[: case.targets]], []
    for number, target in enumerate(targets):
        mine = [text for text in of_package[target.package] if text is not target]
        related = sorted(mine, key=lambda text: text.folder != target.folder)[:most]
        foreign = [text for text in all_texts if text.package != target.package]
        others = []
        for one in related:
            nearest = min(foreign, key=lambda text: abs(len(text.tokens) - len(one.tokens)))
            foreign.remove(nearest)
            others.append(nearest)
        found.append(Prefixed(number, "none", []))
        # The nearest of the related documents stands last, next to the target.
        found += [Prefixed(number, "related", related[:count][::-1]) for count in case.before]
        found += [Prefixed(number, "other", others[:count][::-1]) for count in case.before]
    return targets, found


def rows_of(
    case: Case, targets: Sequence[Text], found: Sequence[Prefixed], boundary: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens, starts and counted targets as in `lib.score_rows`: a row ends with its document.

    What stands before the prefix is not seen.
    """
    tokens = np.full((len(found), case.context + 1), boundary)  # [rows, length + 1]
    starts, counted = np.zeros(len(found), np.int64), np.zeros(len(found), np.int64)
    for number, one in enumerate(found):
        target = targets[one.target].tokens
        stream = [boundary]
        for text in one.before:
            stream += [*text.tokens, boundary]
        stream += [*target, boundary]
        tokens[number, -len(stream) :] = stream
        starts[number] = case.context + 1 - len(stream)
        # The targets of a document are its tokens and the boundary behind it.
        counted[number] = case.context - len(target) - 1
    return tokens, starts, counted


def scored(case: Case, folder: Path, checkpoint: Path) -> Row:
    """Return mean losses of a checkpoint behind related documents and behind others, by their number."""
    manifest = open_prepared(folder / HELD_OUT)
    targets, found = prefixes(case, texts(case, folder))
    run = checkpoint.parents[1]
    tokens, starts, counted = rows_of(case, targets, found, manifest.boundary_id)
    np.savez(run / "rows.npz", tokens=tokens, starts=starts, counted=counted)
    command = [sys.executable, "-m", "lib.score_rows", str(checkpoint), str(folder / HELD_OUT)]
    files = [str(run / "rows.npz"), str(run / "sums.npy"), "train.dtype=bfloat16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    subprocess.run([*command, *files], check=True, cwd=Path(__file__).parent, env=environment)
    sums = np.load(run / "sums.npy")  # [rows, (loss, targets)]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for one, (loss, count) in zip(found, sums.tolist(), strict=True):
        by_kind[f"{one.kind} {len(one.before)}"].append(loss / count)
    rows = []
    for count in case.before:
        related, others = (np.array(by_kind[f"{kind} {count}"]) for kind in ("related", "other"))
        gains = others - related  # [targets]
        rows.append(
            {
                "documents": count,
                "related": float(related.mean()),
                "other": float(others.mean()),
                "gain": float(gains.mean()),
                "standard_error": float(gains.std(ddof=1) / len(gains) ** 0.5),
            }
        )
    packages = {target.package for target in targets}
    return {
        "targets": len(targets),
        "packages": len(packages),
        "alone": float(np.mean(by_kind["none 0"])),
        "behind": rows,
    }


def measure(case: Case, folder: Path, cell: Cell) -> Row:
    """Train a cell, or what is left of it, and return the losses and gains of its last checkpoint."""
    run = train(
        folder,
        RECIPE,
        f"runs/{cell.name}",
        *case.settings,
        *ARMS[cell.arm],
        *(f"train.seed={cell.seed}", f"train.steps={case.steps}"),
    )
    last = checkpoints_of(run)[-1]
    settings = ("train.dtype=bfloat16", "evaluate.max_tokens_per_bucket=131072", f"evaluate.samples={case.samples}")
    [found] = evaluate(folder, [last], ["copy"], *settings)
    keep_last_checkpoint(run)
    return {**scored(case, folder, last), **shown(found)}


def documents_per_context(folder: Path, arm: str) -> float:
    """Return the mean number of documents that a context of an order has a part of."""
    report = json.loads((folder / arm / "order.json").read_text())
    return report["contexts"]["documents"]


def summary(rows: Sequence[Row], case: Case) -> list[Row]:
    """Return a row for each order that has results, over its seeds: gains and losses by documents before, and copying.

    Spreads are over the seeds; the mean standard error over the documents of one seed is beside that of a gain.
    """
    found = []
    for arm in case.arms:
        if not (mine := [row for row in rows if row["arm"] == arm]):
            continue
        shortest, *_, longest = sorted({task["length"] for task in mine[0]["tasks"]})
        found.append(
            {
                "arm": arm,
                "seeds": len(mine),
                "alone": spread([row["alone"] for row in mine]),
                "behind": [
                    {
                        "documents": count,
                        **{
                            key: spread([row["behind"][k][key] for row in mine]) for key in ("gain", "related", "other")
                        },
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
        gains.add_row(line["arm"], *(spread_text(one["gain"], "{:z.3f}") for one in line["behind"]))
        last = line["behind"][-1]
        losses.add_row(
            line["arm"],
            *(f"{found[0]:.3f}" for found in (line["alone"], last["related"], last["other"], line["loss"])),
            f"{line['passed']}/{line['seeds']}",
            *(f"{line['copying'][0]:.2f}", f"{line['copied'][0]:.0%}"),
        )
    Console().print(gains, losses)


def main() -> int:
    parser = make_parser(__doc__ or "", "one seed of 30 steps, ten minutes")
    parser.add_argument("--gpu", action="store_true", help="8 layers of 512, contexts of 16,384, for one GPU")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep data, runs and results; resume from there")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="corpus that benchmarks/corpus.py has made")
    parser.add_argument("--show", action="store_true", help="print the results that are stored, and train nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw gains and losses by documents before")
    options = parser.parse_args()
    case = CASES["gpu" if options.gpu else options.size]
    cells = grid(case.arms, case.seeds)
    with tempfile.TemporaryDirectory() as made:
        folder = (options.directory or Path(made)).absolute()
        if not options.show:
            folder.mkdir(parents=True, exist_ok=True)
            link_corpus(folder, options.corpus, case.corpus)
            (folder / RECIPE.name).write_bytes(RECIPE.read_bytes())
            longring(folder, "prepare", RECIPE.name, *case.settings)
            for arm in case.arms:
                longring(folder, "order", RECIPE.name, *case.settings, *ARMS[arm], "--workers", "1")
            lengths = (case.context // 16, case.context // 4, case.context)
            prepare_held_out(folder, RECIPE, "data", lengths, case.settings)
            run_cells(folder, cells, lambda cell: measure(case, folder, cell))
        rows = list(results(folder, cells))
        held = {arm: documents_per_context(folder, arm) for arm in case.arms}
    show(rows, case)
    if options.picture and rows:
        draw_related(rows, case.arms, options.picture)
    Console().print(f"{len(rows)} of {len(cells)} cells are done")
    write_record(options.json, {"documents_per_context": held, "summary": summary(rows, case), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
