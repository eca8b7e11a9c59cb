"""Cases, bars and table of the section `step`: a training step of a model of about 1B parameters on one rank.

What runs them is `gpu_step.py`, which needs DeepSpeed; this needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from longring.launch.config import Recipe, load_recipe
from longring.launch.fit.memory import Memory, moments, peak
from longring.launch.fit.search import LEVELS
from longring.launch.flops import ModelFlops
from longring.model.config import MemoryConfig
from rich.console import Console

from .gpu_training import RECIPE
from .script import Row, Size, make_table


class Sizes(NamedTuple):
    """A model, and the buckets on which its step is measured."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tokens: int
    """Least number of tokens of a micro-batch: it has one sequence, or several of a bucket that is shorter."""
    lengths: tuple[int, ...]
    """Buckets that are measured with every level of recomputation."""
    short: tuple[int, ...]
    """Buckets that are measured once: they have the launches of a micro-batch of `tokens`, and less work."""
    micro_batches: int
    """Micro-batches of a whole step, with `tokens` each."""
    packings: int
    """Number of random packings of documents."""


SIZES: dict[Size, Sizes] = {
    "full": Sizes(16, 2048, 16, 8, 6144, 131_072, 8192, (8192, 32_768, 131_072), (1024, 4096), 8, 40),
    "quick": Sizes(4, 1024, 8, 4, 3072, 32_768, 4096, (4096, 16_384), (1024,), 4, 10),
    "smallest": Sizes(2, 64, 4, 2, 192, 512, 64, (64, 128), (32,), 2, 3),
}
TILED = ("keep", "recompute_layer")
"""Levels that are measured with SwiGLU in tiles too, in the second of the buckets."""


class Case(NamedTuple):
    """A micro-batch of one bucket at one level."""

    length: int
    memory: MemoryConfig

    @property
    def kept(self) -> str:
        """The level of recomputation, followed by "in tiles" where SwiGLU is computed in tiles of tokens."""
        return self.memory.activations + (" in tiles" if self.memory.mlp_tile_tokens else "")


class Bar(NamedTuple):
    """A goal for a whole step, by the faster of the attention kernels that were measured."""

    length: int
    mfu: float
    """Least model FLOP utilization."""


BARS = (Bar(8192, 0.5),)


def recipe_of(sizes: Sizes, length: int) -> Recipe:
    """Return the recipe of steps on the bucket of `length` tokens, on one rank."""
    tokens = max(length, sizes.tokens)
    return load_recipe(
        RECIPE,
        [
            *(f"model.num_layers={sizes.layers}", f"model.hidden_size={sizes.hidden}"),
            *(f"model.num_heads={sizes.heads}", f"model.num_kv_heads={sizes.kv_heads}"),
            *(f"model.ffn_hidden_size={sizes.ffn}", "train.dtype=bfloat16"),
            *(f"parallel.tokens_per_rank={tokens}", f"data.max_bucket_tokens={tokens}"),
            *(f"data.min_bucket_tokens={min(sizes.short)}", "data.method=best_fit"),
            f"train.global_batch_tokens={sizes.micro_batches * tokens}",
            # A start's measurement of attention backends takes at most 30 s a minute of it.
            "faults.hang_minutes=3",
        ],
    )


def cases(sizes: Sizes) -> list[Case]:
    """Return the micro-batches to measure: the short buckets, then every level of each bucket, then tiles."""
    levels = [MemoryConfig(activations=level) for level in LEVELS]
    tiled = [MemoryConfig(activations=level, mlp_tile_tokens=sizes.lengths[1] // 4) for level in TILED]
    return [
        *(Case(length, levels[0]) for length in sizes.short),
        *(Case(length, memory) for length in sizes.lengths for memory in levels),
        *(Case(sizes.lengths[1], memory) for memory in tiled),
    ]


def predicted(sizes: Sizes, case: Case, *, on_gpu: bool) -> Memory:
    """Return the memory that `longring plan --gpus` predicts at the peak of forward and backward of a case."""
    recipe = recipe_of(sizes, case.length)
    recipe = replace(recipe, train=replace(recipe.train, memory=case.memory))
    found = moments(recipe, 1, case.length, sizes.vocabulary, on_gpu=on_gpu)
    return peak(moment for moment in found if moment.moment != "update")


def flops_of(sizes: Sizes, length: int) -> tuple[float, float]:
    """Return the FLOPs of forward and backward of a micro-batch: matrix products of weights, and attention."""
    recipe = recipe_of(sizes, length)
    flops = ModelFlops.of(recipe.model, recipe.model.padded_vocab_size(sizes.vocabulary))
    sequences = recipe.parallel.sequences_per_replica(length)
    return flops.matrices(sequences * length), flops.attention([length] * sequences)


def first_levels(rows: Sequence[Row]) -> dict[int, tuple[str, str]]:
    """Return, for each bucket, the first level that fits this device's memory, and the first that is predicted to."""
    found: dict[int, tuple[str, str]] = {}
    of_levels = [row for row in rows if row["part"] == "micro-batch" and row.get("kept") in LEVELS and "fits" in row]
    for length in dict.fromkeys(row["length"] for row in of_levels):
        of_length = [row for row in of_levels if row["length"] == length]
        if len({row["kept"] for row in of_length}) == len(LEVELS):
            fits, expected = (
                [level for level in LEVELS if all(row[key] for row in of_length if row["kept"] == level)]
                for key in ("fits", "predicted_to_fit")
            )
            found[length] = (fits or ["none"])[0], (expected or ["none"])[0]
    return found


def bars(rows: Sequence[Row]) -> list[Row]:
    """Return the bars with their values; None where a row is missing, or the peak of the device is not known."""
    found = []
    for bar in BARS:
        steps = [row for row in rows if row["part"] == "whole step" and row["length"] == bar.length]
        value = max((row["mfu"] for row in steps if "mfu" in row), default=None)
        met = "no row" if value is None else "met" if value >= bar.mfu else "not met"
        found.append(
            {"bar": f"whole step at {bar.length:,} tokens: MFU at least {bar.mfu}", "value": value, "met": met}
        )
    return found


def show(rows: list[Row], console: Console) -> None:
    """Print the steps by bucket and level, which level is the first that fits, the other parts, notes and bars."""
    steps = [row for row in rows if "length" in row]
    columns = ("length", "kept", "ms", "host", "tokens/s", "MFU", "kB/token", "GiB", "plan")
    title = "*: attention not yet measured; host: its ms; GiB: peak; plan: predicted peak"
    table = make_table(title, columns, left=("kept",))
    for row in sorted(steps, key=lambda row: row["length"]):
        kept = row["kept"] if row["part"] == "micro-batch" else f"step, {row['kept']}"
        cells = [f"{row['length']:,}", kept + " *" * (row["attention"] == "auto")]
        if row.get("fits"):
            cells += [f"{row[name]:,.0f}" if row[name] >= 100 else f"{row[name]:.3g}" for name in ("ms", "host_ms")]
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.3f}" if "mfu" in row else ""]
            cells += [f"{row['bytes_a_token'] / 1e3:,.0f}" if "bytes_a_token" in row else ""]
            cells += [f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""]
        else:
            cells += ["no fit" if "fits" in row else "no time", *[""] * 5]
        cells += [f"{row['predicted_bytes'] / 2**30:.1f}" if "predicted_bytes" in row else ""]
        table.add_row(*cells, style="red" if row.get("right") is False else None)
    console.print(table)
    for length, (fits, expected) in first_levels(rows).items():
        console.print(f"{length:,} tokens: first level that fits: {fits}; plan: {expected}", highlight=False)
    for row in rows:
        if "length" not in row:
            ms = f": {row['ms']:,.0f} ms" if row.get("ms") is not None else ""
            style = "red" if row.get("right") is False else None
            console.print(f"{row['part']}{ms}", style=style, markup=False, highlight=False)
    for note in dict.fromkeys(row["note"] for row in rows if row.get("note")):
        console.print(note, markup=False, highlight=False)
    for bar in bars(rows):
        value = "" if bar["value"] is None else f"{bar['value']:.3f} "
        console.print(f"{bar['bar']}: {value}{bar['met']}", highlight=False)
