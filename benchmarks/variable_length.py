"""Speed of training on buckets beside concatenated chunks of the longest length.

    python benchmarks/variable_length.py --json rows.json   # eight minutes
    python benchmarks/variable_length.py --quick            # fewer steps

One model on one rank takes steps of the same number of tokens with `longring train`: first decomposed data under
grow-p2, cut as the paper's code cuts, so that every length has its share; then concat-and-chunk at the longest length.
The speed-up stands beside the one predicted from FLOPs (data/inspect/cost.py). The text is Python's own standard
library; on GPUs set --ranks, --max-tokens, --layers and --hidden to their size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.script import Row, make_parser, make_table, write_record
from longring.data.format.manifest import open_prepared
from longring.data.inspect.cost import speed_up
from longring.launch.commands.inspect import model_size
from longring.launch.config import load_recipe
from rich.console import Console

RECIPE = """
run_directory = "{folder}/run"
[data]
directory = "{folder}/data"
min_bucket_tokens = 256
max_bucket_tokens = {max_tokens}
cut = "random"
tokenizer = {{ vocab_size = 2048 }}
source = {{ limit_documents = {documents} }}
[curriculum]
odds = "grow_p2"
[model]
num_layers = {layers}
hidden_size = {hidden}
num_heads = {heads}
num_kv_heads = {heads}
ffn_hidden_size = {ffn}
[parallel]
tokens_per_rank = {max_tokens}
[train]
steps = {steps}
global_batch_tokens = {batch_tokens}
learning_rate = 1e-4
dtype = "{dtype}"
"""
WARM = 2
"""Number of first steps of each bucket that are not timed, as they allocate memory."""


def train(recipe: Path, ranks: int, *overrides: str) -> list[Row]:
    """Prepare, train, and return the metrics of each step."""
    longring = [sys.executable, "-m", "longring.launch.cli"]
    subprocess.run([*longring, "prepare", str(recipe), *overrides], check=True, stdout=subprocess.DEVNULL)
    command = [*longring, "train", str(recipe), *overrides, "--ranks", str(ranks)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = Path(load_recipe(recipe, overrides).run_directory)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def by_bucket(steps: list[Row]) -> dict[int, float]:
    """Return by bucket the median ms of a step."""
    lengths = sorted({step["bucket"] for step in steps})
    times = {length: [step["step_ms"] for step in steps if step["bucket"] == length] for length in lengths}
    return {length: median(values[WARM:] or values) for length, values in times.items()}


def main() -> int:
    parser = make_parser(__doc__ or "", quick="fewer steps: about a minute on two cores")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest bucket (default: 4096)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default: 2)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--dtype", default="float32", help="dtype of training (default: float32)")
    options = parser.parse_args()
    steps, documents = {"full": (160, 0), "quick": (32, 0), "smallest": (8, 60)}[options.size]
    if options.size == "smallest":
        options.max_tokens, options.layers, options.hidden = 512, 1, 64
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary, "recipe.toml")
        content = RECIPE.format(
            folder=temporary,
            documents=documents,
            max_tokens=options.max_tokens,
            layers=options.layers,
            hidden=options.hidden,
            heads=max(1, options.hidden // 64),
            ffn=3 * options.hidden,
            steps=steps,
            batch_tokens=options.max_tokens * options.ranks,
            dtype=options.dtype,
        )
        recipe.write_text(content)
        curriculum = train(recipe, options.ranks)
        data, run = f"data.directory={temporary}/concat", f"run_directory={temporary}/concat-run"
        baseline = train(recipe, options.ranks, "data.method=concat", data, run, f"train.steps={max(8, steps // 4)}")
        vocab_size = open_prepared(Path(temporary, "data")).vocab_size
        model = model_size(load_recipe(recipe).model, vocab_size)
    times = by_bucket(curriculum)
    [longest] = by_bucket(baseline).values()
    counts = {length: sum(step["bucket"] == length for step in curriculum) for length in times}
    title = f"Steps of {options.max_tokens * options.ranks:,} tokens"
    table = make_table(title, ("bucket", "steps", "ms", "concat is", "predicted"))
    rows: list[Row] = []
    for length, ms in times.items():
        predicted = speed_up(model, [1, 0], [length, options.max_tokens])
        rows.append({"bucket": length, "steps": counts[length], "step_ms": ms})
        rows[-1] |= {"concat_is": longest / ms, "predicted": predicted}
        ratios = f"{longest / ms:.2f} x", f"{predicted:.2f} x"
        table.add_row(f"{length:,}", str(counts[length]), f"{ms:,.0f}", *ratios)
    measured = len(curriculum) * longest / sum(counts[length] * times[length] for length in times)
    predicted = speed_up(model, [*counts.values(), 0], [*times, options.max_tokens])
    console = Console()
    console.print(table)
    console.print(
        f"concat-and-chunk at {options.max_tokens:,}: {longest:,.0f} ms a step\n"
        f"the curriculum is {measured:.2f} times as fast; {predicted:.2f} is predicted from FLOPs",
        highlight=False,
    )
    figures = {"concat_step_ms": longest, "speed_up": measured, "predicted": predicted}
    write_record(options.json, {"rows": rows, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
