"""Times of packed documents under each layout, with messages on a shaped network and tiles as waits.

    python benchmarks/cp_layouts_network.py --json rows.json  # 18 min
    python benchmarks/cp_layouts_network.py --quick           # a minute

Needs root and iproute2. Ranks are hosts of benchmarks/lib/lab_network.py behind one switch, each with a port of
50 Mbit/s. Their messages are real; a tile is a wait as long as a GPU would compute it (lib/scaled_attention.py has the
scale). Documents have lognormal lengths with a mean, or those of Python files; all lengths are multiples of 2 cp. The
grid sends all keys at once (kv = N, direct). A time is the median of repeats, of the slowest rank, forward and backward
of one layer; layouts take turns. `time` is over the waits of the mean rank. `links` is the same with each pass as long
as the longer of these waits and the bytes of the busiest link: a lower bound for any order of these messages.

"all keys gathered": each rank gets the keys and values of all others, whatever is visible, before it computes, and in
the backward gets them again and sends their gradients at the end. "auto" is what `choose_layout.LayoutPricer` takes on
these links.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib import packings
from lib.lab_hosts import LabHosts
from lib.lab_network import Network, unavailable
from lib.scaled_attention import BYTES_PER_S, MBIT_PER_S, SCALE, SHAPE, SPEED, TOKENS, WAITS, let_tiles_wait, links
from lib.script import Row, make_parser, make_table, refuse, write_record
from longring.kernels.layout import SeqLayout
from longring.parallel.cp import choose_layout, cost, schedules, visible
from longring.parallel.cp.grid import CpGrid
from rich.console import Console


def serve() -> int:
    """Be a rank: run the passes that each line of the input asks for, and answer with their seconds."""
    import torch
    import torch.distributed as dist
    from longring.parallel.cp import attention, execute
    from longring.parallel.cp import group as groups

    let_tiles_wait()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    grid = CpGrid(kv=size, kv_route="direct", in_flight=size - 1)
    group = groups.open_group(range(size), [grid])
    print(flush=True)

    def everything(k: torch.Tensor, v: torch.Tensor) -> None:
        """Get the keys and values of all ranks."""
        own = torch.stack([k, v])
        others = [torch.empty_like(own) for _ in range(size)]
        _exchange({r: own for r in range(size) if r != rank}, {r: x for r, x in enumerate(others) if r != rank})

    for line in sys.stdin:
        job = json.loads(line)
        starts, shares = tuple(job["starts"]), [tuple(map(tuple, runs)) for runs in job["shares"]]
        layouts = tuple(SeqLayout(runs, starts) for runs in shares)
        heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
        q, k, v = (torch.randn(1, layouts[rank].num_tokens, n, SHAPE.head_dim, requires_grad=True) for n in heads)
        spec = execute.AttentionSpec(grid, layouts, visible.Visibility())
        spec.prepare(rank)
        dist.barrier()
        started = time.perf_counter()
        if job["gathered"]:
            for direction in ("forward", "backward"):
                everything(k.detach(), v.detach())
                time.sleep(job["pairs"][rank] * WAITS[direction])
            parts = {r: torch.zeros(2, *k.shape) for r in range(size) if r != rank}
            _exchange(parts, {r: torch.empty_like(x) for r, x in parts.items()})
        else:
            out = attention.context_attention(q, k, v, spec, group)
            out.backward(torch.ones_like(out))
        print(time.perf_counter() - started, flush=True)
    return 0


def _exchange(sends: dict[int, Any], receives: dict[int, Any]) -> None:
    import torch.distributed as dist

    operations = [dist.P2POp(dist.irecv, x, peer) for peer, x in receives.items()]
    operations += [dist.P2POp(dist.isend, x, peer) for peer, x in sends.items()]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def least_time(schedule: schedules.Schedule, gathered: bool) -> float:
    """Return the longer of the mean rank's waits and of the bytes of the busiest link, summed over both passes, over
    these waits; `gathered`: every rank gets all keys, and in the backward sends all their gradients as well."""
    work, size = float(schedule.pairs.sum(1).mean()), schedule.grid.size
    found = 0.0
    for direction, waits in WAITS.items():
        if gathered:
            row_bytes = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * SHAPE.itemsize
            carried = (size - 1) * TOKENS * row_bytes * (1 if direction == "forward" else 2)
        else:
            price = cost.play(schedule.turned(direction), links(size), SHAPE, SPEED)
            carried = max(price.bytes_by_link.values(), default=0)
        found += max(work * waits, carried / BYTES_PER_S)
    return found / (work * sum(WAITS.values()))


def rows_of(size: int, lengths: list[int | str], num_packings: int, repeats: int) -> Iterator[Row]:
    """Yield a row for each distribution of lengths and each layout."""
    num_tokens = size * TOKENS
    grid = CpGrid(kv=size, kv_route="direct", in_flight=size - 1)
    layers = (choose_layout.LayersOf(grid, None, 1),)
    pricer = choose_layout.LayoutPricer(num_tokens, layers, SHAPE, links(size), SPEED)
    with Network("switch", size, MBIT_PER_S) as network:
        hosts = LabHosts(network, __file__)
        for of in lengths:
            found: dict[str, list[Row]] = {}
            for seed in range(num_packings):
                if isinstance(of, int):
                    starts = packings.lognormal(of // SCALE, num_tokens, seed, 2 * size)
                else:
                    starts = packings.files(of, num_tokens, seed, 2 * size, SCALE)
                members = packings.layouts(num_tokens, starts, size, size)
                chosen = pricer.choose(starts)
                members["all keys gathered"] = members["zigzag"]
                jobs, works, least = {}, {}, {}
                for name, shares in members.items():
                    layouts = [SeqLayout(runs, starts) for runs in shares]
                    schedule = schedules.Schedule(grid, layouts, visible.Visibility(), "forward")
                    works[name] = schedule.pairs.sum(1)
                    least[name] = least_time(schedule, name == "all keys gathered")
                    jobs[name] = {
                        "starts": starts, "shares": shares, "gathered": name == "all keys gathered",
                        "pairs": works[name].tolist(),
                    }  # fmt: skip
                hosts.answers(jobs["zigzag"])  # the first pass of hosts that have just met is slow
                seconds: dict[str, list[float]] = {name: [] for name in jobs}
                for _ in range(repeats):
                    for name, job in jobs.items():
                        seconds[name].append(max(hosts.answers(job)))
                taken = next(name for name in packings.LAYOUTS if members[name] == chosen)
                for of_layouts in (seconds, works, least):
                    of_layouts["auto"] = of_layouts[taken]
                zigzag = median(seconds["zigzag"])
                for name, of_name in seconds.items():
                    work = works[name]
                    ideal = float(work.mean()) * sum(WAITS.values())
                    row = {
                        "work": work.max() / work.mean(),
                        "ms": 1e3 * median(of_name),
                        "time": median(of_name) / ideal,
                        "links": least[name],
                    }
                    found.setdefault(name, []).append(row | {"over_zigzag": median(of_name) / zigzag})
            for name, rows in found.items():
                values = {key: round(float(mean(row[key] for row in rows)), 3) for key in rows[0]}
                worst = round(max(row["over_zigzag"] for row in rows), 3)
                yield {"ranks": size, "lengths": of, "layout": name, **values, "worst_over_zigzag": worst}


def main() -> int:
    options = make_parser(__doc__ or "", quick="4 ranks, 2 packings each, once: a minute").parse_args()
    if reason := unavailable():
        return refuse(reason)
    visible.GAP //= SCALE  # as in the hosts
    sizes, num_packings, repeats = [4, 8], 3, 3
    lengths: list[int | str] = [2_000, 8_000, 20_000, "stdlib", "site-packages"]
    if options.size != "full":
        sizes, num_packings, repeats = [4], 2, 1
    if options.size == "smallest":
        lengths = [2_000]
        num_packings = 1
    columns = ["ranks", "lengths", "layout", "work", "ms", "time", "links", "over_zigzag", "worst_over_zigzag"]
    console, rows = Console(width=100), []
    table = make_table(f"Packed documents on ports of {MBIT_PER_S} Mbit/s", columns, left=("layout",))
    with console.status("measuring"):
        for size in sizes:
            for row in rows_of(size, lengths, num_packings, repeats):
                rows.append(row)
                table.add_row(*(str(row[column]) for column in columns))
                write_record(options.json, {"rows": rows})
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
