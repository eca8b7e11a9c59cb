"""Times of the grids of context parallelism on scarce links, beside their simulation.

    python benchmarks/cp_lab_network.py --json rows.json   # 10 minutes
    python benchmarks/cp_lab_network.py --quick            # about a minute

Needs root, iproute2 and two quiet cores. Ranks are hosts of benchmarks/lib/lab_network.py, joined as mesh, ring or
switch by full-duplex links of 50 Mbit/s. Each holds its zigzag share of one causal sequence, in fp32. A time is the
median of repeats, each that of the slowest rank; the grids take turns, so that all meet the same machine. Simulated
times come from parallel/cp/cost.py, with the links' data rate, an assumed latency, and a speed of computation measured
at the start. "x ring" is the time over that of Ring Attention one way round in the same run. Bytes are counted on the
wire.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.lab_hosts import LabHosts
from lib.lab_network import FABRICS, PAYLOAD_SHARE, Fabric, Network, from_hosts, unavailable
from lib.script import Row, make_parser, make_table, refuse, write_record
from longring.parallel.cp import choose, cost, grid, topology
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.plan import Pass
from rich.console import Console

Passes = tuple[Pass, ...]
PASSES: Passes = ("forward", "backward")
MBIT_PER_S = 50
TOKENS = 512
"""Tokens of each rank."""
HEAD_DIM = 64
HEADS = {"MHA": (8, 8), "4:1": (8, 2), "8:1": (8, 1)}
LATENCY_S = 0.5e-3
"""Assumed latency of a message: gloo's word that the receiver waits, and the way of the data, on busy cores."""
WITHIN = 0.2
"""Largest relative difference of simulated and measured times."""


def members(size: int) -> dict[str, CpGrid]:
    """Return the named grids over `size` ranks; `hybrid` takes two nodes."""
    named = {name: make(size) for name, make in grid.NAMED.items()}
    return named | {"hybrid": CpGrid.hybrid(2, size // 2)}


def serve() -> int:
    """Be a rank: run the pass that each line of the input asks for, and answer with its seconds."""
    import torch
    import torch.distributed as dist
    from longring.parallel.cp import attention, execute, layout, visible
    from longring.parallel.cp import group as groups

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = groups.open_group(range(size), grid.grids(size))
    print(flush=True)

    alone = groups.CpGroup(0, (rank,), {})
    backward = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["pass"] == "forward":
            tokens, heads, kv_heads = job["tokens"], job["heads"], job["kv_heads"]
            q, k, v = (torch.randn(1, tokens, n, HEAD_DIM, requires_grad=True) for n in (heads, kv_heads, kv_heads))
            if job["grid"] is None:  # every rank alone, all at once, as they share the cores in every grid
                one, unmasked = (layout.zigzag(tokens, 0, 1),), visible.Visibility(causal=False)
                spec = execute.AttentionSpec(CpGrid(), one, unmasked)
            else:
                layouts = tuple(layout.zigzag(tokens * size, other, size) for other in range(size))
                spec = execute.AttentionSpec(CpGrid.parse(job["grid"]), layouts, visible.Visibility())
            dist.barrier()
            started = time.perf_counter()
            out = attention.context_attention(q, k, v, spec, alone if job["grid"] is None else group)
            backward = partial(out.backward, torch.ones_like(out))
        else:
            assert backward is not None, "a forward comes first"
            dist.barrier()
            started = time.perf_counter()
            backward()
        print(time.perf_counter() - started, flush=True)
    return 0


class Ranks(LabHosts):
    """The ranks of a network, each in `serve`, with `tokens` tokens."""

    def __init__(self, network: Network, tokens: int) -> None:
        super().__init__(network, __file__)
        self.tokens = tokens

    def run(self, member: CpGrid | None, heads: str, tokens: int) -> dict[Pass, tuple[float, int]]:
        """Return by pass the seconds of the slowest rank and the bytes on the wire; without a grid no rank sends."""
        found: dict[Pass, tuple[float, int]] = {}
        for direction in PASSES:
            before = self.network.sent_bytes()
            job = {"pass": direction, "grid": member and str(member), "tokens": tokens}
            seconds = max(self.answers(job | dict(zip(("heads", "kv_heads"), HEADS[heads], strict=True))))
            found[direction] = (seconds, from_hosts(self.network.sent_bytes() - before))
        return found

    def speed(self, heads: str) -> cost.Speed:
        """Return the speed of computation when all ranks compute; a small and a large tile give rate and constant."""
        seconds = {}
        for tokens in (self.tokens // 4, self.tokens):
            repeats = [self.run(None, heads, tokens) for _ in range(5)]
            seconds[tokens] = {name: median(repeat[name][0] for repeat in repeats) for name in PASSES}
        small, large = seconds.values()
        factors: dict[Pass, int] = {"forward": 4, "backward": 10}
        flops = {name: factor * HEAD_DIM * HEADS[heads][0] for name, factor in factors.items()}
        pairs = self.tokens**2 - (self.tokens // 4) ** 2
        rates = {name: flops[name] * pairs / max(1e-6, large[name] - small[name]) for name in PASSES}
        constant = small["forward"] - flops["forward"] * (self.tokens // 4) ** 2 / rates["forward"]
        return cost.Speed(rates["forward"], rates["backward"], max(0.0, constant))


def rows_of(fabric: Fabric, size: int, heads_of: list[str], repeats: int, tokens: int) -> Iterator[Row]:
    """Yield the rows of every grid on one network, forward and forward + backward."""
    with Network(fabric, size, MBIT_PER_S) as network:
        ranks = Ranks(network, tokens)
        link = topology.Fabric(fabric, MBIT_PER_S * 1e6 / 8 * PAYLOAD_SHARE, LATENCY_S)
        for heads in heads_of:
            yield from rows_of_heads(ranks, topology.Topology(fabric, size, link), heads, repeats)


def rows_of_heads(ranks: Ranks, joined: topology.Topology, heads: str, repeats: int) -> Iterator[Row]:
    """Yield the rows of every grid that fits these heads; "auto" is chosen for each direction."""
    size, shape = joined.ranks_per_node, cost.AttentionShape(*HEADS[heads], HEAD_DIM, itemsize=4)
    speed = ranks.speed(heads)
    directions: tuple[Passes, ...] = (("forward",), PASSES)
    pricers = {passes: choose.Pricer(size * ranks.tokens, shape, joined, speed, passes=passes) for passes in directions}
    named = {name: member for name, member in members(size).items() if member.unfit(*HEADS[heads]) is None}
    autos = {passes: choose.choose(size, pricer)[0].grid for passes, pricer in pricers.items()}
    grids = set(named.values()) | set(autos.values())
    measured: dict[CpGrid, list[dict[Pass, tuple[float, int]]]] = {member: [] for member in sorted(grids, key=str)}
    for _ in range(repeats):
        for member, found in measured.items():
            found.append(ranks.run(member, heads, ranks.tokens))

    def seconds(member: CpGrid, passes: Passes) -> float:
        return median(sum(repeat[name][0] for name in passes) for repeat in measured[member])

    for passes, pricer in pricers.items():
        for name, member in (named | {"auto": autos[passes]}).items():
            priced = pricer.price(member)
            yield {
                "fabric": joined.name,
                "ranks": size,
                "heads": heads,
                "direction": " + ".join(passes),
                "schedule": name,
                "grid": str(member),
                "measured_ms": round(1e3 * seconds(member, passes), 1),
                "simulated_ms": round(1e3 * priced.seconds, 1),
                "computing_ms": round(1e3 * sum(price.compute_s for price in priced.passes.values()), 1),
                "bytes": sum(measured[member][-1][name][1] for name in passes),
                "times_ring": round(seconds(member, passes) / seconds(named["ring"], passes), 3),
            }


def bars(rows: list[Row]) -> Iterator[tuple[str, bool, str]]:
    """Yield (goal, whether it is met, the value furthest from it and its cell); goals without a row are left out."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["fabric"], row["ranks"], row["heads"], row["direction"]), {})[row["schedule"]] = row

    def bar(name: str, limit: float, values: dict[tuple[Any, ...], float]) -> Iterator[tuple[str, bool, str]]:
        if values:
            where, worst = max(values.items(), key=lambda item: item[1])
            yield f"{name} <= {limit}", worst <= limit, f"{worst:.3f} on {', '.join(map(str, where))}"

    def best_ms(cell: dict[str, Row], *but: str) -> float:
        return min(row["measured_ms"] for name, row in cell.items() if name not in but)

    over_best = {at: cell["auto"]["measured_ms"] / best_ms(cell, "auto") for at, cell in cells.items()}
    yield from bar("auto over the best named grid", 1.05, over_best)
    mha = {at: cell for at, cell in cells.items() if at[2] == "MHA"}
    for direction, limit in (("forward", 0.85), ("forward + backward", 0.65)):
        here = {at: cell for at, cell in mha.items() if (at[0], at[3]) == ("mesh", direction)}
        token_ring = {at: cell["token_ring"]["times_ring"] for at, cell in here.items()}
        yield from bar(f"TokenRing over Ring, mesh, MHA, {direction}", limit, token_ring)
    for fabric, limit in (("mesh", 0.5), ("switch", 0.7)):
        of_best = {at: best_ms(cell) / cell["ring"]["measured_ms"] for at, cell in mha.items() if at[0] == fabric}
        yield from bar(f"the best over Ring, {fabric}, MHA", limit, of_best)
    off = {
        (*at, name): abs(row["simulated_ms"] / row["measured_ms"] - 1)
        for at, cell in cells.items()
        for name, row in cell.items()
    }
    yield from bar("simulated off measured", WITHIN, off)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="4 ranks, mesh and switch, MHA, once: about a minute")
    parser.add_argument("--fabrics", nargs="+", choices=FABRICS, default=list(FABRICS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8], metavar="N")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each grid (default: 3)")
    options = parser.parse_args()
    if reason := unavailable():
        return refuse(reason)
    fabrics: list[Fabric] = options.fabrics
    tokens = TOKENS
    if options.size != "full":
        fabrics = ["mesh", "switch"]
        options.ranks, options.heads, options.repeats = [4], ["MHA"], 1
    if options.size == "smallest":
        fabrics = ["mesh"]
        tokens = 64
    console = Console(width=118)
    columns = [
        "fabric",
        "ranks",
        "heads",
        "direction",
        "schedule",
        "grid",
        "ms",
        "simulated",
        "computing",
        "MB",
        "x_ring",
    ]
    title = f"{tokens} tokens a rank, fp32, {MBIT_PER_S} Mbit/s links"
    table = make_table(title, columns, left=("fabric", "heads", "pass", "schedule", "grid"))
    rows: list[Row] = []
    with console.status("measuring") as status:
        for size in options.ranks:
            for fabric in fabrics:
                for row in rows_of(fabric, size, options.heads, options.repeats, tokens):
                    rows.append(row)
                    shown = row | {"bytes": f"{row['bytes'] / 1e6:.1f}"}
                    table.add_row(*map(str, shown.values()))
                    status.update(" ".join(map(str, row.values())))
                    write_record(options.json, {"rows": rows})
    console.print(table)
    for goal, met, worst in bars(rows):
        console.print(f"{'[green]yes[/]' if met else '[red]no [/]'}  {goal}: at most {worst}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
