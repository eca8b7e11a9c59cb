"""The family of context parallelism on paper: what every member costs from 8 to 1,024 GPUs, by the simulator.

    python benchmarks/cp_paper.py --json rows.json --pictures docs/pictures     # an estimated ten minutes of one core
    python benchmarks/cp_paper.py --quick                                       # up to 64 GPUs

Nothing is measured: plans are played on presets of fabrics, tiles at `cost.ASSUMED` speed. A row is one layer's
attention, forward and backward, of one sequence over all the GPUs, as one document in zigzag layout; exposed is the
time in which communication is not hidden. `auto` is what `choose` takes. Members that the heads do not allow, and
lengths of fewer than two chunks a rank, have no row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).parent))  # scripts find each other even under PYTHONSAFEPATH
from longring.parallel.cp import choose as choosing
from longring.parallel.cp import cost as costs
from longring.parallel.cp import schedules, visible
from longring.parallel.cp import topology as topologies
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.layout import zigzag
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

Row = dict[str, Any]
Rows = list[Row]

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
COLOURS = dict(zip(MEMBERS, ("#4c72b0", "#64b5cd", "#c44e52", "#55a868", "#8172b2", "#ccb974"), strict=True))
CLOSE = 1.01
"""Members within 1% of the best share a win: where all is hidden, nothing tells them apart."""


def rows_of(num_gpus: int, num_tokens: int) -> Iterator[Row]:
    """All models, fabrics and members. A plan is made once and played on all."""
    layouts = [zigzag(num_tokens, rank, num_gpus) for rank in range(num_gpus)]
    cells = list(product(MODELS.items(), [(name, fabric(num_gpus)) for name, fabric in FABRICS.items()]))
    visibility = visible.Visibility()
    for member, of_size in MEMBERS.items():
        grid = of_size(num_gpus)
        fit = [cell for cell in cells if grid.unfit(cell[0][1].num_heads, cell[0][1].num_kv_heads) is None]
        prices: dict[tuple[str, str], dict[str, Any]] = {}
        for direction in ("forward", "backward") if fit else ():
            schedule = schedules.Schedule(grid, layouts, visibility, direction)
            for (model, shape), (name, topology) in fit:
                price = costs.play(schedule, visibility, topology, shape, costs.ASSUMED)
                prices.setdefault((model, name), {})[direction] = price
        for (model, name), passes in prices.items():
            yield row_of(num_gpus, num_tokens, model, name, member, choosing.PricedGrid(grid, passes))
    for (model, shape), (name, topology) in cells:
        pricer = choosing.Pricer(num_tokens, shape, topology, costs.ASSUMED)
        yield row_of(num_gpus, num_tokens, model, name, "auto", choosing.choose(num_gpus, pricer)[0])


def row_of(num_gpus: int, num_tokens: int, model: str, fabric: str, member: str, priced: Any) -> Row:
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


def of(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def named(rows: Rows) -> Rows:
    return [row for row in rows if row["member"] != "auto"]


def short(num_tokens: int) -> str:
    return f"{num_tokens // 2**20}M" if num_tokens >= 2**20 else f"{num_tokens // 2**10}k"


def winners_picture(rows: Rows, file: Path) -> None:
    """By fabric and model: the best named member by GPUs and tokens, and how far auto is below it."""
    gpus, tokens = (sorted({row[key] for row in rows}) for key in ("gpus", "tokens"))
    figure, panels = plt.subplots(len(FABRICS), len(MODELS), figsize=(15, 10.5), sharex=True, sharey=True)
    order = list(MEMBERS)
    for (fabric, model), panel in zip(product(FABRICS, MODELS), panels.flat, strict=True):
        image = []
        for y, num_tokens in enumerate(tokens):
            image.append([])
            for x, num_gpus in enumerate(gpus):
                cell = of(rows, model=model, fabric=fabric, gpus=num_gpus, tokens=num_tokens)
                ranked = sorted(named(cell), key=lambda row: row["ms"])
                best, [auto] = ranked[0], of(cell, member="auto")
                ties = sum(row["ms"] <= CLOSE * best["ms"] for row in ranked)
                image[y].append(order.index(best["member"]) if ties == 1 else len(order))
                text = f"{best['exposed_ms'] / best['ms']:.0%}\n{auto['exposed_ms'] / auto['ms']:.0%}"
                panel.text(x, y, text, ha="center", va="center", fontsize=8)
        colours = ListedColormap([*COLOURS.values(), "#eeeeee"])
        panel.imshow(image, cmap=colours, vmin=-0.5, vmax=len(order) + 0.5, origin="lower", aspect="auto", alpha=0.75)
        panel.set_xticks(range(len(gpus)), [f"{n:,}" for n in gpus])
        panel.set_yticks(range(len(tokens)), [short(n) for n in tokens])
        panel.set_title(f"{model}, {fabric}", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.75) for colour in (*COLOURS.values(), "#eeeeee")]
    figure.legend(handles, [*order, "several within 1%"], loc="lower center", ncols=7, frameon=False)
    figure.suptitle(
        "The best named member by GPUs (across) and tokens (up), one layer, forward and backward, simulated.\n"
        "In each cell the share of the time that is exposed communication: of that member, and below it of auto."
    )
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.savefig(file, dpi=90)
    plt.close(figure)


def exposed_picture(rows: Rows, num_tokens: int, file: Path) -> None:
    """By fabric and model: exposed share of every member against GPUs."""
    figure, panels = plt.subplots(len(FABRICS), len(MODELS), figsize=(15, 10.5), sharex=True, sharey=True)
    for (fabric, model), panel in zip(product(FABRICS, MODELS), panels.flat, strict=True):
        for member in (*MEMBERS, "auto"):
            line = sorted(
                of(rows, model=model, fabric=fabric, member=member, tokens=num_tokens), key=lambda row: row["gpus"]
            )
            shares = [row["exposed_ms"] / row["ms"] for row in line]
            style = {"color": "black", "linewidth": 2.5} if member == "auto" else {"color": COLOURS[member]}
            panel.plot([row["gpus"] for row in line], shares, marker="o", markersize=3, label=member, **style)
        panel.set_xscale("log", base=2)
        ticks = sorted({row["gpus"] for row in rows})
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
        panel.set_title(f"{model}, {fabric}", fontsize=10)
        panel.grid(alpha=0.3)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=7, frameon=False)
    figure.suptitle(
        f"Share of a layer's time that is exposed communication, {short(num_tokens)} tokens, by GPUs, simulated"
    )
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.savefig(file, dpi=90)
    plt.close(figure)


def table(rows: Rows, fabric: str) -> Table:
    """Times as multiples of the compute alone, which is the same for all members."""
    found = Table(
        title=f"{fabric}: time / compute alone, forward and backward", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("model", "tokens", "GPUs"):
        found.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name in ("ring", "both ways", "token", "ulysses", "hybrid", "square", "auto"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("auto: h·q·kv", no_wrap=True)
    tokens, gpus = (sorted({row[key] for row in rows}) for key in ("tokens", "gpus"))
    for model, num_tokens, num_gpus in product(MODELS, tokens, gpus):
        cell = of(rows, fabric=fabric, model=model, gpus=num_gpus, tokens=num_tokens)
        times = {row["member"]: row["ms"] / (row["ms"] - row["exposed_ms"]) for row in cell}
        best = min(times[row["member"]] for row in named(cell))
        texts = [f"{times[name]:.2f}" if name in times else "-" for name in (*MEMBERS, "auto")]
        texts = [f"[bold]{text}[/]" if text == f"{best:.2f}" else text for text in texts]
        grid = CpGrid.parse(of(cell, member="auto")[0]["grid"])
        label = model.split()[0]
        found.add_row(label, short(num_tokens), str(num_gpus), *texts, f"{grid.heads}·{grid.query}·{grid.kv}")
    return found


def bytes_table(num_gpus: int) -> Table:
    """What plans send, per GPU and layer in blocks of Q, beside closed forms for all pairs and no half blocks."""
    n, tokens = num_gpus, 1024 * num_gpus
    found = Table(title=f"{n} GPUs: blocks of Q that a GPU sends", box=box.SIMPLE_HEAD)
    for name in ("member", "query / kv heads", "pass", "closed form", "plan, all pairs", "plan, causal zigzag"):
        found.add_column(name, justify="left" if name == "member" else "right")
    for member, of_size in MEMBERS.items():
        if member in ("hybrid", "square grid"):
            continue
        for group in (1, 4):
            shape = costs.AttentionShape(32, 32 // group, 128)
            forms = {
                "token_ring": {"forward": 2 * (n - 1), "backward": 3 * (n - 1)},
                "ulysses": dict.fromkeys(("forward", "backward"), (2 + 2 / group) * (n - 1) / n),
            }
            # Both ways round, each dK, dV goes straight home in 16 bit; one way, it grows on its way in 32.
            ring = {"forward": 2 * (n - 1) / group, "backward": (4 if "both" in member else 6) * (n - 1) / group}
            for direction in ("forward", "backward"):
                sent = [sent_blocks(of_size(n), tokens, shape, direction, causal) for causal in (False, True)]
                form = forms.get(member, ring)[direction]
                heads = f"32 / {32 // group}"
                found.add_row(member, heads, direction, f"{form:.2f}", *(f"{blocks:.2f}" for blocks in sent))
    return found


def sent_blocks(grid: Any, num_tokens: int, shape: Any, direction: str, causal: bool) -> float:
    """Mean over ranks of all messages' `AttentionShape.bytes_of`, in 16-bit blocks of a rank's Q."""
    layouts = [zigzag(num_tokens, rank, grid.size) for rank in range(grid.size)]
    schedule = schedules.Schedule(grid, layouts, visible.Visibility(causal=causal), direction)
    plans = schedule.plans()
    sent = sum(shape.bytes_of(m, grid, direction) for plan in plans for step in plan.steps for m in step.sends)
    return sent / num_tokens / (shape.num_heads * shape.head_dim * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 64 GPUs and 2M tokens: a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write cp_winners.png and cp_exposed.png")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="of an earlier --json, instead of playing them again")
    parser.add_argument("--bytes", type=int, metavar="GPUS", help="only what each member sends, beside closed forms")
    options = parser.parse_args()
    if options.bytes:
        Console().print(bytes_table(options.bytes))
        return
    gpus = (8, 16, 32, 64) if options.quick else (8, 16, 32, 64, 128, 256, 1024)
    tokens = [2**exponent for exponent in ((17, 19, 21) if options.quick else (17, 19, 21, 24))]
    console = Console()
    started = time.monotonic()
    rows: Rows = json.loads(options.rows.read_text()) if options.rows else []
    for num_tokens, num_gpus in () if rows else track(list(product(tokens, gpus)), "playing plans", console=console):
        rows += rows_of(num_gpus, num_tokens)
    for fabric in FABRICS:
        console.print(table(rows, fabric))
    console.print(f"{len(rows):,} rows in {time.monotonic() - started:.0f} s; times are of {costs.ASSUMED}, assumed")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        winners_picture(rows, options.pictures / "cp_winners.png")
        exposed_picture(rows, tokens[0], options.pictures / "cp_exposed.png")


if __name__ == "__main__":
    main()
