"""Section of a training step on one rank: buckets by length and by what is kept, whole steps, attention kernels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from longring.launch.attention_backends import with_backends
from longring.launch.build import BucketLayout, bucket_layouts, build_engine, compile_kernels
from longring.launch.config import Recipe
from longring.launch.flops import peak_flops
from longring.model.config import MemoryConfig
from longring.parallel.mesh import Mesh, join
from longring.parallel.zero import DeepSpeedEngine, set_learning_rate

from .gpu_kernels import deadline
from .gpu_step_cases import SIZES, Case, Sizes, cases, flops_of, predicted, recipe_of
from .mfu import mfu
from .one_rank import be_the_only_rank
from .script import Row, Size
from .sections import NO_TIME
from .timing import elapsed_ms, moment, synchronize

TIMED = 3
"""Largest number of timed calls, after one that warms up."""
TIMED_S = 3.0
"""Seconds of timed calls after which none is added."""
KEEP = MemoryConfig()


class Ready(NamedTuple):
    """A model on one rank under DeepSpeed, over NCCL on a GPU."""

    sizes: Sizes
    recipes: dict[int, Recipe]
    """Recipe of the steps on each bucket, by length."""
    mesh: Mesh
    engine: DeepSpeedEngine
    layouts: dict[int, BucketLayout]
    attention: str
    """Attention kernels: "auto", those without a measurement, or "fastest"."""

    @property
    def device(self) -> str:
        """Type of the device."""
        return self.mesh.device.type

    @property
    def model(self) -> Any:
        """The model without its engine, a `Transformer`."""
        return self.engine.module

    def tokens(self, length: int) -> int:
        """Return the number of tokens of a micro-batch of sequences of `length`."""
        return self.recipes[length].parallel.tokens_per_rank

    def inputs(self, length: int, document_starts: list[tuple[int, ...]] | None = None) -> tuple[Any, ...]:
        """Return the inputs of a micro-batch of random tokens in sequences of `length`."""
        shape = (self.tokens(length) // length, length + 1)
        rows = np.random.default_rng(0).integers(0, self.sizes.vocabulary, shape)
        return self.layouts[length].model_inputs(rows.astype(np.uint32), document_starts, self.mesh.device)

    def take(self, memory: MemoryConfig) -> None:
        """Let the layers of the model keep, recompute or offload their activations."""
        self.model.memory = memory
        for block in self.model.blocks:
            block.activations, block.mlp.tile_tokens = memory.activations, memory.mlp_tile_tokens

    def both_passes(self, inputs: tuple[Any, ...]) -> None:
        """Run forward and backward of a micro-batch."""
        self.engine.backward(self.engine(*inputs).mean())


def sizes_here(size: Size) -> Sizes:
    """Return the model and the buckets of a size on this machine; on a CPU they are the smallest."""
    return SIZES[size if torch.cuda.is_available() else "smallest"]


def make_ready(sizes: Sizes, lengths: Sequence[int]) -> Ready:
    """Return a model and buckets of these lengths on this process's rank, the only one."""
    be_the_only_rank()
    recipe = recipe_of(sizes, sizes.tokens)
    mesh = join(recipe.parallel, 1)
    engine = build_engine(recipe, sizes.vocabulary, mesh)
    set_learning_rate(engine, 1e-4)
    recipes = {length: recipe_of(sizes, length) for length in lengths}
    return Ready(sizes, recipes, mesh, engine, layouts_of(recipes, mesh), "auto")


def layouts_of(recipes: dict[int, Recipe], mesh: Mesh) -> dict[int, BucketLayout]:
    """Return the layout of each bucket by its own recipe."""
    return {length: bucket_layouts(recipe, mesh, [length], {})[length] for length, recipe in recipes.items()}


def compiled_row(ready: Ready) -> Row:
    """Compile the kernels of all buckets; return the row of the time that it takes."""
    started = time.perf_counter()
    for length, recipe in ready.recipes.items():
        compile_kernels(recipe, ready.mesh, [length])
    synchronize(ready.device)
    return {"part": "kernels compiled before the first step", "ms": 1e3 * (time.perf_counter() - started)}


def step_rows(size: Size) -> Iterator[Row]:
    """Yield whole steps and micro-batches of one rank, by bucket, by what is kept and by attention kernels."""
    started, sizes, until = time.perf_counter(), sizes_here(size), deadline()
    ready = make_ready(sizes, (*sizes.short, *sizes.lengths))
    note = f"{sum(p.numel() for p in ready.model.parameters()):,} parameters"
    if ready.device == "cuda" and peak_flops(name := torch.cuda.get_device_name()) is None:
        note += f"; no MFU, since the peak FLOP/s of {name} are not known here"
    yield {"part": "start of DeepSpeed and the mesh", "ms": 1e3 * (time.perf_counter() - started), "note": note}
    yield compiled_row(ready)
    # First by the kernels that need no measurement: what follows may fail.
    short = Case(sizes.tokens, KEEP)
    ready.both_passes(ready.inputs(short.length))  # buffers that stay
    yield (last := bucket_row(ready, short))
    yield whole_step_row(ready, short)
    fastest, row = with_fastest(ready)
    yield row
    if fastest is not None:
        ready = fastest
        yield whole_step_row(ready, short)
    # A backward that ends for lack of memory may leave the engine in pieces: cases that may not fit come last.
    for case in sorted(cases(sizes), key=lambda case: not predicted_to_fit(ready, case)):
        # A case takes two calls or more, at about the rate of the one before.
        if time.time() + 2 * sum(flops_of(sizes, case.length)) / (1e12 * last.get("TFLOPs", math.inf)) > until:
            yield known(ready, case) | {"note": NO_TIME}
            continue
        yield (row := bucket_row(ready, case))
        last = row if row["fits"] else last


def with_fastest(ready: Ready) -> tuple[Ready | None, Row]:
    """Return the model with the attention kernels that a start measures as fastest, and the row of the measurement.

    The tiles are those of `sizes.lengths` but the longest, which takes minutes. None: the measurement has failed.
    """
    part, started = "attention kernels measured as by a start", time.perf_counter()
    longest = max(ready.sizes.lengths[:-1])
    lengths = [length for length in ready.sizes.lengths if length <= longest]
    try:
        measured = with_backends(ready.recipes[longest], ready.mesh, lengths).train.attention_backend
    except Exception as error:  # a package may fail in any way; the rest is measured without
        return None, {"part": part, "right": False, "note": f"{part}: {type(error).__name__}: {error!s:.200}"}
    recipes = {
        length: replace(recipe, train=replace(recipe.train, attention_backend=measured))
        for length, recipe in ready.recipes.items()
    }
    row = {"part": part, "ms": 1e3 * (time.perf_counter() - started), "note": f"attention, fastest: {measured}"}
    return ready._replace(recipes=recipes, layouts=layouts_of(recipes, ready.mesh), attention="fastest"), row


def predicted_to_fit(ready: Ready, case: Case) -> bool:
    """Return whether the memory that `longring plan` predicts for a case is that of this device or less."""
    if ready.device != "cuda":
        return True
    _, device_bytes = torch.cuda.mem_get_info()
    return predicted(ready.sizes, case, on_gpu=True).total <= device_bytes


def attempt(work: Callable[[], Row]) -> Row | None:
    """Return a row, or None if the memory was not enough for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # the error holds the tensors of its frames until here
    torch.cuda.empty_cache()
    return None


def timed_ms(device: str, work: Callable[[], object]) -> tuple[float, float]:
    """Return the ms of a call on the device, and those after which the host was done with it: medians of the calls."""
    work()
    found, started = list[tuple[float, float]](), time.perf_counter()
    while len(found) < TIMED and (not found or time.perf_counter() - started < TIMED_S):
        synchronize(device)
        begin, first = time.perf_counter(), moment(device)
        work()
        host, last = time.perf_counter() - begin, moment(device)
        synchronize(device)
        found.append((elapsed_ms(first, last), 1e3 * host))
    return sorted(found)[len(found) // 2]


def rates(ready: Ready, length: int, micro_batches: int, ms: float) -> Row:
    """Return tokens/s, TFLOP/s and MFU of micro-batches that took some ms."""
    rate = micro_batches * sum(flops_of(ready.sizes, length)) / ms * 1e3
    tokens_per_s = micro_batches * ready.tokens(length) / ms * 1e3
    return {"tokens_per_s": tokens_per_s, "TFLOPs": rate / 1e12} | mfu(rate)


def known(ready: Ready, case: Case) -> Row:
    """Return the columns that name the row of a micro-batch."""
    return {"part": "micro-batch", "length": case.length, "kept": case.kept, "attention": ready.attention}


def bucket_row(ready: Ready, case: Case) -> Row:
    """Return the row of a micro-batch: time, rates, and the peak of memory beside the predicted one.

    A case that does not fit is wrong only if it was predicted to.
    """
    expected = predicted_to_fit(ready, case)
    plan = predicted(ready.sizes, case, on_gpu=ready.device == "cuda")
    row = known(ready, case) | {"predicted_bytes": plan.total - plan.reserve, "predicted_to_fit": expected}

    def measured() -> Row:
        ready.take(case.memory)
        inputs, before = ready.inputs(case.length), 0
        if ready.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ms, host_ms = timed_ms(ready.device, lambda: ready.both_passes(inputs))
        found: Row = {"ms": ms, "host_ms": host_ms} | rates(ready, case.length, 1, ms)
        if ready.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["bytes_a_token"] = (found["peak_bytes"] - before) // ready.tokens(case.length)
        return found

    found = attempt(measured)
    if found is not None:
        return row | {"fits": True} | found
    note = f"{case.length:,} tokens, {case.kept}: does not fit, {'against' if expected else 'as'} the prediction"
    return row | {"fits": False, "note": note} | ({"right": False} if expected else {})


def whole_step_row(ready: Ready, case: Case) -> Row:
    """Return the row of a step: its micro-batches, and the update of all weights."""
    row = known(ready, case) | {"part": "whole step"}

    def measured() -> Row:
        ready.take(case.memory)
        inputs, micro_batches = ready.inputs(case.length), ready.engine.gradient_accumulation_steps()

        def step() -> None:
            for _ in range(micro_batches):
                ready.both_passes(inputs)
                ready.engine.step()

        ms, host_ms = timed_ms(ready.device, step)
        found: Row = {"micro_batches": micro_batches, "ms": ms, "host_ms": host_ms}
        return found | rates(ready, case.length, micro_batches, ms)

    found = attempt(measured)
    if found is None:
        return row | {"fits": False, "right": False, "note": f"whole step, {case.length:,} tokens: does not fit"}
    note = f"whole step: {found['micro_batches']} micro-batches and the update"
    return row | {"fits": True, "note": note} | found
