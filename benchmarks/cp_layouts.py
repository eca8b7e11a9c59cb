"""Simulated times of packed documents under each layout of context parallelism.

    python benchmarks/cp_layouts.py --json rows.json   # three minutes
    python benchmarks/cp_layouts.py --quick            # 8 ranks: half a minute

Nothing is measured but the time on the host, of a choice and of a rank's plans and masks: plans are played on presets
of fabrics, with tiles at the speed `cost.ASSUMED`, forward and backward of one layer (32 query heads, 8 kv heads, 8,192
tokens a rank). A row is the mean over random packings of one distribution of lengths: lognormal with a mean, or the
Python files of the standard library or of site-packages, whose bytes / 4 stand for tokens. All lengths are multiples of
2 cp.

- work: largest over mean visible pairs of a rank;
- foreign: rows of keys that a rank gets, in units of its own tokens;
- time: simulated time over the compute of the mean rank;
- links: the same with each pass as long as the longer of the mean rank's compute and the bytes of the busiest link: a
  lower bound for any order of these messages;
- times, longest: of each packing, the time, and the work of the longest document over that of a node in the mean.

"each document in 2 cp" cuts every document in zigzag, as Megatron does. "all keys gathered" is zigzag where each rank
first gets the keys and values of all others, whatever is visible, then computes, and in the backward gets them again
and sends their gradients, as OLMo-core and torchtitan do; nothing of it overlaps. "auto" is what
`choose_layout.LayoutPricer` takes. Grids: the ones that `schedule = "auto"` takes for one document and
for packings, and the one that sends all keys at once (kv, direct).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import torch
from lib import packings
from lib.script import Row, make_parser, make_table, write_record
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import choose, choose_layout, cost, packed, schedules, simulate, spec, visible
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.plan import FLOWS, PASSES
from longring.parallel.cp.topology import Topology
from rich.console import Console

SHAPE = cost.AttentionShape(32, 8, 128)
TOKENS = 8192
PRESETS = {8: "nvswitch", 32: "infiniband"}
LENGTHS: dict[str, int | str] = {
    "2,000": 2_000, "8,000": 8_000, "20,000": 20_000, "60,000": 60_000,
    "standard library": "stdlib", "site-packages": "site-packages",
}  # fmt: skip


def packing(lengths: int | str, num_tokens: int, seed: int, size: int) -> tuple[int, ...]:
    """Return the document starts of a random packing."""
    make = packings.lognormal if isinstance(lengths, int) else packings.files
    return make(lengths, num_tokens, seed, 2 * size)  # type: ignore[arg-type]


def play(grid: CpGrid, shares: list[packed.Runs], starts: tuple[int, ...], topology: Topology) -> Row:
    """Return work, foreign rows and simulated time of both passes."""
    layouts = [SeqLayout(runs, starts) for runs in shares]
    forward = schedules.Schedule(grid, layouts, visible.Visibility(), "forward")
    backward = forward.turned("backward")
    work, wires = forward.pairs.sum(1), simulate.wires_of(topology, grid.size)
    rates = dict(zip(wires.names, wires.link_bytes_per_s.tolist(), strict=True))
    seconds, ideal, bound = 0.0, 0.0, 0.0
    for schedule in (forward, backward):
        price = cost.play(schedule, topology, SHAPE, cost.ASSUMED)
        compute = float(cost.ASSUMED.seconds(work.mean(), SHAPE, grid, schedule.direction))
        carried_s = (carried / rates[link] for link, carried in price.bytes_by_link.items())
        seconds, ideal, bound = seconds + price.seconds, ideal + compute, bound + max(compute, *carried_s)
    keys = forward.all_messages.flow == FLOWS.index("keys")
    rows = int(forward.all_messages.num_rows[keys].sum())
    num_tokens = sum(layout.num_tokens for layout in layouts)
    times = {"time": seconds / ideal, "links": bound / ideal}
    return {"work": work.max() / work.mean(), "foreign": rows / num_tokens, **times}


def gathered(grid: CpGrid, shares: list[packed.Runs], starts: tuple[int, ...], topology: Topology) -> Row:
    """Return the same where each rank gets all keys before it computes, and sends all their gradients after it."""
    layouts = [SeqLayout(runs, starts) for runs in shares]
    everything = schedules.Schedule(
        grid, [SeqLayout(runs) for runs in shares], visible.Visibility(causal=False), "forward"
    )
    work = schedules.Schedule(grid, layouts, visible.Visibility(), "forward").pairs.sum(1)
    no_compute = cost.Speed(float("inf"), float("inf"))
    gather = cost.play(everything, topology, SHAPE, no_compute).seconds
    both = cost.play(everything.turned("backward"), topology, SHAPE, no_compute).seconds  # gathers, and sends gradients
    seconds, ideal, bound = gather + both, 0.0, 0.0
    for direction, sent_s in zip(PASSES, (gather, both), strict=True):
        compute = float(cost.ASSUMED.seconds(work.mean(), SHAPE, grid, direction))
        seconds += float(cost.ASSUMED.seconds(work.max(), SHAPE, grid, direction))
        ideal, bound = ideal + compute, bound + max(compute, sent_s)
    times = {"time": seconds / ideal, "links": bound / ideal}
    return {"work": work.max() / work.mean(), "foreign": len(shares) - 1.0, **times}


def rows_of(size: int, lengths: str, num_packings: int) -> Iterator[Row]:
    """Yield a row for each grid and layout: means over packings."""
    topology, num_tokens = Topology.preset(PRESETS[size], size), size * TOKENS
    whole, typical = (0,), packed.typical_packing(num_tokens, TOKENS)
    of_one, of_many = (
        choose.choose(size, choose.Pricer(num_tokens, SHAPE, topology, cost.ASSUMED, document_starts=starts))[0].grid
        for starts in (whole, typical)
    )
    direct = CpGrid(kv=size, kv_route="direct", in_flight=size - 1)
    for name, grid in {"one document": of_one, "packing": of_many, "all keys at once": direct}.items():
        pricer = choose_layout.LayoutPricer(
            num_tokens, (choose_layout.LayersOf(grid, None, 1),), SHAPE, topology, cost.ASSUMED
        )
        found: dict[str, list[Row]] = {}
        longest: list[float] = []
        for seed in range(num_packings):
            starts = packing(LENGTHS[lengths], num_tokens, seed, size)
            pairs = [(b - a) * (b - a + 1) // 2 for a, b in pairwise((*starts, num_tokens))]
            longest.append(round(max(pairs) * size / topology.ranks_per_node / sum(pairs), 3))
            of_layouts = packings.layouts(num_tokens, starts, size, topology.ranks_per_node)
            for layout, shares in of_layouts.items():
                found.setdefault(layout, []).append(play(grid, shares, starts, topology))
            chosen = pricer.choose(starts)
            layout = next(layout for layout in packings.LAYOUTS if of_layouts[layout] == chosen)
            found.setdefault("auto", []).append(found[layout][-1])
            if grid == direct:
                found.setdefault("all keys gathered", []).append(gathered(grid, of_layouts["zigzag"], starts, topology))
        for layout, of in found.items():
            zigzag = found["zigzag"]
            yield {
                "ranks": size, "topology": topology.name, "lengths": lengths, "grid": name, "of": str(grid),
                "layout": layout,
                "work": round(mean(x["work"] for x in of), 3),
                "foreign": round(mean(x["foreign"] for x in of), 2),
                "time": round(mean(x["time"] for x in of), 3),
                "links": round(mean(x["links"] for x in of), 3),
                "over_zigzag": round(mean(x["time"] / z["time"] for x, z in zip(of, zigzag, strict=True)), 3),
                "worst_over_zigzag": round(max(x["time"] / z["time"] for x, z in zip(of, zigzag, strict=True)), 3),
                "times": [round(x["time"], 3) for x in of],
                "longest": longest,
            }  # fmt: skip


def host_rows(cases: dict[int, int], repeats: int) -> Iterator[Row]:
    """Yield what a thread of the loader does for a packing, in milliseconds of one core, by ranks and mean length.

    The fastest of some repeats: the machine may have other work.
    """
    torch.set_num_threads(1)
    for size, mean_tokens in cases.items():
        num_tokens, topology = size * TOKENS, Topology.preset("infiniband", size)
        starts = packings.lognormal(mean_tokens, num_tokens, 0)
        for grid in (CpGrid(kv=size, kv_route="direct", in_flight=size - 1), CpGrid.ring(size), CpGrid.square(size)):
            layers = (choose_layout.LayersOf(grid, None, 1),)
            pricer = choose_layout.LayoutPricer(num_tokens, layers, SHAPE, topology, cost.ASSUMED)
            pricer.choose(starts)  # the template of the grid is kept
            found: list[tuple[float, float, float]] = []
            for _ in range(repeats):
                times = [time.process_time()]
                shares = pricer.choose(starts)
                times.append(time.process_time())
                attention = spec.AttentionSpec(
                    grid, tuple(SeqLayout(runs, starts) for runs in shares), visible.Visibility()
                )
                attention.compiled("forward", size // 2)  # makes both passes
                times.append(time.process_time())
                attention.prepare(size // 2)
                times.append(time.process_time())
                found.append(tuple(1e3 * (b - a) for a, b in pairwise(times)))  # type: ignore[arg-type]
            row: Row = {"ranks": size, "documents": len(starts), "of": str(grid)}
            best = (min(of) for of in zip(*found, strict=True))
            yield row | dict(zip(("choice_ms", "plan_ms", "masks_ms"), (round(x, 2) for x in best), strict=True))


def main() -> int:
    options = make_parser(__doc__ or "", quick="8 ranks, 2 packings each: half a minute").parse_args()
    sizes, num_packings, lengths = [8, 32], 8, list(LENGTHS)
    if options.size != "full":
        sizes, num_packings = [8], 2
    if options.size == "smallest":
        lengths, num_packings = ["2,000"], 1
    columns = [
        "ranks",
        "lengths",
        "grid",
        "layout",
        "work",
        "foreign",
        "time",
        "links",
        "over_zigzag",
        "worst_over_zigzag",
    ]
    console, rows = Console(width=118), []
    table = make_table("Layouts of packed documents, simulated", columns, left=("lengths", "grid", "layout"))
    with console.status("simulating"):
        for size in sizes:
            for name in lengths:
                for row in rows_of(size, name, num_packings):
                    rows.append(row)
                    table.add_row(*(str(row[column]) for column in columns))
    console.print(table)
    cases = {32: 2_000, 256: 2_000} if options.size == "full" else {8: 2_000}
    repeats = 20 if options.size == "full" else 1
    host = [*host_rows({32: 262}, repeats), *host_rows(cases, repeats)]
    columns = ["ranks", "documents", "of", "choice_ms", "plan_ms", "masks_ms"]
    table = make_table("A packing in a thread of the loader", columns, left=("of",))
    for row in host:
        table.add_row(*(str(row[column]) for column in columns))
    console.print(table)
    write_record(options.json, {"rows": rows, "host": host})
    return 0


if __name__ == "__main__":
    sys.exit(main())
