"""Host time of context attention: the work of the processor in a pass, without kernels and messages.

    python benchmarks/host_time.py --json rows.json
    python benchmarks/host_time.py --against ../other  # beside other code

The executor runs the plans of some ranks over a transport that sends nothing, and kernels are replaced by functions
that do nothing, so what remains is Python and torch's own work on the host: views, buffers and the order of a pass.
Tensors are small and lie on the CPU. A launch is timed apart: the kernels are compiled for sm_90 (the longest part of
the run) and a driver that starts nothing takes them. The rows `layer` are a transformer layer without attention, by
torch's operators: what a CUDA graph of it would save.

With --against, both checkouts are loaded into one process and take turns pass by pass, so that both meet the same
machine; ratio is the time here over the time there. Times are processor time of the thread, the least of many, since
other load only adds.

A second table tells what it costs these passes that a thread of the loader makes a plan for a context of documents at
the same time, since Python runs one thread at a time: wall time, the median of many.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel is not launched

import torch

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import ROOT
from lib.one_rank import be_the_only_rank
from lib.script import Row, Size, make_parser, make_table, write_record
from lib.stub_driver import stub_driver
from rich.console import Console

HERE, THERE = "longring", "longring_there"
TOKENS = 32
"""Tokens of a rank: few, since only the work of the host counts."""
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
MOST_RANKS = 8
"""Ranks whose passes are timed; of larger groups every n-th."""
LAYERS, PACKED_TOKENS, DOCUMENT_TOKENS = 32, 8192, 1024
"""Layers of a step, tokens of a rank for which a plan is made beside it, and mean tokens of a document."""


class Pass(NamedTuple):
    """One pass of some ranks of a grid, or of some layers, under one checkout."""

    run: Callable[[], object]
    number: int
    """Ranks or layers."""
    tiles_a_rank: float


class Nowhere:
    """Transport that sends nothing and waits for nothing."""

    def post(self, sends: Any, receives: Any) -> None:
        """Do nothing."""


def load(name: str, root: Path) -> None:
    """Make the checkout at `root` importable as the package `name`: its own imports are relative."""
    package = types.ModuleType(name)
    package.__path__ = [str(root)]
    sys.modules[name] = package


def part(package: str, module: str) -> Any:
    """Return a module of a checkout."""
    return importlib.import_module(f"{package}.{module}")


def without_kernels(execute: Any) -> None:
    """Replace the kernels that the executor calls by functions that leave its buffers as they are."""
    execute.attention_forward = lambda q, *_, running=None, **__: running or (torch.empty_like(q), None)
    execute.attention_backward = lambda *_, **__: None
    execute.merge_ = lambda *_: None
    execute.row_delta = lambda dout, out: dout.new_empty((dout.shape[0], dout.shape[2], dout.shape[1])).float()


def passes(package: str, member: str, size: int) -> dict[str, Pass]:
    """Return the forward and the backward of a member of the family over `size` ranks, with plans and masks made."""
    execute, grid = part(package, "parallel.cp.execute"), part(package, "parallel.cp.grid").NAMED[member](size)
    zigzag, visibility = part(package, "parallel.cp.layout").zigzag, part(package, "parallel.cp.visible").Visibility()
    without_kernels(execute)
    layouts = tuple(zigzag(TOKENS * size, rank, size) for rank in range(size))
    spec = execute.AttentionSpec(grid, layouts, visibility)
    q, dout = torch.randn(2, 1, TOKENS, HEADS, HEAD_DIM).bfloat16()
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, HEAD_DIM).bfloat16()
    ranks, transport = range(0, size, max(1, size // MOST_RANKS)), Nowhere()

    def to_the_end(running: Any) -> Any:
        while True:
            try:
                next(running)
            except StopIteration as stop:
                return stop.value

    def forward() -> list[Any]:
        return [to_the_end(execute.forward(spec, rank, q, k, v, transport))[1] for rank in ranks]

    saved = forward()

    def backward() -> None:
        for rank, of_rank in zip(ranks, saved, strict=True):
            to_the_end(execute.backward(spec, rank, dout, of_rank, KV_HEADS, transport))

    backward()
    plan = part(package, "parallel.cp.schedules").Schedule(grid, layouts, visibility, "forward").plan
    tiles = sum(step.tile is not None for rank in ranks for step in plan(rank).steps) / len(ranks)
    return {name: Pass(run, len(ranks), tiles) for name, run in (("forward", forward), ("backward", backward))}


def launches(package: str) -> dict[str, Pass]:
    """Return one launch of the forward and one of the backward, which has two kernels."""
    kernels, attention = part(package, "kernels.triton_attention"), part(package, "kernels.attention")
    kernels.blocks = lambda kernel, q: part(package, "kernels.blocks").tuned(kernel, "sm_90", q.itemsize, q.shape[-1])
    layout = part(package, "kernels.layout").SeqLayout.contiguous(TOKENS)
    mask = part(package, "kernels.mask").make_mask(layout, layout)
    q, dout = torch.randn(2, 1, TOKENS, HEADS, 64).bfloat16()
    k, v = torch.randn(2, 1, TOKENS, KV_HEADS, 64).bfloat16()
    running, into = attention.no_result(q), tuple(attention.zeros_fp32(x) for x in (q, k, v))
    lse, delta = torch.zeros(2, 1, HEADS, TOKENS)
    calls = {
        "forward": lambda: kernels.forward(q, k, v, mask, 0.125, 0.0, running),
        "backward": lambda: kernels.backward(dout, q, k, v, None, lse, delta, mask, 0.125, 0.0, into),
    }
    for call in calls.values():
        call()  # compiles
    return {name: Pass(call, 1, 1.0) for name, call in calls.items()}


def layers() -> dict[str, Pass]:
    """Return forward and backward of `LAYERS` layers of one rank; attention is replaced by a sum of q, k and v."""
    transformer, mesh, weights, rope, config, parallel = (
        part(HERE, name)
        for name in (
            "model.transformer",
            "parallel.mesh",
            "model.weights",
            "model.rope",
            "model.config",
            "parallel.config",
        )
    )
    be_the_only_rank()
    alone = parallel.ParallelConfig(tokens_per_rank=TOKENS)
    mesh.join(alone, 1)
    shape = config.ModelConfig(
        num_layers=LAYERS, hidden_size=64, num_heads=HEADS, num_kv_heads=HEADS, ffn_hidden_size=128
    )
    blocks = [transformer.TransformerLayer(shape, mesh.megatron_config(alone), number) for number in range(LAYERS)]
    for block in blocks:
        weights.fill_weights(block, shape, 0, torch.device("cpu"), torch.float32)
    table = rope.rope_table(torch.arange(TOKENS), HEAD_DIM, 1e4)
    x = torch.randn(TOKENS, 1, shape.hidden_size).requires_grad_()
    inputs = [x, *(weight for block in blocks for weight in block.parameters())]

    def forward() -> torch.Tensor:
        y = x
        for block in blocks:
            y = block(y, table, lambda q, k, v, window: q + k + v)
        return y

    result = forward()
    backward = partial(torch.autograd.grad, result, inputs, torch.ones_like(result), retain_graph=True)
    return {"forward": Pass(forward, LAYERS, 1.0), "backward": Pass(backward, LAYERS, 1.0)}


def timed(members: dict[str, Pass], budget_s: float) -> dict[str, float]:
    """Return by package the least ms of its pass on one rank or of one layer; the packages take turns."""
    seconds: dict[str, list[float]] = {package: [] for package in members}
    until = time.perf_counter() + budget_s
    while time.perf_counter() < until or not seconds[HERE]:
        for package, one in members.items():
            started = time.thread_time()
            one.run()
            seconds[package].append((time.thread_time() - started) / one.number)
    return {package: 1e3 * min(found) for package, found in seconds.items()}


class Beside(NamedTuple):
    """Passes of a rank, and a plan made beside them, under one checkout."""

    step: Callable[[], object]
    make_plan: Callable[[], object]


def beside(package: str, member: str, size: int) -> Beside:
    """Return `LAYERS` layers of one rank forward and backward, and the making of a plan for random documents."""
    execute, grid = part(package, "parallel.cp.execute"), part(package, "parallel.cp.grid").NAMED[member](size)
    layout, zigzag = part(package, "kernels.layout").SeqLayout, part(package, "parallel.cp.layout").zigzag
    visibility, draw = part(package, "parallel.cp.visible").Visibility(), random.Random(0)
    shares = [zigzag(PACKED_TOKENS * size, rank, size).runs for rank in range(size)]
    of_passes = passes(package, member, size)
    layers = [one for one in of_passes.values() for _ in range(round(LAYERS / one.number))]

    def make_plan() -> None:
        num_documents = PACKED_TOKENS * size // DOCUMENT_TOKENS
        starts = (0, *sorted(draw.sample(range(1, PACKED_TOKENS * size), num_documents - 1)))
        execute.AttentionSpec(grid, tuple(layout(runs, starts) for runs in shares), visibility).prepare(size // 2)

    return Beside(lambda: [one.run() for one in layers], make_plan)


def beside_row(member: str, size: int, packages: Sequence[str], budget_s: float) -> Row:
    """Return the median ms of a step alone, of a plan alone, and of a step while a plan is made, by package."""
    # Older code made plans in the first layer of a step.
    able = [name for name in packages if hasattr(part(name, "parallel.cp.execute").AttentionSpec, "prepare")]
    found = {package: beside(package, member, size) for package in able}
    seconds: dict[tuple[str, str], list[float]] = {}

    def timed(name: str, package: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds.setdefault((name, package), []).append(time.perf_counter() - started)

    until = time.perf_counter() + budget_s
    with ThreadPoolExecutor(1) as loader:
        while time.perf_counter() < until or not seconds:
            for package, (step, make_plan) in found.items():
                timed("plan", package, make_plan)
                timed("step", package, step)
                plan = loader.submit(make_plan)
                timed("both", package, step)
                plan.result()
    names = {HERE: "", THERE: "_there"}
    medians = {f"{name}_ms{names[package]}": 1e3 * median(of) for (name, package), of in seconds.items()}
    return {"what": member, "ranks": size, "layers": LAYERS, **{name: round(ms, 2) for name, ms in medians.items()}}


def row(what: str, size: int, direction: str, members: dict[str, Pass], budget_s: float) -> Row:
    """Return the row of one pass: its time on one rank, and the ratio to the other checkout if there is one."""
    found, tiles = timed(members, budget_s), members[HERE].tiles_a_rank
    of_row: Row = {
        "what": what,
        "ranks": size,
        "pass": direction,
        "tiles": round(tiles, 1),
        "ms": round(found[HERE], 4),
    }
    of_row["us_a_tile"] = round(1e3 * found[HERE] / tiles, 1)
    if THERE in found:
        of_row |= {"ms_there": round(found[THERE], 4), "ratio": round(found[HERE] / found[THERE], 3)}
    return of_row


def all_rows(packages: Sequence[str], size: Size) -> Iterable[Row]:
    """Yield the rows of the executor, then those of a launch and of a layer."""
    questions = {
        "full": (("token_ring", 8), ("grid", 8), ("token_ring", 32), ("grid", 64), ("ring", 8), ("ulysses", 8)),
        "quick": (("token_ring", 8), ("grid", 8)),
        "smallest": (("token_ring", 2),),
    }[size]
    budget_s = {"full": 6.0, "quick": 3.0, "smallest": 0.0}[size]
    for member, ranks in questions:
        by_package = {package: passes(package, member, ranks) for package in packages}
        for direction in ("forward", "backward"):
            yield row(member, ranks, direction, {name: by_package[name][direction] for name in packages}, budget_s)
    with stub_driver("sm_90"):
        by_package = {package: launches(package) for package in packages}
        for direction in ("forward", "backward"):
            yield row("launch", 1, direction, {name: by_package[name][direction] for name in packages}, budget_s / 3)
    for direction, one in layers().items():
        yield row("layer", 1, direction, {HERE: one}, budget_s / 3)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="two grids of 8 ranks and the launches")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of LongRing to compare with")
    options = parser.parse_args()
    packages = [HERE]
    if options.against:
        load(THERE, options.against.resolve())
        packages.append(THERE)
    torch.set_num_threads(1)
    load(HERE, ROOT)
    rows = list(all_rows(packages, options.size))
    columns = ("what", "ranks", "pass", "tiles", "ms", "us a tile", "ms there", "ratio")
    table = make_table("Host time of a pass on one rank", columns, left=("what", "pass"))
    for of_row in rows:
        table.add_row(*map(str, of_row.values()))
    Console().print(table)
    questions = {"full": (("token_ring", 8), ("grid", 8), ("grid", 64)), "quick": (("token_ring", 8),)}
    of_plans = [
        beside_row(member, ranks, packages, 20.0 if options.size == "full" else 5.0)
        for member, ranks in questions.get(options.size, ())
    ]
    if of_plans:
        table = make_table("A plan made by another thread", [name.replace("_", " ") for name in of_plans[0]], ("what",))
        for of_row in of_plans:
            table.add_row(*map(str, of_row.values()))
        Console().print(table)
    write_record(options.json, {"rows": rows, "plans": of_plans})
    return 0


if __name__ == "__main__":
    sys.exit(main())
