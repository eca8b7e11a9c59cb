"""Speed of training on buckets beside concatenated chunks of the longest length.

    python benchmarks/variable_length.py --json rows.json   # three minutes
    python benchmarks/variable_length.py --quick            # fewer steps

One model takes steps of the same number of tokens with the trainer of `longring train`: on decomposed data under
grow-p2, cut as the paper's code cuts, so that every length has its share; and on concat-and-chunk at the longest
length. Both trainers are alive and take turns step by step, so that both meet the same machine; the one that waits is
stopped. A round is one step of each. "concat is" is the time of the step on chunks over that of the step on the bucket
in the same round, the median of the bucket's rounds. The speed-up of the curriculum follows from these and from the
number of its steps in each bucket; the one beside it is predicted from FLOPs (data/inspect/cost.py).

The text is Python's own standard library. On GPUs set --ranks, --max-tokens, --layers and --hidden to their size.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.packages import QUIET
from lib.script import Row, make_parser, make_table, write_record
from lib.turns import Member, take_turns
from longring.data.format.manifest import open_prepared
from longring.data.inspect.cost import speed_up
from longring.data.prepare.prepare import prepare
from longring.launch.commands.inspect import model_size
from longring.launch.config import load_recipe
from longring.launch.preflight import preflight_together
from longring.launch.ranks.signals import StopSignals
from longring.launch.ranks.watchdog import Watchdog
from longring.launch.train import start
from longring.parallel.meet import meet
from longring.parallel.mesh import join
from longring.parallel.world import World
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
MEET_MINUTES = 10
WARM = 2
"""Number of first rounds of each bucket that are not timed, as they allocate memory."""


class Answer(NamedTuple):
    """What a rank has found of one step."""

    bucket: int
    step_ms: float


class Round(NamedTuple):
    """One step of each member."""

    bucket: int
    """Bucket of the step of the curriculum."""
    step_ms: float
    """Its time, that of the slowest rank."""
    concat_step_ms: float
    """The same of the step on chunks."""


def rank_of(recipe_file: Path, overrides: tuple[str, ...]) -> Generator[Answer | None, None, None]:
    """Yield None once the trainer of a recipe is made on one rank; then the answer of each step."""
    recipe, world = load_recipe(recipe_file, overrides), World.from_environment()
    store = meet(world, timedelta(minutes=MEET_MINUTES))
    checked = preflight_together(recipe, store, world)
    mesh = join(recipe.parallel, recipe.max_context_parallel, MEET_MINUTES, store)
    watchdog = Watchdog(checked.run, world.rank, world.size, limit_s=0)
    with start(recipe, checked, mesh, StopSignals(), watchdog, recipe.train.steps, QUIET) as trainer:
        yield None
        while True:
            metrics = trainer.train_step()
            yield Answer(metrics.bucket, metrics.step_ms)


def rounds_of(recipe_file: Path, concat: tuple[str, ...], ranks: int) -> list[Round]:
    """Prepare the data of both members and return the rounds of their training.

    Raises SystemExit if a member cannot begin.
    """
    overrides: dict[str, tuple[str, ...]] = {"curriculum": (), "concat": concat}
    for of_member in overrides.values():
        prepare(load_recipe(recipe_file, of_member).data, QUIET)
    with ExitStack() as stack:
        members = {
            name: stack.enter_context(Member(partial(rank_of, recipe_file, of_member), ranks))
            for name, of_member in overrides.items()
        }
        for name, member in members.items():
            if error := member.error():
                raise SystemExit(f"{name}: {error}")
        found = []
        for turns in islice(take_turns(members), load_recipe(recipe_file).train.steps):
            times = [max(answer.step_ms for answer in turns[name].answers) for name in overrides]
            found.append(Round(turns["curriculum"].answers[0].bucket, *times))
    return found


def by_bucket(rounds: list[Round]) -> list[Row]:
    """Return a row for each bucket: its rounds, the median times of both members, and the median of their ratios."""
    rows: list[Row] = []
    for bucket in sorted({one.bucket for one in rounds}):
        mine = [one for one in rounds if one.bucket == bucket]
        timed = mine[WARM:] or mine
        rows.append({"bucket": bucket, "rounds": len(mine), "step_ms": median(one.step_ms for one in timed)})
        rows[-1]["concat_step_ms"] = median(one.concat_step_ms for one in timed)
        rows[-1]["concat_is"] = median(one.concat_step_ms / one.step_ms for one in timed)
    return rows


def main() -> int:
    parser = make_parser(__doc__ or "", quick="fewer steps: about a minute on two cores")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest bucket (default: 4096)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default: 2)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--dtype", default="float32", help="dtype of training (default: float32)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.ranks)))  # as `longring train`
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
        concat = "data.method=concat", f"data.directory={temporary}/concat", f"run_directory={temporary}/concat-run"
        rows = by_bucket(rounds_of(recipe, concat, options.ranks))
        model = model_size(load_recipe(recipe).model, open_prepared(Path(temporary, "data")).vocab_size)
    title = f"Steps of {options.max_tokens * options.ranks:,} tokens"
    table = make_table(title, ("bucket", "rounds", "ms", "concat, ms", "concat is", "predicted"))
    for row in rows:
        row["predicted"] = speed_up(model, [1, 0], [row["bucket"], options.max_tokens])
        times = f"{row['step_ms']:,.0f}", f"{row['concat_step_ms']:,.0f}"
        ratios = f"{row['concat_is']:.2f} x", f"{row['predicted']:.2f} x"
        table.add_row(f"{row['bucket']:,}", str(row["rounds"]), *times, *ratios)
    # A step on chunks takes 1, one of the curriculum 1 / concat_is.
    measured = steps / sum(row["rounds"] / row["concat_is"] for row in rows)
    predicted = steps / sum(row["rounds"] / row["predicted"] for row in rows)
    console = Console()
    console.print(table)
    console.print(
        f"the curriculum is {measured:.2f} times as fast as concat-and-chunk at {options.max_tokens:,}; "
        f"{predicted:.2f} is predicted from FLOPs",
        highlight=False,
    )
    write_record(options.json, {"rows": rows, "speed_up": measured, "predicted": predicted})
    return 0


if __name__ == "__main__":
    sys.exit(main())
