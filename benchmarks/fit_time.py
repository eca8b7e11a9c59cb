"""Predicted beside measured time of a step on CPUs, over divisions, levels of activations and lengths.

    python benchmarks/fit_time.py --json rows.json   # 10 minutes
    python benchmarks/fit_time.py --quick            # a minute

Ranks are processes of this machine, a core each where there are enough, joined by gloo. Each round measures the rates
of the ranks (products, operators, AdamW, sums over ranks, attention) and then trains a step, so that other load on the
machine meets both. Seconds are those in which a rank's threads run: while other load has the cores, no clock goes on.
Waiting for another rank is left out for the same reason. A row has the medians of its rounds, a round the slowest rank;
"ratio" is the median of predicted over measured time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import numpy as np
import torch
import torch.distributed as dist
from lib.one_rank import RECIPE, VOCABULARY
from lib.process import free_port
from lib.script import Row, Size, make_parser, make_table, write_record
from longring.launch.build import bucket_layouts, build_engine
from longring.launch.config import Recipe, load_recipe
from longring.launch.fit.links import links_of
from longring.launch.fit.measure import Sizes, measure_device
from longring.launch.fit.time import time_of
from longring.launch.grids.choice import attention_shape, choose_grids
from longring.parallel.cp.probe import attention_speed, probe
from longring.parallel.cp.topology import Fabric, Topology
from longring.parallel.mesh import join
from longring.parallel.zero import set_learning_rate
from rich.console import Console


class Case(NamedTuple):
    """One division of a model, and its bucket."""

    name: str
    ranks: int
    length: int
    """Tokens of a sequence, as a multiple of those of a rank's half."""
    settings: tuple[str, ...]


STAGE = "parallel.zero_stage={}".format
LEVEL = "train.memory.activations={}".format
CASES = (
    Case("one rank", 1, 2, (STAGE(0),)),
    Case("one rank, short sequences, recompute_mlp", 1, 1, (STAGE(1), LEVEL("recompute_mlp"))),
    Case(
        "one rank, recompute_layer, no logits kept", 1, 2, (LEVEL("recompute_layer"), "train.memory.kept_logits_gb=0")
    ),
    Case("one rank, bfloat16", 1, 2, ("train.dtype=bfloat16",)),
    Case("two replicas, ZeRO 1", 2, 2, (STAGE(1),)),
    Case("two replicas, ZeRO 2, recompute_layer", 2, 1, (STAGE(2), LEVEL("recompute_layer"))),
    Case("two replicas, ZeRO 3", 2, 2, (STAGE(3),)),
    Case("a ring of 2", 2, 4, (STAGE(1),)),
    Case("a ring of 2, ZeRO 3, offload", 2, 4, (STAGE(3), LEVEL("offload"))),
    Case("tensor 2", 2, 2, (STAGE(1), "parallel.tensor=2", "parallel.sequence_parallel=true")),
    Case("two rings of 2, two ranks a core", 4, 4, (STAGE(1),)),
)
QUICK = (0, 4, 7, 9)


class Model(NamedTuple):
    """Sizes of a measurement."""

    width: int
    layers: int
    tokens: int
    rounds: int


SIZES: dict[Size, Model] = {
    "full": Model(768, 2, 512, 3),
    "quick": Model(512, 2, 512, 1),
    "smallest": Model(64, 1, 64, 1),
}


def recipe_of(case: Case, model: Model, run_directory: str) -> Recipe:
    width, layers, tokens, _ = model
    longest = max(tokens, case.length * tokens // 2)
    return load_recipe(
        RECIPE,
        [
            *(f"model.hidden_size={width}", f"model.num_layers={layers}", f"model.ffn_hidden_size={3 * width}"),
            *(f"model.num_heads={max(4, width // 64)}", f"model.num_kv_heads={max(2, width // 128)}"),
            *(f"parallel.tokens_per_rank={tokens}", f"data.min_bucket_tokens={tokens // 2}"),
            *(f"data.max_bucket_tokens={longest}", f"train.global_batch_tokens={2 * case.ranks * tokens}"),
            *("parallel.cp.schedule=auto", f"run_directory={run_directory}", *case.settings),
        ],
    )


def rank_of(case: Case, model: Model, run_directory: str, port: int, rank: int) -> list[tuple[float, dict[str, float]]]:
    """Return, for each round, the seconds of a step of this rank and the predicted ones by part, equal on all ranks."""
    time.perf_counter = time.process_time  # the probes' clock as well
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(case.ranks)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), **where)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    recipe = recipe_of(case, model, run_directory)
    mesh = join(recipe.parallel, case.length // 2 or 1)
    shape, dtype, length = attention_shape(recipe), getattr(torch, recipe.train.dtype), case.length * model.tokens // 2
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
    topology = Topology("one rank", 1, Fabric("switch", 1e9, 0.0))
    if case.ranks > 1:
        topology = probe(*heads, dtype, mesh.device).topology
    engine = build_engine(recipe, VOCABULARY, mesh)
    set_learning_rate(engine, 1e-4)
    links = links_of(recipe, case.ranks, topology)
    grids = choose_grids(recipe, [length], links.data_ranks, attention_speed(*heads, dtype, mesh.device))
    layouts = bucket_layouts(recipe, mesh, [length], {choice.kind: choice.grid for choice in grids})
    sequences = max(1, model.tokens // length)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, length + 1)).astype(np.uint16)

    def step() -> None:
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*layouts[length].model_inputs(rows, None, mesh.device)).mean())
            engine.step()

    step()
    sizes = Sizes(model.tokens, model.width, 3 * model.width // recipe.parallel.tensor)
    found: list[tuple[float, dict[str, float]]] = []
    for _ in range(model.rounds):
        speed = attention_speed(*heads, dtype, mesh.device)
        device = measure_device(sizes, dtype, mesh.device, speed, topology)
        grids = choose_grids(recipe, [length], links.data_ranks, speed)
        predicted = time_of(recipe, case.ranks, length, VOCABULARY, device, links, grids)
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        found.append((time.perf_counter() - started, predicted.by_part()))
    return found


def measure(case: Case, model: Model) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        one = partial(rank_of, case, model, f"{directory}/run", free_port())
        with ProcessPoolExecutor(case.ranks, multiprocessing.get_context("spawn")) as pool:
            by_rank = list(pool.map(one, range(case.ranks)))
    measured = [max(seconds for seconds, _ in of_round) for of_round in zip(*by_rank, strict=True)]
    parts = [of_round for _, of_round in by_rank[0]]
    ratios = [sum(predicted.values()) / seconds for predicted, seconds in zip(parts, measured, strict=True)]
    return {
        "case": case.name,
        "ranks": case.ranks,
        "length": case.length * model.tokens // 2,
        "predicted_s": median(sum(predicted.values()) for predicted in parts),
        "measured_s": median(measured),
        "ratio": median(ratios),
        "ratios": ratios,
        "parts_s": {part: median(predicted[part] for predicted in parts) for part in parts[0]},
    }


def main() -> int:
    parser = make_parser(__doc__ or "", quick="four cases, one round, a smaller model: a minute")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out the cases before the N-th, from 0")
    options = parser.parse_args()
    model = SIZES[options.size]
    cases = CASES[options.first :] if options.size == "full" else [CASES[number] for number in QUICK]
    title = f"Time of a step: width {model.width}, {model.layers} layers, {model.tokens} tokens a rank"
    table = make_table(title, ("case", "ranks", "length", "predicted, s", "measured, s", "ratio"), left=("case",))
    rows = []
    for case in cases:
        row = measure(case, model)
        rows.append(row)
        figures = (f"{row[key]:.3f}" for key in ("predicted_s", "measured_s", "ratio"))
        table.add_row(case.name, str(case.ranks), f"{row['length']:,}", *figures)
        write_record(options.json, {**model._asdict(), "rows": rows})  # a killed measurement keeps its rows
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
