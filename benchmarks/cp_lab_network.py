"""The family of context parallelism on links that are scarce: measured beside simulated, with the bytes on the wire.

    python benchmarks/cp_lab_network.py --json rows.json  # half an hour; needs root, iproute2 and two quiet cores
    python benchmarks/cp_lab_network.py --quick           # 4 ranks, mesh and switch, MHA: about a minute

Ranks are hosts of benchmarks/lib/lab_network.py, joined as mesh, ring or switch by full-duplex links of 50 Mbit/s. Each
holds its zigzag share of one causal sequence, in fp32. A time is the median of repeats, each that of the slowest rank,
in turns over the schedules so that all see the same machine. Simulated times come from `parallel/cp/cost.py`, with the
links' data rate, an assumed latency, and a speed of computation measured at the start. "x ring" is the time over that
of Ring Attention one way round, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from lib.lab_network import PAYLOAD_SHARE, Fabric, Network, Served, from_hosts, unavailable
from longring.parallel.cp import choose, cost, grid, topology
from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
MBIT_PER_S = 50
TOKENS = 512
"""On each rank."""
HEAD_DIM = 64
HEADS = {"MHA": (8, 8), "4:1": (8, 2), "8:1": (8, 1)}
LATENCY_S = 0.5e-3
"""Of a message: gloo's word that a receiver waits, and the data's way, with as many processes as cores or more."""
WITHIN = 0.2
"""Simulated times are to be so near to measured ones."""


def members(size: int) -> dict[str, Any]:
    """The named members over `size` ranks; `hybrid` takes two nodes."""
    named = {name: make(size) for name, make in grid.NAMED.items()}
    return named | {"hybrid": grid.CpGrid.hybrid(2, size // 2)}


def serve() -> int:
    """A rank: does what each line of its input asks for, and answers with seconds a repeat."""
    import torch
    import torch.distributed as dist
    from longring.parallel.cp import attention, execute, layout, visible
    from longring.parallel.cp import group as groups

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = groups.open_group(range(size), [grid.CpGrid(2, 2, 2)])  # every channel
    print(flush=True)

    alone = groups.CpGroup(0, (rank,), {}, 60.0)
    out = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["pass"] == "forward":
            tokens, shapes = job["tokens"], (job["heads"], job["kv_heads"], job["kv_heads"])
            q, k, v = (torch.randn(1, tokens, heads, HEAD_DIM, requires_grad=True) for heads in shapes)
            if job["grid"] is None:  # each rank by itself, all at once: they share cores in every schedule
                spec = execute.AttentionSpec(
                    grid.CpGrid(), (layout.zigzag(tokens, 0, 1),), visible.Visibility(causal=False)
                )
            else:
                layouts = tuple(layout.zigzag(tokens * size, other, size) for other in range(size))
                spec = execute.AttentionSpec(grid.CpGrid.parse(job["grid"]), layouts, visible.Visibility())
        dist.barrier()
        started = time.perf_counter()
        if job["pass"] == "forward":
            out = attention.context_attention(q, k, v, spec, alone if job["grid"] is None else group)
        else:
            out.backward(torch.ones_like(out))
        print(time.perf_counter() - started, flush=True)
    return 0


class Ranks(Served):
    """`serve` on every host, and what it times."""

    def run(self, member: Any, heads: str, tokens: int = TOKENS) -> dict[str, tuple[float, int]]:
        """By pass: seconds of the slowest rank, and bytes on the wire. Without a member each rank computes alone."""
        found = {}
        for direction in ("forward", "backward"):
            before = self.network.sent_bytes()
            job = {"pass": direction, "grid": member and str(member), "tokens": tokens}
            seconds = max(self.answers(job | dict(zip(("heads", "kv_heads"), HEADS[heads], strict=True))))
            found[direction] = (seconds, from_hosts(self.network.sent_bytes() - before))
        return found

    def speed(self, heads: str) -> Any:
        """How fast the ranks compute when all do: a small and a large tile tell rate and constant."""
        seconds = {}
        for tokens in (TOKENS // 4, TOKENS):
            repeats = [self.run(None, heads, tokens) for _ in range(5)]
            seconds[tokens] = {name: median(repeat[name][0] for repeat in repeats) for name in repeats[0]}
        small, large = seconds.values()
        flops = {name: x * HEAD_DIM * HEADS[heads][0] for name, x in (("forward", 4), ("backward", 10))}
        pairs = TOKENS**2 - (TOKENS // 4) ** 2
        rates = {name: flops[name] * pairs / (large[name] - small[name]) for name in flops}
        constant = small["forward"] - flops["forward"] * (TOKENS // 4) ** 2 / rates["forward"]
        return cost.Speed(rates["forward"], rates["backward"], max(0.0, constant))


def rows_of(fabric: Fabric, size: int, heads_of: tuple[str, ...], repeats: int) -> Iterator[Row]:
    """Every member on one network, forward and forward + backward."""
    with Network(fabric, size, MBIT_PER_S) as network:
        ranks = Ranks(network, __file__)
        link = topology.Fabric(fabric, MBIT_PER_S * 1e6 / 8 * PAYLOAD_SHARE, LATENCY_S)
        for heads in heads_of:
            yield from rows_of_heads(ranks, topology.Topology(fabric, size, link), heads, repeats)


def rows_of_heads(ranks: Ranks, joined: Any, heads: str, repeats: int) -> Iterator[Row]:
    """Every member that fits these heads; auto stands for two, since the forward alone may want another."""
    size, shape = joined.ranks_per_node, cost.AttentionShape(*HEADS[heads], HEAD_DIM, itemsize=4)
    speed = ranks.speed(heads)
    questions = {
        passes: choose.Pricer(size * TOKENS, shape, joined, speed, passes=passes)
        for passes in (("forward",), ("forward", "backward"))
    }
    named = {name: member for name, member in members(size).items() if member.unfit(*HEADS[heads]) is None}
    autos = {passes: choose.choose(size, pricer)[0].grid for passes, pricer in questions.items()}
    grids = set(named.values()) | set(autos.values())
    measured: dict[Any, list[dict[str, tuple[float, int]]]] = {member: [] for member in sorted(grids, key=str)}
    for _ in range(repeats):
        for member, found in measured.items():
            found.append(ranks.run(member, heads))

    def seconds(member: Any, passes: tuple[str, ...]) -> float:
        return median(sum(repeat[name][0] for name in passes) for repeat in measured[member])

    for passes, pricer in questions.items():
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
    """(what is wanted, whether it holds, where it is furthest from it)."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["fabric"], row["ranks"], row["heads"], row["direction"]), {})[row["schedule"]] = row

    def bar(name: str, limit: float, values: dict[tuple[Any, ...], float]) -> tuple[str, bool, str]:
        where, worst = max(values.items(), key=lambda item: item[1])
        return f"{name} <= {limit}", worst <= limit, f"{worst:.3f} on {', '.join(map(str, where))}"

    def best(cell: dict[str, Row]) -> float:
        return min(row["measured_ms"] for row in cell.values())

    yield bar(
        "auto over the best named member",
        1.05,
        {
            at: cell["auto"]["measured_ms"] / min(row["measured_ms"] for name, row in cell.items() if name != "auto")
            for at, cell in cells.items()
        },
    )
    mha = {at: cell for at, cell in cells.items() if at[2] == "MHA"}
    for direction, limit in (("forward", 0.85), ("forward + backward", 0.65)):
        token_ring = {
            at: c["token_ring"]["times_ring"] for at, c in mha.items() if (at[0], at[3]) == ("mesh", direction)
        }
        yield bar(f"TokenRing over Ring, mesh, MHA, {direction}", limit, token_ring)
    for fabric, limit in (("mesh", 0.5), ("switch", 0.7)):
        of_best = {at: best(c) / c["ring"]["measured_ms"] for at, c in mha.items() if at[0] == fabric}
        yield bar(f"the best over Ring, {fabric}, MHA", limit, of_best)
    off = {
        (*at, name): abs(row["simulated_ms"] / row["measured_ms"] - 1)
        for at, c in cells.items()
        for name, row in c.items()
    }
    yield bar("simulated off measured", WITHIN, off)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 ranks, mesh and switch, MHA, once: about a minute")
    parser.add_argument("--fabrics", nargs="+", choices=get_args(Fabric), default=get_args(Fabric))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8], metavar="N")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=tuple(HEADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    if reason := unavailable():
        Console(stderr=True).print(f"[bold red]error:[/] {reason}", highlight=False)
        return 2
    if options.quick:
        options.fabrics, options.ranks, options.heads, options.repeats = ["mesh", "switch"], [4], ["MHA"], 1
    console = Console(width=118)
    columns = (
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
        "x ring",
    )
    table = Table(
        title=f"{TOKENS} tokens a rank, fp32, {MBIT_PER_S} Mbit/s links", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(
            column, justify="left" if column in columns[2:6] or column == "fabric" else "right", overflow="fold"
        )
    rows: list[Row] = []
    with console.status("measuring") as status:
        for size in options.ranks:
            for fabric in options.fabrics:
                for row in rows_of(fabric, size, tuple(options.heads), options.repeats):
                    rows.append(row)
                    shown = row | {"bytes": f"{row['bytes'] / 1e6:.1f}"}
                    table.add_row(*map(str, shown.values()))
                    status.update(" ".join(map(str, row.values())))
                    if options.json:
                        about = {"date": datetime.now(UTC).date().isoformat(), "cores": len(os.sched_getaffinity(0))}
                        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    console.print(table)
    for wanted, holds, worst in bars(rows):
        console.print(f"{'[green]yes[/]' if holds else '[red]no [/]'}  {wanted}: at most {worst}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
