"""What lies in one context, and what a small model makes of it.

    .venv/bin/python benchmarks/related_documents.py [--quick] [--json FILE] [--corpus FILE] [--only PART]
        [--encoder NAME --long-documents head]

1. Python's standard library, whose packages are a truth that the method does not know, and a text in WikiText's form
   (`--corpus`, articles that begin with " = Title = "): contexts by the path, by kNN groups and at random, of the same
   documents. Share of neighbouring documents of one context that are of one package (of those in any); mean cosine of
   two documents of a context, and of two of neighbouring contexts. `--encoder`: vectors by that model.
2. launch/recipes/related.toml on random contexts, ordered ones, and filled long buckets, for the same tokens, seeds
   0, 1, ...: loss on held-out contexts (along the path, the same for all) by position; and for documents whose package
   appeared earlier in their context: with what stands before them, and with the same number of tokens of another
   context in its place. The difference is what the model gets from related documents before.
"""

import argparse
import json
import os
import re
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from longring.data.config import DataConfig, SourceConfig, TokenizerConfig
from longring.data.format.document import NO_DOCUMENT
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.order.stages import order
from longring.data.order_config import OrderConfig
from longring.data.prepare.prepare import prepare
from longring.launch.build import bucket_layouts, build_engine
from longring.launch.checkpoint.load import load_last_good
from longring.launch.config import Recipe, load_recipe
from longring.launch.grids.decide import decide_grids
from longring.launch.preflight import preflight
from longring.launch.train import train
from longring.parallel.mesh import Mesh, join
from rich import box
from rich.console import Console
from rich.table import Table

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "related.toml"
QUIET = Console(quiet=True)
MOST_CONTEXTS = 48
"""Held-out contexts with a package that appears again, at most."""

ARMS = {
    "random": ["order.by=random"],
    "ordered": [],
    "filled": ["order.mode=fill_long_buckets"],
}


def package(title: str) -> str:
    """The package of a module of the standard library, by its file; none for a module of its own."""
    root = sysconfig.get_paths()["stdlib"]
    return str(Path(title.partition(": ")[2]).parent.relative_to(root)) if root in title else "."


def packages_of(manifest: Manifest) -> list[str]:
    """The package of every record."""
    return [
        package(f": {file}") if entry["source"] == "documents" else "."
        for entry in manifest.inputs()
        for file in (entry["files"] if len(entry["files"]) == entry["records"] else [""] * entry["records"])
    ]


def compare_orders(
    folder: Path, source: SourceConfig, max_tokens: int, vectors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the table of orders for one corpus, whose `vectors` are made by these settings."""
    data = DataConfig(
        directory=str(folder / "data"),
        source=source,
        tokenizer=TokenizerConfig(vocab_size=8192),
        max_bucket_tokens=max_tokens,
        shard_tokens=1 << 25,
        held_out_fraction=0.0,
        rest="pack",
    )
    prepare(data, QUIET)
    rows = []
    for by in ("path", "knn", "random"):
        config = OrderConfig(mode="in_context", by=by, directory=str(folder / by), neighbors=20, **vectors)
        manifest = order(data, config, QUIET, workers=1)
        assert manifest is not None
        packages = packages_of(manifest)
        [bucket] = manifest.buckets("train")
        pairs = [
            (packages[one], packages[other])
            for pieces in manifest.reader(bucket).pieces(range(bucket.sequences))
            for one, other in pairwise(pieces[pieces[:, 1] != NO_DOCUMENT, 1].tolist())
        ]
        report = json.loads(Path(config.directory, "order.json").read_text())
        known = [pair for pair in pairs if pair[0] != "."]
        rows.append(
            {
                "by": by,
                "documents": report["path"]["documents"],
                "near_duplicates": sum(
                    books.dropped_documents["near_duplicate"] for books in manifest.ledger.splits.values()
                ),
                "threshold": report["duplicates"]["threshold"],
                "context_documents": report["contexts"]["documents"],
                "one_package": float(np.mean([one == other for one, other in known])) if known else None,
                "inside": report["contexts"]["inside"],
                "across": report["contexts"]["across"],
                "jumps": report["path"]["jumps"],
            }
        )
    return rows


def wiki_articles(file: Path, folder: Path) -> SourceConfig:
    """Write the articles of a text in WikiText's form as JSON lines."""
    text = file.read_text(encoding="utf-8")
    articles = [one for one in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if one.strip()]
    target = folder / "articles.jsonl"
    target.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))
    return SourceConfig(kind="json", path=str(target))


def again(manifest: Manifest) -> list[tuple[int, int, int]]:
    """Held-out contexts with a document whose package appeared earlier: (sequence, its first token, its end)."""
    packages = packages_of(manifest)
    [bucket] = manifest.buckets("held_out")
    found = []
    for number, pieces in enumerate(manifest.reader(bucket).pieces(range(bucket.sequences))):
        real = pieces[pieces[:, 1] != NO_DOCUMENT]
        names = [packages[record] for record in real[:, 1].tolist()]
        ends = [*pieces[1:, 3].tolist(), bucket.length]
        for place_, name in enumerate(names):
            if place_ and name != "." and name in names[:place_]:
                found.append((number, int(real[place_, 3]), ends[place_]))
                break
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), MOST_CONTEXTS)).astype(int))
    return [found[one] for one in chosen.tolist()]


def losses_of(recipe: Recipe, mesh: Mesh, held_out: Manifest) -> Callable[[np.ndarray], np.ndarray]:
    """The trained model's losses [b, length] of rows [b, length + 1]."""
    planned = preflight(recipe, 1)
    engine = build_engine(recipe, planned.manifest.vocab_size, mesh)
    loaded = load_last_good(engine, planned.run.checkpoints, mesh, planned.data_hash)
    assert loaded is not None, "training left a checkpoint"
    engine.eval()
    longest = [held_out.lengths[-1]]
    layout = bucket_layouts(recipe, mesh, longest, decide_grids(recipe, mesh, longest))[held_out.lengths[-1]]

    def losses(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [
                engine(*layout.model_inputs(rows[at : at + 2], None, mesh.device)) for at in range(0, len(rows), 2)
            ]
        return torch.cat(parts).numpy()

    return losses


def measure(recipe: Recipe, mesh: Mesh, held_out: Manifest) -> dict[str, Any]:
    """A trained model on the held-out contexts."""
    losses = losses_of(recipe, mesh, held_out)
    [bucket] = held_out.buckets("held_out")
    reader, chosen = held_out.reader(bucket), again(held_out)
    rows = reader.read([number for number, _, _ in chosen])
    foreign = rows.copy()
    for one, (_, start, _) in enumerate(chosen):
        # Before the document what another of these contexts begins with, half the list away.
        foreign[one, :start] = rows[(one + len(rows) // 2) % len(rows), :start]
    related, other = losses(rows), losses(foreign)
    spans = [(one, slice(start, end)) for one, (_, start, end) in enumerate(chosen)]
    mine, theirs = (np.concatenate([table[one, span] for one, span in spans]) for table in (related, other))
    sample = np.unique(np.linspace(0, bucket.sequences - 1, MOST_CONTEXTS).astype(int))
    everywhere = losses(reader.read(sample))
    edges = [0, 128, 256, 512, 1024, bucket.length]
    return {
        "loss": float(everywhere.mean()),
        "by_position": {f"<{end}": float(everywhere[:, begin:end].mean()) for begin, end in pairwise(edges)},
        "package_seen": float(mine.mean()),
        "other_before": float(theirs.mean()),
        "gain": float((theirs - mine).mean()),
        "seen_tokens": len(mine),
        "seen_contexts": len(chosen),
    }


def experiment(folder: Path, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Train every arm with every seed and measure it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    base = [f"data.directory={folder}/data", f"train.steps={steps}"]
    rows = []
    for arm, overrides in ARMS.items():
        settings = [*base, *overrides, f"order.directory={folder}/{arm}"]
        recipe = load_recipe(RECIPE, settings)
        prepare(recipe.data, QUIET)
        order(recipe.data, recipe.order, QUIET, workers=1)
    held_out = open_prepared(folder / "ordered")
    for seed in range(seeds):
        for arm, overrides in ARMS.items():
            settings = [*base, *overrides, f"order.directory={folder}/{arm}", f"train.seed={seed}"]
            recipe = load_recipe(RECIPE, [*settings, f"run_directory={folder}/run-{arm}-{seed}"])
            started = time.process_time()
            train(recipe, QUIET)
            mesh = join(recipe.parallel, 1)
            row = {"arm": arm, "seed": seed, "tokens": steps * recipe.train.global_batch_tokens}
            rows.append({**row, **measure(recipe, mesh, held_out), "cpu_seconds": time.process_time() - started})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def show_orders(name: str, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    table = Table(
        title=f"{name}: {first['documents']:,} documents, {first['near_duplicates']} near-duplicates left out "
        f"(cosine from {first['threshold']:.2f} on)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("order", "documents a context", "one package", "cosine inside", "across", "jumps"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        share = "" if row["one_package"] is None else f"{row['one_package']:.1%}"
        table.add_row(
            row["by"],
            f"{row['context_documents']:.1f}",
            share,
            f"{row['inside']:.3f}",
            f"{row['across']:.3f}",
            f"{row['jumps']:,}" if row["by"] == "path" else "",
        )
    Console().print(table)


def show_training(rows: list[dict[str, Any]]) -> None:
    tokens, seeds = rows[0]["tokens"], len({row["seed"] for row in rows})
    keys = {"all": "loss", "package seen": "package_seen", "other before": "other_before", "gain": "gain"}
    ranges = list(rows[0]["by_position"])
    title = f"Held-out loss after {tokens:,} tokens, mean and standard deviation of {seeds} seeds"
    table, positions = (
        Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in (title, "By position in the context")
    )
    for made, columns in ((table, keys), (positions, ranges)):
        for column in ("trained on", *columns):
            made.add_column(column, justify="right", no_wrap=True)
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]

        def cell(values: list[float]) -> str:
            return f"{np.mean(values):.3f}±{np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"

        table.add_row(arm, *(cell([row[key] for row in mine]) for key in keys.values()))
        positions.add_row(arm, *(f"{np.mean([row['by_position'][part] for row in mine]):.3f}" for part in ranges))
    Console().print(table, positions)
    print(
        f"package seen: {rows[0]['seen_tokens']:,} tokens of documents whose package appeared earlier, in "
        f"{rows[0]['seen_contexts']} contexts;\nother before: the same with other documents before; gain: difference"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 10 steps; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the tables")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="a text in WikiText's form, beside the library")
    parser.add_argument("--only", choices=("orders", "training"), help="one of the two parts")
    parser.add_argument("--encoder", default="", metavar="NAME", help="as order.encoder, for the comparison of orders")
    parser.add_argument("--long-documents", choices=("windows", "head"), default="windows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    vectors = {"encoder": options.encoder, "long_documents": options.long_documents}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.only != "training":
            (folder / "stdlib").mkdir()
            result["stdlib"] = compare_orders(folder / "stdlib", SourceConfig(), 32_768, vectors)
            show_orders("Python's standard library", result["stdlib"])
            if options.corpus:
                (folder / "corpus").mkdir()
                source = wiki_articles(options.corpus, folder / "corpus")
                result["corpus"] = compare_orders(folder / "corpus", source, 16_384, vectors)
                show_orders(options.corpus.name, result["corpus"])
        if options.only != "orders":
            seeds, steps = (1, 10) if options.quick else (options.seeds, options.steps)
            result["training"] = experiment(folder / "training", seeds, steps)
            show_training(result["training"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
