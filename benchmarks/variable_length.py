"""Step time by bucket at constant tokens per rank, and tokens/s over a curriculum against concat-and-chunk.

    .venv/bin/python benchmarks/variable_length.py [--quick] [--json FILE]

One model, one rank, the same steps of the same number of tokens, by `longring train`: first decomposed data under
grow-p2, cut as the paper's code cuts so that every length has its share, then concat-and-chunk at the longest length.
The speed-up stands beside the one predicted from FLOPs (data/inspect/cost.py). Text: Python's own standard library; on
GPUs set `--ranks`, `--max-tokens`, `--layers` and `--hidden` to their size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from longring.data.format.manifest import open_prepared
from longring.data.inspect.cost import speed_up
from longring.launch.commands.inspect import model_size
from longring.launch.config import load_recipe
from rich.console import Console
from rich.table import Table

RECIPE = """
run_directory = "{folder}/run"
[data]
directory = "{folder}/data"
min_bucket_tokens = 256
max_bucket_tokens = {max_tokens}
cut = "random"
tokenizer = {{ vocab_size = 2048 }}
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
"""Steps of each bucket that are not timed: the first allocate."""


def train(recipe: Path, ranks: int, *overrides: str) -> list[dict]:
    """Prepare and train -> a record for each step."""
    longring = str(Path(sys.executable).with_name("longring"))
    subprocess.run([longring, "prepare", str(recipe), *overrides], check=True, stdout=subprocess.DEVNULL)
    command = [longring, "train", str(recipe), *overrides, "--ranks", str(ranks)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = Path(load_recipe(recipe, overrides).run_directory)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def by_bucket(steps: list[dict]) -> dict[int, float]:
    """Median ms of a step in each bucket."""
    lengths = sorted({step["bucket"] for step in steps})
    times = {length: [step["step_ms"] for step in steps if step["bucket"] == length] for length in lengths}
    return {length: median(values[WARM:] or values) for length, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; about a minute on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures here")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    steps = 32 if options.quick else 160
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Path(temporary, "recipe.toml")
        content = RECIPE.format(
            folder=temporary,
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
    tokens = options.max_tokens * options.ranks
    counts = {length: sum(step["bucket"] == length for step in curriculum) for length in times}
    table = Table(title=f"Steps of {tokens:,} tokens", title_justify="left")
    for column in ("bucket", "steps", "ms", "concat is", "predicted"):
        table.add_column(column, justify="right")
    rows = []
    for length, value in times.items():
        predicted = speed_up(model, [1, 0], [length, options.max_tokens])
        rows.append({"bucket": length, "steps": counts[length], "step_ms": value})
        rows[-1] |= {"concat_is": longest / value, "predicted": predicted}
        table.add_row(
            f"{length:,}", str(counts[length]), f"{value:,.0f}", f"{longest / value:.2f} x", f"{predicted:.2f} x"
        )
    spent = sum(counts[length] * times[length] for length in times)
    measured = len(curriculum) * longest / spent
    lengths = [*times, options.max_tokens]
    predicted = speed_up(model, [*counts.values(), 0], lengths)
    console = Console()
    console.print(table)
    console.print(
        f"concat-and-chunk at {options.max_tokens:,}: {longest:,.0f} ms a step\n"
        f"the curriculum is {measured:.2f} times as fast, {predicted:.2f} predicted from FLOPs",
        highlight=False,
    )
    if options.json:
        figures = {"rows": rows, "concat_step_ms": longest, "speed_up": measured, "predicted": predicted}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
