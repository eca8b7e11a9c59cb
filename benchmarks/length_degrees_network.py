"""A layer's step on published mixes of lengths, with a degree for each bucket and with one for all, on real messages.

    python benchmarks/length_degrees_network.py --json rows.json   # 15 minutes
    python benchmarks/length_degrees_network.py --quick  # two minutes

Needs root and iproute2. 8 ranks are hosts of benchmarks/lib/lab_network.py behind one switch, each with a port of
50 Mbit/s; a tile is a wait as long as a GPU would compute it, scaled down from H100s with ports of 50 GB/s by
lib/scaled_attention.py. The mixes are those of length_degrees.py, with a longest sequence that fills all 8 ranks at
8,192 tokens each, or 4 of them, which makes two replicas; a step has 8 micro-batches of 65,536 tokens. Members, which
take turns micro-batch by micro-batch:

- bucket: LongRing. A micro-batch has one length, on 1, 2, 4 or 8 adjacent ranks.
- zigzag: the same sequences packed into rows of the longest length with masks between them, in random order; each row
  in zigzag on all ranks of a replica.
- balanced: the same with rows divided by work.
- sorted: the rows of balanced, those of like time in one micro-batch; with two replicas alone.

All 8 ranks wait for the slowest. Each member takes the grid that `schedule = "auto"` takes on these links, for one
document or for packings. A time is the sum over the micro-batches of the slowest rank's, forward and backward, the
median of repeats. To attention are added the other products and operators of a layer on an H100 by launch/fit, with the
same scale: they are equal for all members. `simulated` is the same by parallel/cp/cost.py. Messages of ZeRO are left
out.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import numpy as np
from lib.lab_hosts import LabHosts
from lib.lab_network import Network, unavailable
from lib.scaled_attention import MBIT_PER_S, SCALE, SHAPE, SLOWER, SPEED, TOKENS, let_tiles_wait, links
from lib.script import Row, make_parser, make_table, refuse, write_record
from longring.kernels.layout import SeqLayout
from longring.parallel.cp.choose import Pricer, choose
from longring.parallel.cp.cost import play
from longring.parallel.cp.grid import CpGrid, Layout
from longring.parallel.cp.packed import divided, typical_packing
from longring.parallel.cp.plan import PASSES
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.visible import Visibility
from rich.console import Console

SIZE = 8
MICRO_BATCH = SIZE * TOKENS
"""Tokens of a micro-batch on this network."""


def serve() -> int:
    """Be a rank: run the passes that each line of the input has for its group, and answer with their seconds."""
    import torch
    import torch.distributed as dist
    from longring.parallel.cp import attention, execute
    from longring.parallel.cp import group as groups

    let_tiles_wait()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    opened = {1: groups.CpGroup(0, (rank,), {})}
    for degree, grids in json.loads(sys.argv[2]).items():
        size = int(degree)
        first = rank // size * size
        opened[size] = groups.open_group(range(first, first + size), [CpGrid.parse(grid) for grid in grids])
    print(flush=True)

    for line in sys.stdin:
        jobs = json.loads(line)["jobs"]
        job = jobs[rank * len(jobs) // SIZE]
        starts, shares = tuple(job["starts"]), [tuple(map(tuple, runs)) for runs in job["shares"]]
        layouts = tuple(SeqLayout(runs, starts) for runs in shares)
        size = len(layouts)
        heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
        q, k, v = (torch.randn(1, TOKENS, n, SHAPE.head_dim, requires_grad=True) for n in heads)
        spec = execute.AttentionSpec(CpGrid.parse(job["grid"]), layouts, Visibility())
        spec.prepare(rank % size)
        dist.barrier()
        started = time.perf_counter()
        out = attention.context_attention(q, k, v, spec, opened[size])
        out.backward(torch.ones_like(out))
        print(time.perf_counter() - started, flush=True)
    return 0


class Context(NamedTuple):
    """Tokens that a group of adjacent ranks shares in a micro-batch."""

    grid: CpGrid
    starts: tuple[int, ...]
    """Positions at which documents begin in the group's tokens."""
    layout: Layout

    def layouts(self) -> list[SeqLayout]:
        """Return the layout of each rank of the group."""
        num_tokens = self.grid.size * TOKENS
        if self.grid.size == 1:
            return [SeqLayout(((0, num_tokens),), self.starts)]
        shares = divided(self.layout, num_tokens, self.starts, self.grid.size)
        return [SeqLayout(runs, self.starts) for runs in shares]

    def job(self) -> dict[str, Any]:
        """Return the job of the group's hosts."""
        return {"grid": str(self.grid), "starts": self.starts, "shares": [of.runs for of in self.layouts()]}

    def simulated_s(self) -> float:
        """Return the simulated seconds of both passes."""
        schedule = Schedule(self.grid, self.layouts(), Visibility(), "forward")
        joined = links(self.grid.size)
        return sum(play(schedule.turned(direction), joined, SHAPE, SPEED).seconds for direction in PASSES)


MicroBatch = Sequence[Context]
"""The contexts of a micro-batch: one for each replica, or one that every group of ranks has."""


def job_of(micro_batch: MicroBatch) -> dict[str, Any]:
    """Return the job of all hosts."""
    return {"jobs": [context.job() for context in micro_batch]}


def simulated_s(micro_batches: Sequence[MicroBatch]) -> float:
    """Return the simulated seconds of micro-batches, each of which waits for its slowest context."""
    return sum(max(context.simulated_s() for context in one) for one in micro_batches)


def grid_of(degree: int, starts: tuple[int, ...]) -> CpGrid:
    """Return the grid that `auto` takes on these links."""
    if degree == 1:
        return CpGrid()
    asked = Pricer(degree * TOKENS, SHAPE, links(degree), SPEED, document_starts=starts)
    return choose(degree, asked)[0].grid


def members_of(mix: str, replicas: int, num_micro_batches: int) -> dict[str, list[MicroBatch]]:
    """Return the micro-batches of each member: the same sequences, of which the longest fills a replica."""
    from length_degrees import MIXES, packed_rows, sequences_of, shares_of  # imported late: hosts need no recipes

    longest = MICRO_BATCH // replicas
    shares = shares_of(MIXES[mix], longest * SCALE)
    sequences = [length // SCALE for length in sequences_of(shares, num_micro_batches * MICRO_BATCH * SCALE)]
    # Whole micro-batches of a bucket: what is left of it becomes sequences of the next shorter one.
    buckets, owed = Counter[int](), 0
    tokens = Counter({length: length * count for length, count in Counter(sequences).items()})
    for length in sorted(tokens, reverse=True):
        owed += tokens[length]
        buckets[length], owed = owed // MICRO_BATCH, owed % MICRO_BATCH
    whole = [length for length, count in buckets.items() for _ in range(count * MICRO_BATCH // length)]
    found: dict[str, list[MicroBatch]] = {"bucket": []}
    for length, count in buckets.items():
        degree = max(1, length // TOKENS)
        starts = tuple(range(0, degree * TOKENS, length))
        found["bucket"] += [[Context(grid_of(degree, (0,)), starts, "zigzag")]] * count
    degree = SIZE // replicas
    of_one, of_many = (grid_of(degree, starts) for starts in ((0,), typical_packing(longest, TOKENS)))
    rows: dict[Layout, list[Context]] = {"zigzag": [], "balanced": []}
    for row in packed_rows(whole, longest, random.Random(0)):
        starts = tuple(np.cumsum((0, *row[:-1])).tolist())
        for layout, contexts in rows.items():
            both = (Context(grid, starts, layout) for grid in (of_one, of_many))
            contexts.append(min(both, key=Context.simulated_s))
    ordered: dict[str, list[Context]] = {**rows}
    if replicas > 1:
        ordered["sorted"] = sorted(rows["balanced"], key=Context.simulated_s)
    for name, contexts in ordered.items():
        found[name] = [contexts[first : first + replicas] for first in range(0, len(contexts), replicas)]
    return found


def rest_s() -> float:
    """Return the seconds of a layer's other products and operators in a micro-batch, on this network's scale."""
    from length_degrees import Case  # imported late: hosts need no recipes

    case = Case("ProLong, stage 1", SIZE, 2**17)
    parts = case.bucket.parts
    seconds = (parts["products"] + parts["operators"] + parts["again"]) / case.num_micro_batches
    tokens = case.recipe.parallel.tokens_per_rank
    return seconds / case.recipe.model.num_layers * (TOKENS * SCALE / tokens) * SLOWER / SCALE


def rows_of(mix: str, replicas: int, num_micro_batches: int, repeats: int) -> Iterator[Row]:
    """Yield a row for each member."""
    members = members_of(mix, replicas, num_micro_batches)
    grids = {context.grid for of in members.values() for one in of for context in one if context.grid.size > 1}
    degrees: dict[int, list[str]] = {}
    for grid in sorted(grids, key=str):
        degrees.setdefault(grid.size, []).append(str(grid))
    seconds: dict[str, list[float]] = {name: [0.0] * repeats for name in members}
    with Network("switch", SIZE, MBIT_PER_S) as network:
        hosts = LabHosts(network, __file__, json.dumps(degrees))
        for of in members.values():
            # The first pass of hosts that have just met is slow.
            for micro_batch in {tuple(context.grid for context in one): one for one in of}.values():
                hosts.answers(job_of(micro_batch))
        for repeat in range(repeats):
            for turn in zip(*members.values(), strict=True):
                for name, micro_batch in zip(members, turn, strict=True):
                    seconds[name][repeat] += max(hosts.answers(job_of(micro_batch)))
    rest = num_micro_batches * rest_s()
    simulated = {name: simulated_s(of) for name, of in members.items()}
    for name, of in members.items():
        measured = median(seconds[name])
        yield {
            "mix": mix,
            "replicas": replicas,
            "member": name,
            "degrees": sorted(Counter(one[0].grid.size for one in of).items()),
            "grids": sorted({str(context.grid) for one in of for context in one}),
            "attention_s": round(measured, 3),
            "attention_over_bucket": round(measured / median(seconds["bucket"]), 3),
            "simulated_over_bucket": round(simulated[name] / simulated["bucket"], 3),
            "simulated_over_measured": round(simulated[name] / measured, 3),
            "rest_s": round(rest, 3),
            "layer_over_bucket": round((measured + rest) / (median(seconds["bucket"]) + rest), 3),
        }


def main() -> int:
    options = make_parser(__doc__ or "", quick="one mix, once: two minutes").parse_args()
    if reason := unavailable():
        return refuse(reason)
    mixes, all_replicas, num_micro_batches, repeats = {
        "full": (["ProLong, stage 1", "ProLong, stage 2", "OLMo 3"], (2, 1), 8, 3),
        "quick": (["OLMo 3"], (2,), 8, 1),
        "smallest": (["OLMo 3"], (2,), 2, 1),
    }[options.size]
    columns = ["mix", "replicas", "member", "seconds", "over bucket", "simulated", "layer"]
    title = f"Attention of a step over {SIZE} ranks on ports of {MBIT_PER_S} Mbit/s; with the rest of the layer"
    table, rows = make_table(title, columns, left=("mix", "member")), []
    console = Console()
    with console.status("measuring"):
        for mix, replicas in product(mixes, all_replicas):
            for row in rows_of(mix, replicas, num_micro_batches, repeats):
                rows.append(row)
                ratios = [row[f"{of}_over_bucket"] for of in ("attention", "simulated", "layer")]
                names = (row["mix"], f"{replicas}", row["member"])
                table.add_row(*names, f"{row['attention_s']:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
                write_record(options.json, {"rows": rows})
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:2] == ["--serve"] else main())
