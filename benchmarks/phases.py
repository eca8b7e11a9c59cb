"""Held-out losses of a small model by position, before and after it is extended from 512 to 4,096 tokens.

    python benchmarks/phases.py --json phases.json    # ten minutes
    python benchmarks/phases.py --quick               # a sixth of the steps

The chain is that of docs/phases.md: prepare, train, prepare, extend, export, by the commands that a user would type and
the recipes small-512 and small-4096, on two ranks. The first row has the weights with which the second phase begins,
with the RoPE that they were trained with, the second the same weights with the RoPE of the second phase. The exported
model is loaded by transformers, if that is installed, and must have the losses of `longring evaluate`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import numpy as np
import torch
import torch.nn.functional as F
from lib import ROOT
from lib.script import Row, make_parser, make_table, write_record
from longring.data.format.manifest import open_prepared
from longring.launch.config import load_recipe
from rich.console import Console

RECIPES = ROOT / "launch" / "recipes"
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "full": ([], []),
    "quick": (
        ["train.steps=40", "train.decay_steps=8", "train.checkpoint_every_steps=32"],
        ["init.from=runs/small-512/checkpoints/step-00000032", "train.steps=16"],
    ),
    "smallest": (
        [
            *("train.steps=3", "train.warmup_steps=1", "train.decay_steps=1", "data.source.limit_documents=60"),
            *("train.checkpoint_every_steps=2", "data.tokenizer.vocab_size=512"),
        ],
        [
            *("init.from=runs/small-512/checkpoints/step-00000002", "train.steps=2"),
            *("data.source.limit_documents=60", "evaluate.max_tokens_per_bucket=8192"),
        ],
    ),
}
"""Settings that replace those of the first and of the second recipe, by size."""


def longring(folder: Path, *words: str) -> None:
    """Run a command in a directory. Raises CalledProcessError, with its output printed, if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "longring.launch.cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    done.check_returncode()


def losses(folder: Path, *words: str) -> Row:
    """Return the held-out losses that a command prints: of all buckets, and of the longest by position."""
    longring(folder, "evaluate", *words, "--json", "losses.json")
    found = json.loads((folder / "losses.json").read_text())
    longest = max(found["buckets"], key=lambda entry: entry["bucket"])
    return {
        "all": found["loss"],
        "unigram": found["unigram_loss"],
        "tokens": found["tokens"],
        "longest": longest["loss"],
        "longest_tokens": longest["tokens"],
        "by_position": {f"<{part['to']}": part["loss"] for part in longest["by_position"]},
    }


def losses_in_transformers(folder: Path, row: Row) -> Row:
    """Return the losses of the exported model in transformers on the sequences of `row`, by the same positions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    data = open_prepared(folder / "runs" / "small-4096-data")
    bucket = max(data.buckets("held_out"), key=lambda bucket: bucket.length)
    reader, found = data.reader(bucket), []
    evaluated = row["longest_tokens"] // bucket.length
    for sequence in np.arange(evaluated) * bucket.sequences // evaluated:  # those that an evaluation reads
        tokens = torch.from_numpy(reader.read(np.array([sequence]))).long()
        with torch.no_grad():
            found.append(F.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:], reduction="none"))
    by_position = torch.stack(found).double().mean(0)
    edges = [0, *(int(below[1:]) for below in row["by_position"])]
    parts = {f"<{stop}": by_position[first:stop].mean().item() for first, stop in pairwise(edges)}
    return {"longest": by_position.mean().item(), "longest_tokens": row["longest_tokens"], "by_position": parts}


def main() -> int:
    parser = make_parser(__doc__ or "", "a sixth of the steps, three minutes")
    options = parser.parse_args()
    first, second = SETTINGS[options.size]
    short, long = str(RECIPES / "small-512.toml"), str(RECIPES / "small-4096.toml")
    recipe = load_recipe(long, second)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for words in (
            ["prepare", short, *first],
            ["train", short, *first],
            ["prepare", long, *second],
            ["train", long, *second],
            ["export", "runs/small-4096", "exported"],
        ):
            Console(stderr=True).print(f"longring {' '.join(words)}", highlight=False, soft_wrap=True)
            longring(folder, *words)
        limit = f"evaluate.max_tokens_per_bucket={recipe.evaluate.max_tokens_per_bucket}"
        on_data = ["--data", recipe.data.directory, "--ranks", "2", limit]
        rows = [
            {"when": "before", **losses(folder, recipe.init.from_, *on_data)},
            {
                "when": "before, new RoPE",
                **losses(folder, recipe.init.from_, *on_data, f"model.rope_base={recipe.model.rope_base}"),
            },
            {"when": "after", **losses(folder, "runs/small-4096")},
            {"when": "exported", **losses(folder, "exported", *on_data)},
        ]
        if find_spec("transformers"):
            rows.append({"when": "in transformers", **losses_in_transformers(folder, rows[-1])})
    check_equal(rows[2:])
    table = make_table(
        "Held-out loss, nats a token", ["when", "all", "longest", *rows[0]["by_position"]], left={"when"}
    )
    for row in rows:
        found = (row.get("all"), row["longest"], *row["by_position"].values())
        table.add_row(row["when"], *("" if x is None else f"{x:.3f}" for x in found))
    Console().print(table)
    write_record(options.json, {"rows": rows})
    return 0


def check_equal(rows: list[Row]) -> None:
    """Check that the trained model has the same losses as what was exported, wherever it is evaluated."""
    for row in rows[1:]:
        for below, loss in row["by_position"].items():
            assert abs(loss - rows[0]["by_position"][below]) <= 1e-5 * loss, (row["when"], below)


if __name__ == "__main__":
    sys.exit(main())
