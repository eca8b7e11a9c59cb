"""Memory of a rank that `longring plan --gpus` predicts, beside the bytes of all tensors that live on it in a step.

    python benchmarks/fit_memory.py --json rows.json   # ten minutes
    python benchmarks/fit_memory.py --quick            # a smaller model

Two ranks are processes of this machine, joined by gloo. Storages are counted from the operator that makes them until
nothing holds them. With a part on the host, both add up: here device and host are one memory.
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
from lib.live_memory import compare
from lib.one_rank import RECIPE, VOCABULARY
from lib.process import free_port
from lib.script import Row, make_parser, make_table, write_record
from longring.launch.config import load_recipe
from longring.parallel.mesh import join
from rich.console import Console

RANKS = 2
SIZES = {"full": (768, 12, 4096), "quick": (384, 4, 1024), "smallest": (256, 2, 512)}
"""Width, number of layers and tokens of a rank."""
BUCKET = "parallel.zero.reduce_bucket_size=4000000"
ON_HOST = "parallel.zero.offload_optimizer=cpu"
CASES = {
    "ZeRO 0": ["parallel.zero_stage=0"],
    "ZeRO 1": ["parallel.zero_stage=1", BUCKET],
    "ZeRO 2": ["parallel.zero_stage=2", BUCKET],
    "ZeRO 3": ["parallel.zero_stage=3", BUCKET],
    "ZeRO 3, optimizer and weights on the host": [
        *("parallel.zero_stage=3", BUCKET, ON_HOST, "parallel.zero.offload_param=cpu"),
    ],
    "ZeRO 1, MLP again": ["parallel.zero_stage=1", BUCKET, "train.memory.activations=recompute_mlp"],
    "ZeRO 1, layer again": ["parallel.zero_stage=1", BUCKET, "train.memory.activations=recompute_layer"],
    "ZeRO 1, layer on the host": ["parallel.zero_stage=1", BUCKET, "train.memory.activations=offload"],
    "ZeRO 1, tensor 2": ["parallel.zero_stage=1", BUCKET, "parallel.tensor=2", "parallel.sequence_parallel=true"],
    "ZeRO 1, ring of 2": ["parallel.zero_stage=1", BUCKET],
}


def case(size: str, name: str, port: int, rank: int) -> Row:
    """Take two steps as one rank; return measured and predicted bytes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), **where)
    torch.set_num_threads(1)
    width, layers, tokens = SIZES[size]
    length = RANKS * tokens if "ring" in name else tokens
    shape = [f"model.hidden_size={width}", f"model.num_layers={layers}", f"model.ffn_hidden_size={3 * width}"]
    batch = [f"parallel.tokens_per_rank={tokens}", f"train.global_batch_tokens={2 * RANKS * tokens}"]
    lengths = [f"data.max_bucket_tokens={length}", "run_directory=nowhere", "train.dtype=bfloat16"]
    recipe = load_recipe(RECIPE, [*shape, *batch, *lengths, *CASES[name]])
    join(recipe.parallel, recipe.max_context_parallel)
    found = compare(recipe, length, VOCABULARY)
    expected = found.expected
    return {
        "case": name,
        "ratio": found.ratio,
        "measured_bytes": dict(found.measured),
        "predicted_bytes": expected.total + expected.host,
        "moment": expected.moment,
        "kinds_bytes": expected.by_kind() | {"host": expected.host},
    }


def main() -> int:
    options = make_parser(__doc__ or "", quick="a smaller model: three minutes").parse_args()
    columns = ("settings", "measured, MB", "predicted, MB", "ratio", "peak", "largest kinds, MB")
    table, rows = make_table("Peak memory of a rank in a step, bfloat16, 2 ranks", columns), []
    for name in ("ZeRO 1", "ZeRO 1, ring of 2") if options.size == "smallest" else CASES:
        with ProcessPoolExecutor(RANKS, multiprocessing.get_context("spawn")) as pool:
            row = max(
                pool.map(partial(case, options.size, name, free_port()), range(RANKS)), key=lambda row: row["ratio"]
            )
        rows.append(row)
        peak, kinds = max(row["measured_bytes"].values()), sorted(row["kinds_bytes"].items(), key=lambda kind: -kind[1])
        told = ", ".join(f"{kind} {count / 1e6:,.0f}" for kind, count in kinds[:4])
        sizes = f"{peak / 1e6:,.1f}", f"{row['predicted_bytes'] / 1e6:,.1f}", f"{row['ratio']:.3f}"
        table.add_row(name, *sizes, row["moment"], told)
    Console(width=140).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
