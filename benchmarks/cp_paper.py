"""Simulated cost of each grid of context parallelism on 8 to 1,024 GPUs.

    python benchmarks/cp_paper.py --json rows.json   # a quarter of an hour
    python benchmarks/cp_paper.py --quick            # up to 64 GPUs: a minute

Nothing is measured: plans are played on presets of fabrics, with tiles at the speed `cost.ASSUMED`. A row is the
attention of one layer, forward and backward, of one sequence over all GPUs: one document in zigzag layout. Exposed
communication is the total time minus the compute. `auto` is the grid that `choose` takes. Members that the heads do not
allow have no row.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.cp_pictures import Rows, draw_exposed, draw_winners, named, select, short
from lib.script import Row, make_parser, make_table, write_record
from longring.parallel.cp import choose as choosing
from longring.parallel.cp import cost as costs
from longring.parallel.cp import schedules, visible
from longring.parallel.cp import topology as topologies
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.layout import zigzag
from longring.parallel.cp.plan import Pass
from rich.console import Console
from rich.progress import track
from rich.table import Table

PASSES: tuple[Pass, ...] = ("forward", "backward")
PER_NODE = 8
MODELS = {
    "8B (32/8 heads)": costs.AttentionShape(32, 8, 128),
    "70B (64/8 heads)": costs.AttentionShape(64, 8, 128),
    "MHA (32/32 heads)": costs.AttentionShape(32, 32, 128),
}
MESH_NODE = topologies.full_mesh().inside
FABRICS = {
    "NVSwitch, InfiniBand": topologies.infiniband,
    "NVSwitch, shared Ethernet": topologies.ethernet,
    "mesh, InfiniBand": lambda n: topologies.Topology("mesh", PER_NODE, MESH_NODE, topologies.infiniband(n).across),
}
MEMBERS = {
    "ring": CpGrid.ring,
    "ring both ways": CpGrid.ring_both_ways,
    "token_ring": CpGrid.token_ring,
    "ulysses": CpGrid.ulysses,
    "hybrid": lambda n: CpGrid.hybrid(n // PER_NODE, PER_NODE),
    "square grid": CpGrid.square,
}


def rows_of(num_gpus: int, num_tokens: int) -> Iterator[Row]:
    """Yield the rows of all models, fabrics and members; a plan is made once and played on all."""
    layouts = [zigzag(num_tokens, rank, num_gpus) for rank in range(num_gpus)]
    cells = list(product(MODELS.items(), [(name, fabric(num_gpus)) for name, fabric in FABRICS.items()]))
    visibility = visible.Visibility()
    for member, of_size in MEMBERS.items():
        grid = of_size(num_gpus)
        fit = [cell for cell in cells if grid.unfit(cell[0][1].num_heads, cell[0][1].num_kv_heads) is None]
        prices: dict[tuple[str, str], dict[Pass, costs.Price]] = {}
        for direction in PASSES if fit else ():
            schedule = schedules.Schedule(grid, layouts, visibility, direction)
            for (model, shape), (name, topology) in fit:
                price = costs.play(schedule, topology, shape, costs.ASSUMED)
                prices.setdefault((model, name), {})[direction] = price
        for (model, name), passes in prices.items():
            yield row_of(num_gpus, num_tokens, model, name, member, choosing.PricedGrid(grid, passes))
    for (model, shape), (name, topology) in cells:
        pricer = choosing.Pricer(num_tokens, shape, topology, costs.ASSUMED)
        yield row_of(num_gpus, num_tokens, model, name, "auto", choosing.choose(num_gpus, pricer)[0])


def row_of(num_gpus: int, num_tokens: int, model: str, fabric: str, member: str, priced: choosing.PricedGrid) -> Row:
    """Return one row of the record."""
    return {
        "gpus": num_gpus,
        "tokens": num_tokens,
        "model": model,
        "fabric": fabric,
        "member": member,
        "grid": str(priced.grid),
        "ms": priced.seconds * 1e3,
        "forward_ms": priced.passes["forward"].seconds * 1e3,
        "exposed_ms": priced.exposed_s * 1e3,
        "held_gib": priced.peak_bytes / 2**30,
        "mb_sent_per_gpu": sum(price.sent_bytes for price in priced.passes.values()) / num_gpus / 1e6,
    }


def table(rows: Rows, fabric: str) -> Table:
    """Return the table of times as multiples of the least compute of a member, which is that of the largest tiles."""
    columns = ["model", "tokens", "GPUs", "ring", "both", "token", "ulysses", "hybrid", "square", "auto", "h·q·kv"]
    title = f"{fabric}: time / least compute, forward and backward; the last column is auto's grid"
    found = make_table(title, columns, left=("model", "h·q·kv"))
    tokens, gpus = (sorted({row[key] for row in rows}) for key in ("tokens", "gpus"))
    for model, num_tokens, num_gpus in product(MODELS, tokens, gpus):
        cell = select(rows, fabric=fabric, model=model, gpus=num_gpus, tokens=num_tokens)
        compute_ms = min(row["ms"] - row["exposed_ms"] for row in cell)
        times = {row["member"]: row["ms"] / compute_ms for row in cell}
        best = min(times[row["member"]] for row in named(cell))
        texts = [f"{times[name]:.2f}" if name in times else "-" for name in (*MEMBERS, "auto")]
        texts = [f"[bold]{text}[/]" if text == f"{best:.2f}" else text for text in texts]
        grid = CpGrid.parse(select(cell, member="auto")[0]["grid"])
        label = model.split()[0]
        found.add_row(label, short(num_tokens), str(num_gpus), *texts, f"{grid.heads}·{grid.query}·{grid.kv}")
    return found


def bytes_table(num_gpus: int) -> Table:
    """Return the table of bytes that a GPU sends for a layer, in units of its Q, beside closed forms for all pairs."""
    n, tokens = num_gpus, 1024 * num_gpus
    columns = ("member", "query / kv heads", "pass", "closed form", "plan, all pairs", "plan, causal zigzag")
    found = make_table(f"{n} GPUs: bytes that a GPU sends, in units of its Q", columns, left=("member",))
    for member, of_size in MEMBERS.items():
        if member in ("hybrid", "square grid"):
            continue
        for group in (1, 4):
            shape = costs.AttentionShape(32, 32 // group, 128)
            forms = {
                "token_ring": {"forward": 2 * (n - 1), "backward": 3 * (n - 1)},
                "ulysses": dict.fromkeys(("forward", "backward"), (2 + 2 / group) * (n - 1) / n),
            }
            # Both ways round, each dK and dV goes straight home in 16 bit; one way, it grows on its way in fp32.
            ring = {"forward": 2 * (n - 1) / group, "backward": (4 if "both" in member else 6) * (n - 1) / group}
            for direction in PASSES:
                sent = [sent_in_qs(of_size(n), tokens, shape, direction, causal) for causal in (False, True)]
                form = forms.get(member, ring)[direction]
                heads = f"32 / {32 // group}"
                found.add_row(member, heads, direction, f"{form:.2f}", *(f"{num_qs:.2f}" for num_qs in sent))
    return found


def sent_in_qs(grid: CpGrid, num_tokens: int, shape: costs.AttentionShape, direction: Pass, causal: bool) -> float:
    """Return the bytes that a rank sends, the mean of all ranks, in units of its Q in 16 bit."""
    layouts = [zigzag(num_tokens, rank, grid.size) for rank in range(grid.size)]
    schedule = schedules.Schedule(grid, layouts, visible.Visibility(causal=causal), direction)
    plans = schedule.plans()
    sent = sum(shape.bytes_of(m, grid, direction) for plan in plans for step in plan.steps for m in step.sends)
    return sent / num_tokens / (shape.num_heads * shape.head_dim * 2)


def main() -> int:
    parser = make_parser(__doc__ or "", quick="up to 64 GPUs and 2M tokens: a minute")
    parser.add_argument("--gpus", nargs="+", type=int, metavar="N", help="other numbers of GPUs")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="other lengths of the sequence")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write cp_winners.png and cp_exposed.png")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="show an earlier record instead of playing plans")
    parser.add_argument("--bytes", type=int, metavar="GPUS", help="show only the bytes that are sent, and closed forms")
    options = parser.parse_args()
    console = Console()
    if options.bytes:
        console.print(bytes_table(options.bytes))
        return 0
    exponents, gpus = {
        "full": ((17, 19, 21, 24), (8, 16, 32, 64, 128, 256, 1024)),
        "quick": ((17, 19, 21), (8, 16, 32, 64)),
        "smallest": ((12,), (8,)),
    }[options.size]
    gpus, tokens = options.gpus or gpus, options.tokens or [2**exponent for exponent in exponents]
    started = time.monotonic()
    record = json.loads(options.rows.read_text()) if options.rows else []
    rows: Rows = record["rows"] if isinstance(record, dict) else record  # older records are the rows alone
    for num_tokens, num_gpus in () if rows else track(list(product(tokens, gpus)), "playing plans", console=console):
        rows += rows_of(num_gpus, num_tokens)
    for fabric in FABRICS:
        console.print(table(rows, fabric))
    console.print(f"{len(rows):,} rows in {time.monotonic() - started:.0f} s; the speed of tiles is {costs.ASSUMED}")
    write_record(options.json, {"rows": rows})
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_winners(rows, list(FABRICS), list(MODELS), options.pictures / "cp_winners.png")
        draw_exposed(
            rows, min(row["tokens"] for row in rows), list(FABRICS), list(MODELS), options.pictures / "cp_exposed.png"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
