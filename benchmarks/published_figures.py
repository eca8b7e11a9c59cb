"""Predicted steps and attention beside published measurements of other trainers, on 4 to 1,024 GPUs.

    python benchmarks/published_figures.py --json rows.json   # ten seconds
    python benchmarks/published_figures.py --quick  # five seconds

Nothing is measured here, and LongRing ran on none of these machines: a model of its steps is held against steps of
others, so what agrees is the model of the machine, and what differs may be either. Steps are those of
`longring plan --gpus` with the divisions that the source names, attention those of parallel/cp/cost.py:

- torchtitan: Llama 3.1 8B, tokens/s of a GPU (benchmarks/llama3_h100_202412_torchtitan.md). H100s with a limit of 500
  W and 2.4 TB/s.
- NeMo: Llama 2 7B in FP8, TFLOP/s of a GPU, attention counted without its causal half, as NeMo counted it then
  (docs/source/performance/performance_long_sequence.md). 4M tokens a step, as in its later table. The row with
  pipelines is left out.
- ring-flash-attention: attention of Llama 3.1 8B over 8 GPUs, 8,192 tokens each, share of the speed of one GPU alone
  (README.md). Tiles have the speed that it reports for one GPU.
- MagiAttention: causal attention of 64 query and 8 kv heads, 8,192 tokens a GPU, TFLOP/s of a GPU. **Read from a
  chart**, within 3%. Tiles have the speed of FlashAttention-3 at 16,384 tokens forward, 32,768 backward (616 and 586).

Activations are at the first level that fits by the memory of `longring plan`, unless the source names it. FP8 doubles
the FLOP/s of matrix products, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.script import Row, make_parser, make_table, write_record
from longring.kernels.layout import SeqLayout
from longring.launch.config import Recipe, load_recipe
from longring.launch.fit.device import Device, named_device
from longring.launch.fit.links import assumed_topology
from longring.launch.fit.search import LEVELS, Plan, Planner
from longring.launch.flops import ModelFlops
from longring.parallel.cp.cost import AttentionShape, Speed, play
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.layout import contiguous, zigzag
from longring.parallel.cp.plan import PASSES, Pass
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.topology import GB, Fabric, Topology, infiniband
from longring.parallel.cp.visible import Visibility
from rich.console import Console

LLAMA_2_7B = ("model.num_kv_heads=32", "model.ffn_hidden_size=11008", "model.vocab_size=32000")


class Step(NamedTuple):
    """A published step of a trainer."""

    source: Literal["torchtitan", "torchtitan, Float8", "NeMo, FP8"]
    gpus: int
    length: int
    published: float
    """Tokens/s of a GPU, or TFLOP/s for NeMo."""
    cp: int = 1
    tensor: int = 1
    sequences: int = 1
    """Sequences of a micro-batch on the ranks that share one."""
    level: str = ""
    """Activations; "": the first that fits."""


STEPS = (
    Step("torchtitan", 8, 8192, 6667, sequences=2, level="recompute_mlp"),
    Step("torchtitan", 128, 8192, 6514, sequences=2, level="recompute_mlp"),
    Step("torchtitan, Float8", 8, 8192, 8532, sequences=2, level="recompute_mlp"),
    Step("torchtitan, Float8", 128, 8192, 8380, sequences=2, level="recompute_mlp"),
    *(
        Step("torchtitan, Float8", 8, cp * 32768, published, cp=cp, level="recompute_layer")
        for cp, published in ((1, 3890), (2, 2540), (4, 1071), (8, 548))
    ),
    *(
        Step("NeMo, FP8", thousand, thousand * 1024, published, cp=cp, tensor=tensor)
        for thousand, tensor, cp, published in (
            (4, 1, 1, 768),
            (16, 2, 1, 660),
            (32, 2, 2, 610),
            (64, 4, 2, 574),
            (128, 4, 4, 555),
            (256, 4, 8, 549),
            (512, 8, 16, 549),
            (1024, 8, 32, 536),
        )
    ),
)


class Attention(NamedTuple):
    """Published attention of one method over several GPUs."""

    source: Literal["ring-flash-attention, H800", "ring-flash-attention, A100", "MagiAttention's chart, H100"]
    gpus: int
    method: str
    passes: tuple[Pass, ...]
    published: float
    """Share of one GPU's speed, or TFLOP/s of a GPU in the chart."""


BOTH: tuple[Pass, ...] = PASSES
CHART: tuple[tuple[str, Pass, tuple[int, ...]], ...] = (
    ("ring, zigzag", "forward", (421, 455, 451, 446)),
    ("ring, zigzag", "backward", (432, 475, 470, 457)),
    ("USP", "forward", (593, 590, 593, 587)),
    ("USP", "backward", (571, 569, 574, 571)),
)
"""Method, pass, and TFLOP/s of a GPU on 8, 16, 32 and 64 of them."""
ATTENTION = (
    *(
        Attention(f"ring-flash-attention, {gpu}", 8, method, passes, published)  # type: ignore[arg-type]
        for gpu, method, passes, published in (
            ("H800", "ring, contiguous", ("forward",), 0.521),
            ("H800", "ring, contiguous", BOTH, 0.539),
            ("H800", "ring, zigzag", ("forward",), 0.852),
            ("H800", "ring, zigzag", BOTH, 0.902),
            ("A100", "ring, contiguous", ("forward",), 0.514),
            ("A100", "ring, contiguous", BOTH, 0.525),
            ("A100", "ring, zigzag", ("forward",), 0.817),
            ("A100", "ring, zigzag", BOTH, 0.898),
        )
    ),
    *(
        Attention("MagiAttention's chart, H100", gpus, method, (direction,), published)
        for method, direction, all_published in CHART
        for gpus, published in zip((8, 16, 32, 64), all_published, strict=True)
    ),
)


def iterations(forward_per_s: float, both_per_s: float) -> Speed:
    """Return the speed of 32 heads of 128 over 8,192 causal tokens, from iterations per second of one GPU."""
    product = 128 * 32 * 8192 * 8193 / 2  # head dim x heads x pairs
    return Speed(4 * product * forward_per_s, 10 * product / (1 / both_per_s - 1 / forward_per_s))


SPEEDS = {
    "ring-flash-attention, H800": iterations(591.5, 154.7),
    "ring-flash-attention, A100": iterations(373.4, 94.7),
    "MagiAttention's chart, H100": Speed(616e12, 586e12),
}
NVLINK = {"ring-flash-attention, H800": 200 * GB, "ring-flash-attention, A100": 300 * GB}
"""Bytes/s of a GPU in one direction, by NVIDIA's data sheets: 400 and 600 GB/s both ways."""


def attention_row(of: Attention) -> Row:
    """Return the simulated attention beside the published."""
    if of.source in NVLINK:
        shape, topology = AttentionShape(32, 8, 128), Topology(of.source, 8, Fabric("switch", NVLINK[of.source], 10e-6))
    else:
        shape, topology = AttentionShape(64, 8, 128), infiniband(of.gpus)
    tokens = 8192 * of.gpus
    grid = CpGrid(heads=8, kv=of.gpus // 8) if of.method == "USP" else CpGrid.ring(of.gpus)
    cut = contiguous if "contiguous" in of.method else zigzag
    layouts: list[SeqLayout] = [cut(tokens, rank, of.gpus) for rank in range(of.gpus)]
    speed, seconds, alone = SPEEDS[of.source], 0.0, 0.0
    flops = 0.0
    for direction in of.passes:
        schedule = Schedule(grid, layouts, Visibility(), direction)
        seconds += play(schedule, topology, shape, speed).seconds
        a_rank = tokens * (tokens + 1) / 2 / of.gpus  # pairs of the mean rank
        alone += float(speed.seconds(a_rank, shape, CpGrid(), direction))  # type: ignore[arg-type]
        flops += (4 if direction == "forward" else 10) * a_rank * shape.num_heads * shape.head_dim
    is_share = of.source in NVLINK
    return {
        "source": of.source,
        "case": f"{of.method}, {' + '.join(of.passes)}",
        "gpus": of.gpus,
        "length": tokens,
        "unit": "of one GPU" if is_share else "TFLOP/s",
        "published": of.published,
        "predicted": round(alone / seconds, 3) if is_share else round(flops / seconds / 1e12),
    }


def step_row(of: Step) -> Row:
    """Return the predicted step beside the published."""
    nemo, tokens = of.source == "NeMo, FP8", of.sequences * of.length // of.cp
    data_ranks = of.gpus // of.tensor
    batch = max(2**22, data_ranks * tokens) if nemo else data_ranks * tokens
    settings = [
        *(f"data.min_bucket_tokens={of.length}", f"data.max_bucket_tokens={of.length}", "curriculum.shares={}"),
        *(f"parallel.tokens_per_rank={tokens}", f"parallel.tensor={of.tensor}", f"train.global_batch_tokens={batch}"),
        *(f"parallel.sequence_parallel={str(of.tensor > 1).lower()}", f"parallel.zero_stage={1 if nemo else 3}"),
        *(LLAMA_2_7B if nemo else ()),
        "parallel.cp.schedule=ring",
    ]
    plan = first_that_fits(of, settings)
    recipe = plan.recipe
    tokens_per_s = recipe.train.global_batch_tokens / plan.seconds / of.gpus
    predicted = tokens_per_s
    if nemo:
        predicted = flops_of_token(recipe, of.length) * tokens_per_s / 1e12
    division = ", ".join(f"{name} {degree}" for name, degree in (("tensor", of.tensor), ("cp", of.cp)) if degree > 1)
    parts = {name: round(seconds / plan.seconds, 3) for name, seconds in plan.parts.items() if seconds}
    return {
        "source": of.source,
        "case": division or "data parallel",
        "gpus": of.gpus,
        "length": of.length,
        "unit": "TFLOP/s" if nemo else "tokens/s",
        "published": of.published,
        "predicted": round(predicted),
        "activations": recipe.train.memory.activations,
        "memory_gib": round(plan.memory_bytes / 2**30, 1),
        "parts": parts,
    }


def first_that_fits(of: Step, settings: list[str]) -> Plan:
    """Return the plan of a step at the first level of activations that fits, or at the level of the source."""
    file = ROOT / "launch" / "recipes" / "llama-3.1-8b-128k.toml"
    plans: list[Plan] = []
    for level in (of.level,) if of.level else LEVELS:
        recipe = load_recipe(file, [*settings, f"train.memory.activations={level}"])
        planner = Planner(recipe, of.gpus, recipe.model.vocab_size, device_of(of), topology_of(of))
        plans.append(planner.plan(recipe))
        if planner.fits(plans[-1]):
            break
    return plans[-1]


def flops_of_token(recipe: Recipe, length: int) -> float:
    """Return the FLOPs of a token as NeMo counts them: every token sees its whole sequence."""
    flops = ModelFlops.of(recipe.model, recipe.model.vocab_size)
    return flops.matrices(1) + flops.dense_attention(1, length)


def device_of(of: Step) -> Device:
    """Return the H100 of the source."""
    device = named_device("h100")
    if of.source != "torchtitan":
        device = replace(device, product_flops=2 * device.product_flops)
    if of.source != "NeMo, FP8":  # 96 GB at 2.4 of 3.35 TB/s
        slower = 2.4 / 3.35
        device = replace(
            device,
            memory_bytes=96e9,
            operator_bytes_per_s=slower * device.operator_bytes_per_s,
            update_bytes_per_s=slower * device.update_bytes_per_s,
        )
    return device


def topology_of(of: Step) -> Topology:
    """Return the links: NVSwitch nodes of 8, with 400 Gbit/s for each GPU across."""
    return assumed_topology("nvswitch" if of.gpus <= 8 else "infiniband", of.gpus, "h100")


def rows_of(most_gpus: int) -> Iterator[Row]:
    """Yield the rows of both kinds, up to a number of GPUs."""
    for step in STEPS:
        if step.gpus <= most_gpus:
            yield step_row(step)
    for attention in ATTENTION:
        if attention.gpus <= most_gpus:
            yield attention_row(attention)


def main() -> int:
    options = make_parser(__doc__ or "", quick="up to 128 GPUs: five seconds").parse_args()
    most_gpus = {"full": 1024, "quick": 128, "smallest": 8}[options.size]
    columns = ("source", "case", "GPUs", "length", "unit", "published", "predicted", "ratio")
    table, rows = make_table("Predicted beside published", columns, left=("source", "case", "unit")), []
    for row in rows_of(most_gpus):
        row["predicted_over_published"] = round(row["predicted"] / row["published"], 3)
        rows.append(row)
        sizes = f"{row['gpus']:,}", f"{row['length']:,}", row["unit"], f"{row['published']:,}", f"{row['predicted']:,}"
        table.add_row(row["source"], row["case"], *sizes, f"{row['predicted_over_published']:.2f}")
    Console(width=118).print(table)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
