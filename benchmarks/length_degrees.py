"""Whole training steps on published mixes of lengths, by what decides the degree of context parallelism.

    python benchmarks/length_degrees.py --json rows.json   # ten minutes
    python benchmarks/length_degrees.py --quick  # 128 GPUs, two minutes

Nothing is measured: a step is that of `longring plan --gpus N --device h100` (launch/fit: products, operators, what is
computed again, ZeRO, update), with attention at the simulated prices of its grids. The mixes are those that the ledgers
of published_mixes.py give, where buckets above 8,192 tokens are stretched until the longest has 131,072 or 1,048,576.
A step has 8,388,608 tokens; a GPU holds 16,384 of them in a micro-batch, or 32,768 where sequences have a million, and
fewer where the step has no more. Every row has the same sequences, four steps of them, and what a token sees is the
same:

- bucket: LongRing. Each micro-batch has one length, on as few ranks as hold it.
- zigzag: one degree for all. Sequences are packed into rows of the longest length, with masks between them, and each
  row lies in zigzag on the ranks that the longest sequence needs.
- balanced: the same with rows divided by work.
- step: the same where replicas wait for each other once a step, as under ZeRO 1 and 2; its messages stay those of 3.
- sorted: rows of a step dealt in the order of their time instead, so that those of one micro-batch are alike.
- alike: the same over all four steps, so that a step has rows that are alike, as a step of LongRing may have.
- solver: groups of several degrees side by side in a micro-batch, the best that an integer program finds for each
  batch (FlexSP's question, arXiv 2412.01523; lib/degree_solver.py).
- bound: every sequence on the degree that takes the fewest seconds of GPUs, no GPU ever waits, and ZeRO sends nothing.

Rows of packed sequences take the better of the grids that `schedule = "auto"` takes for one document and for packings.
Where nothing else is said a micro-batch is as long as its slowest replica, as ZeRO 3 gathers weights for all at once.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
import numpy as np
from lib import ROOT
from lib.degree_solver import Degrees, Unit, best_degrees, least_rank_seconds
from lib.script import Row, make_parser, make_table, write_record
from longring.kernels.layout import SeqLayout
from longring.launch.config import Recipe, load_recipe
from longring.launch.fit.device import Device, named_device
from longring.launch.fit.links import Links, assumed_topology, links_of
from longring.launch.fit.search import Plan, Planner
from longring.launch.fit.time import StepTime, time_of
from longring.launch.flops import visible_pairs
from longring.launch.grids.choice import GridChoice, attention_shape, choose_grids, layer_kinds, pricer
from longring.parallel.cp.choose import PricedGrid, choose
from longring.parallel.cp.cost import Price, play
from longring.parallel.cp.grid import CpGrid, Layout
from longring.parallel.cp.packed import divided, typical_packing
from longring.parallel.cp.plan import PASSES, Pass
from longring.parallel.cp.schedules import Schedule
from longring.parallel.cp.visible import Visibility
from rich.console import Console
from rich.progress import track

LEDGERS = ROOT / "benchmarks" / "results" / "published_mixes_2026-11-22.json"
MIXES = {"ProLong, stage 1": "prolong-64k", "ProLong, stage 2": "prolong-512k", "OLMo 3": "olmo-3-7b-64k"}
"""Recipes by the names of their mixes; ProLong's two have one model."""
SHORT = 8192
"""Longest bucket that is not stretched."""
STEP_TOKENS = 2**23
TOKENS_PER_RANK = {2**17: 2**14, 2**20: 2**15}
"""Most tokens of a GPU by the length of the longest sequence."""
GPUS = (8, 32, 128, 512, 1024)
Waits = Literal["micro_batch", "step", "sorted", "alike"]
"""When replicas wait for each other; in the last two each micro-batch, with rows in the order of their time."""
SPREAD = 4
"""The solver may put a sequence on up to this many times the ranks of its bucket."""


def shares_of(recipe: str, longest: int) -> dict[int, float]:
    """Return the shares of the tokens by bucket that a ledger gives, stretched to `longest` tokens."""
    given: Counter[int] = Counter()
    for row in json.loads(LEDGERS.read_text())["rows"]:
        if row["recipe"] == recipe:
            given[row["bucket"]] += row["given"]
    factor = longest / max(given)
    stretched: Counter[int] = Counter()
    for length, share in given.items():
        stretched[round(length * factor) if length > SHORT else length] += share
    return {length: share for length, share in sorted(stretched.items()) if share}


def sequences_of(shares: Mapping[int, float], num_tokens: int) -> list[int]:
    """Return the lengths of sequences of `num_tokens` in all, longest first; a rest goes to the next shorter bucket."""
    shortest, found, owed = min(shares), [], 0.0
    for length in sorted(shares, reverse=True):
        owed += shares[length] * num_tokens
        count = int(owed // length) if length > shortest else (num_tokens - sum(found)) // length
        found += [length] * count
        owed -= count * length
    assert sum(found) == num_tokens, "all lengths are multiples of the shortest"
    return found


def packed_rows(sequences: Sequence[int], longest: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Return rows of `longest` tokens, each as the lengths of its sequences, in random rows and order.

    No token is left over: longest first, each length divides the one before it and the room of every row.
    """
    rows: list[list[int]] = [[] for _ in range(sum(sequences) // longest)]
    room = dict.fromkeys(range(len(rows)), longest)
    for length, group in groupby(sequences):
        open_rows = [row for row in room if room[row] >= length]
        for _ in group:
            at = rng.randrange(len(open_rows))
            row = open_rows[at]
            rows[row].append(length)
            room[row] -= length
            if room[row] < length:
                open_rows[at] = open_rows[-1]
                open_rows.pop()
    for row in rows:
        rng.shuffle(row)
    rng.shuffle(rows)
    return [tuple(row) for row in rows]


class Passes(NamedTuple):
    """Seconds of a layer's passes."""

    compute: dict[Pass, float]
    """Compute of the busiest rank."""
    exposed: dict[Pass, float]
    """Time beyond that."""

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return sum(self.compute.values()) + sum(self.exposed.values())


@dataclass(frozen=True)
class Case:
    """A mix on a world of GPUs."""

    mix: str
    gpus: int
    longest: int
    num_steps: int = 4
    _prices: dict[tuple[Layout, tuple[int, ...], CpGrid, int | None], Passes] = field(default_factory=dict)

    @property
    def most_tokens(self) -> int:
        """Most tokens of a GPU in a micro-batch."""
        return TOKENS_PER_RANK[self.longest]

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the mix with this world's sizes."""
        tokens = min(self.most_tokens, STEP_TOKENS // self.gpus)
        return load_recipe(
            ROOT / "launch" / "recipes" / f"{MIXES[self.mix]}.toml",
            [
                *(f"data.max_bucket_tokens={self.longest}", f"parallel.tokens_per_rank={tokens}"),
                *(f"train.global_batch_tokens={STEP_TOKENS}", "curriculum.slot_tokens=0", "curriculum.mix=step"),
                "curriculum.shares={}",
            ],
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.recipe.accumulation_steps(self.gpus)

    @cached_property
    def device(self) -> Device:
        """The data sheet's H100."""
        return named_device("h100")

    @cached_property
    def planner(self) -> Planner:
        """The planner of `longring plan --gpus`."""
        topology = assumed_topology("nvswitch" if self.gpus <= 8 else "infiniband", self.gpus, "h100")
        tokens = Counter(length for rows in self.steps for row in rows for length in row)
        return Planner(
            self.recipe,
            self.gpus,
            self.recipe.model.vocab_size,
            self.device,
            topology,
            {length: length * count for length, count in tokens.items()},
        )

    @property
    def links(self) -> Links:
        """The links of the world."""
        return links_of(self.recipe, self.gpus, self.planner.topology)

    @cached_property
    def steps(self) -> list[list[tuple[int, ...]]]:
        """Rows of packed sequences, by step."""
        sequences = sequences_of(shares_of(MIXES[self.mix], self.longest), self.num_steps * STEP_TOKENS)
        rows = packed_rows(sequences, self.longest, random.Random(0))
        return [rows[step :: self.num_steps] for step in range(self.num_steps)]

    @cached_property
    def windows(self) -> tuple[tuple[int | None, int], ...]:
        """Attention windows of the layers, with their number."""
        model = self.recipe.model
        return tuple(Counter(model.attention_window(layer) for layer in range(model.num_layers)).items())

    @cached_property
    def bucket(self) -> Plan:
        """The plan of a step with a degree for each bucket, as a mean over the mix."""
        plan = self.planner.plan(self.recipe, sorted(self.planner.tokens))
        assert self.planner.fits(plan), f"{self}: does not fit"
        return plan

    def packed(self, layout: Layout, waits: Waits = "micro_batch") -> StepTime:
        """Return the time of a step with one degree for all."""
        replicas = self.gpus // self.recipe.max_context_parallel
        slowest: list[dict[int | None, Passes]] = []  # rows for which all replicas wait
        for rows in [list(chain(*self.steps))] if waits == "alike" else self.steps:
            found = [{window: self._row(layout, row, window) for window, _ in self.windows} for row in rows]
            if waits in ("sorted", "alike"):
                found.sort(key=self._seconds)
            if waits == "step":
                slowest += max(
                    (found[at::replicas] for at in range(replicas)), key=lambda of: sum(map(self._seconds, of))
                )
            else:
                slowest += [max(found[at : at + replicas], key=self._seconds) for at in range(0, len(found), replicas)]
        grids = []
        for kind in layer_kinds(self.recipe, [self.longest]):
            passes: dict[Pass, Price] = {}
            for direction in PASSES:
                compute = mean(row[kind.window].compute[direction] for row in slowest)
                exposed = mean(row[kind.window].exposed[direction] for row in slowest)
                passes[direction] = Price(compute + exposed, compute, {}, 0, 0)
            grids.append(GridChoice(kind, True, PricedGrid(CpGrid(), passes), []))
        return self._time_of(grids)

    def solved(self) -> tuple[list[Degrees], float, float]:
        """Return what the solver finds for each step, the mean of their seconds, and its bound."""
        whole = self.bucket.parts
        each_s = whole["zero"] / self.num_micro_batches
        rest_s = (whole["products"] + whole["operators"] + whole["again"]) * self.gpus / STEP_TOKENS  # of a token
        units = [
            Unit(length, degree, self._sequence_s(length, degree) + rest_s * length / degree, most)
            for length in self.planner.tokens
            for degree in (2**power for power in range(self.gpus.bit_length()))
            if (most := self.most_tokens * degree // length)
            and degree <= SPREAD * self.recipe.parallel.context_parallel(length)
            and length >= 2 * degree
        ]  # fmt: skip
        found, bounds = [], []
        for rows in self.steps:
            counts = Counter(length for row in rows for length in row)
            found.append(best_degrees(units, counts, self.gpus, each_s))
            bounds.append(least_rank_seconds(units, counts) / self.gpus)
        after = whole["update"] + whole["host"]
        return found, mean(of.seconds for of in found) + after, mean(bounds) + after

    def _time_of(self, grids: Sequence[GridChoice]) -> StepTime:
        vocab_size = self.recipe.model.vocab_size
        return time_of(self.recipe, self.gpus, self.longest, vocab_size, self.device, self.links, grids)

    def _seconds(self, row: Mapping[int | None, Passes]) -> float:
        """Return the attention of all layers of a row."""
        return sum(layers * row[window].seconds for window, layers in self.windows)

    def _row(self, layout: Layout, row: tuple[int, ...], window: int | None) -> Passes:
        """Return a layer's attention on a row, on the better of two grids."""
        starts = tuple(np.cumsum((0, *row[:-1])).tolist())
        return min((self._play(layout, starts, grid, window) for grid in self._grids[window]), key=lambda x: x.seconds)

    @cached_property
    def _grids(self) -> dict[int | None, set[CpGrid]]:
        """Grids for one document and for packings, by attention window."""
        degree, found = self.recipe.max_context_parallel, {}
        for kind in layer_kinds(self.recipe, [self.longest]):
            of_one = pricer(self.recipe, kind, self.links.data_ranks, self.device.attention)
            starts = typical_packing(self.longest, self.recipe.parallel.tokens_per_rank)
            both = (of_one, replace(of_one, document_starts=starts))
            found[kind.window] = {choose(degree, asked)[0].grid for asked in both}
        return found

    def _play(self, layout: Layout, starts: tuple[int, ...], grid: CpGrid, window: int | None) -> Passes:
        key = layout, starts, grid, window
        if key not in self._prices:
            shares = divided(layout, self.longest, starts, grid.size, self.windows)
            layouts = [SeqLayout(runs, starts) for runs in shares]
            schedule = Schedule(grid, layouts, Visibility(window=window), "forward")
            shape, topology = attention_shape(self.recipe), self.links.data_ranks
            prices: dict[Pass, Price] = {
                direction: play(schedule.turned(direction), topology, shape, self.device.attention)
                for direction in PASSES
            }
            self._prices[key] = Passes(
                {direction: price.compute_s for direction, price in prices.items()},
                {direction: price.exposed_s for direction, price in prices.items()},
            )
        return self._prices[key]

    def _sequence_s(self, length: int, degree: int) -> float:
        """Return the attention of all layers of a sequence on some ranks."""
        speed, shape = self.device.attention, attention_shape(self.recipe)
        if degree == 1:  # several sequences are one tile
            of_a_rank = replace(speed, tile_s=0.0)
            pairs = sum(layers * visible_pairs(np.array([length], float), window) for window, layers in self.windows)
            all_pairs = np.asarray(pairs).astype(np.int64)
            return sum(float(of_a_rank.seconds(all_pairs, shape, CpGrid(), direction)[0]) for direction in PASSES)
        parallel = replace(self.recipe.parallel, tokens_per_rank=length // degree)
        choices = choose_grids(replace(self.recipe, parallel=parallel), [length], self.links.data_ranks, speed)
        taken = {choice.kind.window: choice.taken.seconds for choice in choices}
        return sum(layers * taken[window] for window, layers in self.windows)


def cases(gpus: Sequence[int], lengths: Sequence[int]) -> Iterator[Case]:
    """Yield the cases whose GPUs hold the longest sequence."""
    for longest in lengths:
        for mix in MIXES:
            for count in gpus:
                if count * TOKENS_PER_RANK[longest] >= longest:
                    yield Case(mix, count, longest)


def row_of(case: Case) -> Row:
    """Return the row of a case."""
    degrees, solver, bound = case.solved()
    seconds = {
        "bucket": case.bucket.seconds,
        "zigzag": case.packed("zigzag").total,
        "balanced": case.packed("balanced").total,
        "step": case.packed("balanced", "step").total,
        "sorted": case.packed("balanced", "sorted").total,
        "alike": case.packed("balanced", "alike").total,
        "solver": solver,
        "bound": bound,
    }
    parts = case.bucket.parts
    return {
        "mix": case.mix,
        "longest": case.longest,
        "gpus": case.gpus,
        "tokens_per_rank": case.recipe.parallel.tokens_per_rank,
        "one_degree": case.recipe.max_context_parallel,
        "micro_batches": case.num_micro_batches,
        "step_s": {name: round(value, 4) for name, value in seconds.items()},
        "tokens_per_s": {name: round(STEP_TOKENS / value) for name, value in seconds.items()},
        "over_bucket": {name: round(value / seconds["bucket"], 4) for name, value in seconds.items()},
        "attention_share": round((parts["attention"] + parts["ring"]) / seconds["bucket"], 4),
        "solver_degrees": round(mean(of.num_degrees for of in degrees), 2),
        "solver_gap": round(max(of.gap for of in degrees), 4),
        "grids": {f"{window}": sorted(map(str, grids)) for window, grids in case._grids.items()},
    }


def main() -> int:
    parser = make_parser(__doc__ or "", quick="up to 128 GPUs and 131,072 tokens: two minutes")
    parser.add_argument("--longest", type=int, choices=TOKENS_PER_RANK, help="sequences of up to this length alone")
    options = parser.parse_args()
    gpus, lengths = {
        "full": (GPUS, tuple(TOKENS_PER_RANK)),
        "quick": (GPUS[:3], (2**17,)),
        "smallest": (GPUS[:1], (2**17,)),
    }[options.size]
    found = list(cases(gpus, (options.longest,) if options.longest else lengths))
    if options.size == "smallest":
        found = [replace(found[0], num_steps=1)]
    console, rows = Console(width=118), []
    names = ("zigzag", "balanced", "step", "sorted", "alike", "solver", "bound")
    columns = ("mix", "longest", "GPUs", "T", "degree", "tokens/s", *names)
    table = make_table("Tokens/s with a degree for each bucket; time of the others over its", columns, left=("mix",))
    for case in track(found, "simulating", console=console):
        row = row_of(case)
        rows.append(row)
        sizes = (row["longest"], row["gpus"], row["tokens_per_rank"], row["one_degree"], row["tokens_per_s"]["bucket"])
        table.add_row(row["mix"], *(f"{n:,}" for n in sizes), *(f"{row['over_bucket'][name]:.2f}" for name in names))
        write_record(options.json, {"rows": rows})
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
