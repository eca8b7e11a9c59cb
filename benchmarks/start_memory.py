"""Peak memory of each rank while the model and its optimizer are made, by ZeRO stage and number of ranks.

    python benchmarks/start_memory.py --json rows.json   # two minutes
    python benchmarks/start_memory.py --quick            # a smaller model

Ranks are processes of this machine, joined by gloo. The peak is the growth of a rank's resident memory; the last column
divides it by the parameters of one rank's part. It stays the same over the ranks where none holds more than its part.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib.one_rank import RECIPE, VOCABULARY
from lib.process import free_port, peak_megabytes
from lib.script import Row, make_parser, make_table, write_record
from longring.launch.build import build_engine
from longring.launch.config import Recipe, load_recipe
from longring.parallel.mesh import join
from rich.console import Console

SIZES = {"full": (1024, 16), "quick": (512, 16), "smallest": (512, 8)}
"""Width and number of layers."""
STAGES = (0, 1, 2, 3)


def recipe_of(stage: int, ranks: int, width: int, layers: int) -> Recipe:
    shape = [f"model.hidden_size={width}", f"model.num_layers={layers}", f"model.ffn_hidden_size={3 * width}"]
    mesh = [f"parallel.zero_stage={stage}", f"train.global_batch_tokens={2**16}", "parallel.tokens_per_rank=4096"]
    return load_recipe(RECIPE, [*shape, *mesh, "train.dtype=bfloat16", "run_directory=nowhere"])


def start(stage: int, ranks: int, width: int, layers: int, port: int, rank: int) -> tuple[float, int, int]:
    """Make the engine as one rank; return the growth of its peak in MB, the parameters, and the largest matrix's."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), **where)
    torch.set_num_threads(1)
    recipe = recipe_of(stage, ranks, width, layers)
    mesh = join(recipe.parallel, 1)
    build_engine(recipe_of(stage, ranks, 64, 1), VOCABULARY, mesh)  # imports what only an engine needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak_megabytes()
    engine = build_engine(recipe, VOCABULARY, mesh)
    sizes = [getattr(p, "ds_numel", p.numel()) for p in engine.param_names]
    return peak_megabytes() - before, sum(sizes), max(sizes)


def measure(stage: int, ranks: int, width: int, layers: int) -> Row:
    """Return the largest peak of any rank beside the size of the model."""
    one = partial(start, stage, ranks, width, layers, free_port())
    with ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(one, range(ranks)))
    peak, parameters, largest = max(found)
    return {
        "stage": stage,
        "ranks": ranks,
        "parameters": parameters,
        "largest_matrix": largest,
        "peak_mb": peak,
        "bytes_per_own_parameter": peak * 2**20 / (parameters / ranks),
    }


def main() -> int:
    options = make_parser(__doc__ or "", quick="a smaller model: a minute").parse_args()
    width, layers = SIZES[options.size]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the ranks: what they free goes back to the system at once
    columns = ("ZeRO", "ranks", "parameters", "peak, MB", "bytes a parameter of its part")
    table = make_table("Peak memory of a rank while the model is made, bfloat16", columns)
    rows = []
    for stage in (3,) if options.size == "smallest" else STAGES:
        for ranks in (1, 4) if options.size == "smallest" else (1, 2, 4):
            row = measure(stage, ranks, width, layers)
            rows.append(row)
            shape = str(stage), str(ranks), f"{row['parameters'] / 1e6:,.1f}M"
            table.add_row(*shape, f"{row['peak_mb']:,.0f}", f"{row['bytes_per_own_parameter']:.1f}")
    Console(width=100).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
