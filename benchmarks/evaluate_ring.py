"""Held-out loss and tasks of one long sequence on one rank, and spread over a ring of ranks.

    python benchmarks/evaluate_ring.py            # 131,072 tokens over 8 ranks
    python benchmarks/evaluate_ring.py --quick    # 16,384 tokens over 8 ranks

A small model is trained for some steps on short sequences of generated text, by the commands that a user would type,
and `longring evaluate` scores it on a long one: once on one rank, and once on the ring. The tasks are a needle in noise
and a text that stands twice. Losses must be those of one rank to 1e-4 of their value, and so must the shares of
right tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.script import Row, Size, make_parser, make_table, seconds_of, write_record
from longring.data.files import write_text
from longring.data.tasks.draws import Draws
from longring.data.tasks.words import sentence
from rich.console import Console

TOLERANCE = 1e-4
"""Largest relative difference of a loss in fp32, and of a share, as in tests/launch/evaluation/test_scores.py."""
RECIPE = """
run_directory = "run"
[data]
directory = "data"
min_bucket_tokens = 64
max_bucket_tokens = 128
held_out_fraction = 0.5
source = { kind = "json", path = "documents.jsonl" }
tokenizer = { vocab_size = 512 }
[model]
num_layers = 2
hidden_size = 64
num_heads = 2
num_kv_heads = 2
ffn_hidden_size = 128
layer_pattern = ["window", "full_no_rope"]
window_tokens = 2
init_std = 0.2
[parallel]
tokens_per_rank = 2048
[train]
steps = 30
global_batch_tokens = 2048
learning_rate = 3e-3
dtype = "float32"
"""


class Case(NamedTuple):
    """Length of the sequence, and the ranks that share it."""

    tokens: int
    ranks: int


CASES: Mapping[Size, Case] = {"full": Case(131072, 8), "quick": Case(16384, 8), "smallest": Case(1024, 4)}


def longring(folder: Path, *words: str) -> None:
    """Run a command in a directory. Raises CalledProcessError if it fails."""
    Console(stderr=True).print(f"longring {' '.join(words)}", highlight=False, soft_wrap=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longring.launch.cli", *words]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)


def evaluated(folder: Path, case: Case, ranks: int) -> Row:
    """Return what `longring evaluate` finds on some ranks, and its seconds."""
    words = ["evaluate", "run", "--data", "long", "--ranks", str(ranks), "--tasks", "needle_single_1,copy_text"]
    settings = ["evaluate.samples=1", "evaluate.distractors=0", f"evaluate.max_tokens_per_bucket={case.tokens}"]
    seconds = seconds_of(lambda: longring(folder, *words, *settings, "--json", "found.json"))
    return {"ranks": ranks, "seconds": round(seconds, 1), "found": json.loads((folder / "found.json").read_text())}


def numbers(found: Row) -> Iterator[tuple[str, float, float | None]]:
    """Yield the name, the loss and the share of right tokens of every measurement."""
    [bucket] = found["buckets"]
    yield "held out", bucket["loss"], None
    for part in bucket["by_position"]:
        yield f"held out, positions from {part['from']:,}", part["loss"], None
    for task in found["tasks"]:
        yield task["task"], task["loss"], task["tokens"]


def main() -> int:
    parser = make_parser(__doc__ or "", "16,384 tokens over 8 ranks, a minute")
    options = parser.parse_args()
    case = CASES[options.size]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        draws = Draws("documents")
        # A sentence has at least 8 tokens; each document fills a long sequence.
        documents = ("".join(sentence(draws) for _ in range(case.tokens // 8)) for _ in range(8))
        write_text(folder / "documents.jsonl", "".join(json.dumps({"text": one}) + "\n" for one in documents))
        (folder / "recipe.toml").write_text(RECIPE)
        lengths = [f"data.{end}_bucket_tokens={case.tokens}" for end in ("min", "max")]
        lengths.append(f"train.global_batch_tokens={max(2048, case.tokens)}")
        longring(folder, "prepare", "recipe.toml")
        longring(
            folder, "prepare", "recipe.toml", "data.directory=long", "data.tokenizer.path=data/tokenizer.json", *lengths
        )
        longring(folder, "train", "recipe.toml", "--ranks", "1")
        one, ring = (evaluated(folder, case, ranks) for ranks in (1, case.ranks))
    title = f"{case.tokens:,} tokens, nats a token: {one['seconds']} s alone, {ring['seconds']} s on the ring"
    table = make_table(title, ["", "one rank", f"ring of {case.ranks}", "difference", "right tokens"], left={""})
    largest = 0.0
    for (name, loss, right), (_, of_ring, also) in zip(numbers(one["found"]), numbers(ring["found"]), strict=True):
        difference = abs(of_ring - loss) / loss
        largest = max(largest, difference)
        table.add_row(
            name, f"{loss:.6f}", f"{of_ring:.6f}", f"{difference:.1e}", "" if right is None else f"{right:.1%}"
        )
        assert right is None or (also is not None and abs(right - also) <= TOLERANCE), (name, right, also)
    Console().print(table)
    assert largest <= TOLERANCE, largest
    assert [bucket["cp"] for bucket in ring["found"]["buckets"]] == [case.ranks]
    write_record(options.json, {"tokens": case.tokens, "largest_difference": largest, "rows": [one, ring]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
