"""Held-out losses of a small model by position, before and after it is extended from 512 to 4,096 tokens.

    python benchmarks/phases.py --json phases.json    # ten minutes
    python benchmarks/phases.py --quick               # a sixth of the steps

The chain is that of docs/phases.md: prepare, train, prepare, extend, export, by the commands that a user would type and
the recipes small-512 and small-4096, on two ranks. The row "before" has the weights with which the second phase begins,
and its RoPE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.script import Row, make_parser, make_table, write_record
from rich.console import Console

RECIPES = ROOT / "launch" / "recipes"
STILL = ["train.steps=1", "train.learning_rate=1e-30", "train.initial_learning_rate=0"]
"""Settings of a run whose one step changes nothing."""
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


def losses(folder: Path, run: str) -> Row:
    """Return the held-out losses of a run: of all buckets, and of the longest by position."""
    longring(folder, "evaluate", run)
    found = json.loads((folder / run / "evaluation.json").read_text())
    longest = max(found["buckets"], key=lambda entry: entry["bucket"])
    return {
        "all": found["loss"],
        "unigram": found["unigram_loss"],
        "tokens": found["tokens"],
        "longest": longest["loss"],
        "longest_tokens": longest["tokens"],
        "by_position": {f"<{part['to']}": part["loss"] for part in longest["by_position"]},
    }


def main() -> int:
    parser = make_parser(__doc__ or "", "a sixth of the steps, three minutes")
    options = parser.parse_args()
    first, second = SETTINGS[options.size]
    short, long = str(RECIPES / "small-512.toml"), str(RECIPES / "small-4096.toml")
    before_run = [*second, "run_directory=runs/before", *STILL]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for words in (
            ["prepare", short, *first],
            ["train", short, *first],
            ["prepare", long, *second],
            ["train", long, *before_run],
            ["train", long, *second],
            ["export", "runs/small-4096", "exported"],
        ):
            Console(stderr=True).print(f"longring {' '.join(words)}", highlight=False, soft_wrap=True)
            longring(folder, *words)
        assert (folder / "exported" / "config.json").is_file()
        rows = [
            {"when": when, **losses(folder, f"runs/{run}")}
            for when, run in (("before", "before"), ("after", "small-4096"))
        ]
    table = make_table(
        "Held-out loss, nats a token", ["when", "all", "longest", *rows[0]["by_position"]], left={"when"}
    )
    for row in rows:
        table.add_row(row["when"], *(f"{x:.3f}" for x in (row["all"], row["longest"], *row["by_position"].values())))
    Console().print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
