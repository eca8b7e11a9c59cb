"""Losses of a small model trained on contexts of related documents, and on random ones.

    python benchmarks/related_training.py --json rows.json  # ten minutes
    python benchmarks/related_training.py --quick  # one seed, 10 steps

launch/recipes/related.toml is trained on random contexts, ordered ones and filled long buckets, for the same tokens and
seeds 0, 1, ... Rows have the loss on held-out contexts (along the path, the same for all) by position; and the loss of
documents whose package appeared earlier in their context, after their own context and after as many tokens of another
one. The difference is the gain that the model has from related documents before.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.one_rank import be_the_only_rank
from lib.packages import FEW_PACKAGES, QUIET, packages_of
from lib.script import Row, make_parser, make_table, write_record
from longring.data.format.document import NO_DOCUMENT
from longring.data.format.manifest import Manifest, open_prepared
from longring.data.order.stages import order
from longring.data.prepare.prepare import prepare
from longring.launch.build import bucket_layouts, build_engine
from longring.launch.checkpoint.load import load_last_good
from longring.launch.config import Recipe, load_recipe
from longring.launch.grids.decide import decide_grids
from longring.launch.preflight import preflight
from longring.launch.train import train
from longring.parallel.mesh import Mesh, join
from rich.console import Console

RECIPE = ROOT / "launch" / "recipes" / "related.toml"
MOST_CONTEXTS = 48
"""Largest number of held-out contexts with a package that appears again."""

ARMS = {
    "random": ["order.by=random"],
    "ordered": [],
    "filled": ["order.mode=fill_long_buckets"],
}
SMALLEST = [
    "data.source.kind=text",
    f"data.source.path={FEW_PACKAGES}",
    "data.held_out_fraction=0.5",
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=64",
    "data.max_bucket_tokens=8192",
    "parallel.tokens_per_rank=8192",
    "train.global_batch_tokens=8192",
    "train.warmup_steps=1",
]


def again(manifest: Manifest) -> list[tuple[int, int, int]]:
    """Return held-out contexts with a document whose package appeared earlier: (sequence, its first token, its end)."""
    packages = packages_of(manifest)
    [bucket] = manifest.buckets("held_out")
    found = []
    for number, pieces in enumerate(manifest.reader(bucket).pieces(range(bucket.sequences))):
        real = pieces[pieces[:, 1] != NO_DOCUMENT]
        names = [packages[record] for record in real[:, 1].tolist()]
        ends = [*pieces[1:, 3].tolist(), bucket.length]
        for index, name in enumerate(names):
            if index and name != "." and name in names[:index]:
                found.append((number, int(real[index, 3]), ends[index]))
                break
    if not found:
        raise ValueError("held-out data: no context has two documents of one package; prepare more documents")
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), MOST_CONTEXTS)).astype(int))
    return [found[one] for one in chosen.tolist()]


def losses_of(recipe: Recipe, mesh: Mesh, held_out: Manifest) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from rows [b, length + 1] to the trained model's losses [b, length]."""
    planned = preflight(recipe, 1)
    engine = build_engine(recipe, planned.manifest.vocab_size, mesh)
    loaded = load_last_good(engine, planned.run.checkpoints, mesh, planned.check_checkpoint)
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


def measure(recipe: Recipe, mesh: Mesh, held_out: Manifest) -> Row:
    """Return the losses of a trained model on the held-out contexts."""
    losses = losses_of(recipe, mesh, held_out)
    [bucket] = held_out.buckets("held_out")
    reader, chosen = held_out.reader(bucket), again(held_out)
    rows = reader.read([number for number, _, _ in chosen])
    foreign = rows.copy()
    for one, (_, start, _) in enumerate(chosen):
        # The document follows the first tokens of another of these contexts, half the list away.
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


def experiment(folder: Path, seeds: int, steps: int, settings_here: list[str]) -> list[Row]:
    """Train every arm with every seed and return its losses."""
    be_the_only_rank()
    base = [f"data.directory={folder}/data", f"train.steps={steps}", *settings_here]
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


def show(rows: list[Row]) -> None:
    """Print the losses of each arm, over all tokens and by position."""
    tokens, seeds = rows[0]["tokens"], len({row["seed"] for row in rows})
    keys = {"all": "loss", "package seen": "package_seen", "other before": "other_before", "gain": "gain"}
    ranges = list(rows[0]["by_position"])
    title = f"Held-out loss after {tokens:,} tokens, mean and standard deviation of {seeds} seeds"
    table = make_table(title, ("trained on", *keys), left=("trained on",))
    positions = make_table("By position in the context", ("trained on", *ranges), left=("trained on",))
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]

        def cell(values: list[float]) -> str:
            return f"{np.mean(values):.3f}±{np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"

        table.add_row(arm, *(cell([row[key] for row in mine]) for key in keys.values()))
        positions.add_row(arm, *(f"{np.mean([row['by_position'][part] for row in mine]):.3f}" for part in ranges))
    console = Console()
    console.print(table, positions)
    console.print(
        f"package seen: {rows[0]['seen_tokens']:,} tokens of documents whose package appeared earlier, in "
        f"{rows[0]['seen_contexts']} contexts;\nother before: the same with other documents before; gain: difference"
    )


def main() -> int:
    parser = make_parser(__doc__ or "", quick="one seed, 10 steps: about a minute")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default: 100)")
    options = parser.parse_args()
    seeds, steps, settings = {
        "full": (options.seeds, options.steps, []),
        "quick": (1, 10, []),
        "smallest": (1, 2, SMALLEST),
    }[options.size]
    with tempfile.TemporaryDirectory() as temporary:
        rows = experiment(Path(temporary), seeds, steps, settings)
    show(rows)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
