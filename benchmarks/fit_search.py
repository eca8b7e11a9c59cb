"""Time of `longring plan --gpus`, from the recipe to all of its answers, by number of GPUs.

    python benchmarks/fit_search.py --json rows.json   # half a minute
    python benchmarks/fit_search.py --quick            # 64 GPUs alone

The recipe is launch/recipes/llama-3.1-8b-1m.toml, sequences of a million tokens, on H100s. Seconds are those of one
core, so other load on the machine counts little; the imports are left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.process import use_one_core
from lib.script import Row, Size, make_parser, make_table, write_record
from longring.launch.config import load_recipe
from longring.launch.fit.device import named_device
from longring.launch.fit.links import assumed_topology
from longring.launch.fit.search import Planner
from longring.launch.fit.show import answer
from rich.console import Console

RECIPE = ROOT / "launch" / "recipes" / "llama-3.1-8b-1m.toml"
VOCABULARY = 128_256
GPUS: dict[Size, tuple[int, ...]] = {"full": (64, 1024), "quick": (64,), "smallest": (32,)}


def row_of(gpus: int) -> Row:
    """Return the seconds of the plan and of its searches; the batch is at least one micro-batch of all ranks."""
    recipe = load_recipe(RECIPE, [f"train.global_batch_tokens={max(4_194_304, 32_768 * gpus)}"])
    planner = Planner(recipe, gpus, VOCABULARY, named_device("h100"), assumed_topology("infiniband", gpus, "h100"))
    settings = sum(1 for _ in planner.settings())
    started = time.process_time()
    found = answer(planner)
    return {
        "gpus": gpus,
        "settings": settings,
        "seconds": time.process_time() - started,
        "step_s": found.own.seconds,
        "best_step_s": found.best[0].seconds if found.best else None,
        "longest_tokens": found.longest.buckets[-1].length if found.longest else None,
    }


def main() -> int:
    options = make_parser(__doc__ or "", quick="64 GPUs alone: ten seconds").parse_args()
    use_one_core()
    table = make_table("All answers of longring plan --gpus", ("GPUs", "settings", "seconds", "longest context"))
    rows = []
    for gpus in GPUS[options.size]:
        row = row_of(gpus)
        rows.append(row)
        figures = (f"{row[key] or 0:,}" for key in ("gpus", "settings"))
        table.add_row(*figures, f"{row['seconds']:.1f}", f"{row['longest_tokens'] or 0:,}")
        write_record(options.json, {"rows": rows})
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
