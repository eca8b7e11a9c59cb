"""The attention backends of a run on GPUs: the fastest for each kind of tile, measured at a start or recalled.

Each backend is measured in a process of its own, since an error of a kernel may end the process or leave its GPU
unusable. What was measured is kept beside the compiled kernels, for this device, driver, code and these versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..data.files import write_text
from ..kernels import backends
from ..kernels.backends import choose_backend, selection
from ..kernels.blocks import architecture
from ..kernels.case import Case, Kind, Task
from ..kernels.choose import Question, Sample, Timing, fastest, rehearse
from ..kernels.layout import SeqLayout
from ..kernels.packages import installed
from ..parallel.cp.packed import divided, typical_packing
from ..parallel.mesh import Mesh
from ..parallel.world import World
from .config import Recipe
from .grids.choice import attention_shape
from .measure_backend import LINE, question_json
from .tables import plain_table
from .together import first_of_any, on_all_ranks, on_rank_0

log = logging.getLogger(__name__)

FILE = "attention.json"
"""Name of the record, in Triton's cache directory."""
LIMIT_S = 240.0
"""Seconds for all backends together: less than collectives, in which the other ranks wait, may take."""
PACKAGES = ("triton", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl")
"""Distributions whose versions decide about the kernels, besides torch with its libraries."""
DOCUMENTS = 4
"""Documents of a packed sample, in the mean; how many a run will have is not known."""


def with_backends(recipe: Recipe, mesh: Mesh, lengths: Sequence[int], console: Console | None = None) -> Recipe:
    """Return the recipe with the attention backends that buckets of these lengths use on this mesh. Collective.

    On GPUs "auto" becomes the fastest backend for each kind of tile, as rank 0 has measured, which prints its table to
    `console`. A deterministic run does not measure, since two starts may differ. Raises CommonError if the record
    cannot be written.
    """
    train, device = recipe.train, mesh.device
    if train.attention_backend != "auto" or device.type != "cuda" or train.deterministic:
        return recipe
    question, case = question_of(recipe, lengths), case_of(recipe, device)
    file = Path(os.environ["TRITON_CACHE_DIR"], FILE)
    # Less than the time without progress after which the watchdog ends a run.
    limit_s = min(LIMIT_S, 30 * recipe.faults.hang_minutes or LIMIT_S)
    timings = on_rank_0(mesh, lambda: measured(question, case, device, file, limit_s))
    chosen, default = fastest(timings), choose_backend(case)
    if console is not None:
        console.print(backends_table(timings))
    lacking = (f"rank {mesh.rank}: {name}: {backends.BACKENDS[name].unfit(case)}" for name in set(chosen.values()))
    if found := first_of_any(next((text for text in lacking if not text.endswith(": None")), None)):
        log.warning("attention backends of rank 0 are not those of all ranks (%s); all take %s", found, default)
        return recipe
    backend = selection(default, chosen)
    log.info("attention backends: %s", backend)
    # One rank of a node goes first: it compiles what the others then load.
    is_first = World.from_environment().local_rank == 0
    for is_mine in (is_first, not is_first):
        on_all_ranks(mesh, partial(rehearse, question, backend, device) if is_mine else lambda: None)
    return replace(recipe, train=replace(train, attention_backend=backend))


def question_of(recipe: Recipe, lengths: Sequence[int]) -> Question:
    """Return the tiles that buckets of these lengths have on one rank, as a question for `choose.measure`."""
    shape, parallel, order = attention_shape(recipe), recipe.parallel, recipe.order
    documents = recipe.data.has_boundaries if order.mode == "off" else order.document_masks
    samples: dict[Sample, None] = {}  # in order, each once
    for window in sorted(
        {recipe.model.attention_window(n) for n in range(recipe.model.num_layers)}, key=lambda w: w or 0
    ):
        for length in lengths:
            degree = parallel.context_parallel(length)
            if degree == 1:
                num_rows = parallel.sequences_per_replica(length)
                tiles = [(num_rows, SeqLayout.contiguous(length), SeqLayout.contiguous(length))]
                first = "forward"
            else:
                num_rows, first = 1, "continued"
                own, other = (SeqLayout(runs) for runs in list(divided("zigzag", length, (0,), degree))[:2])
                half = own.num_tokens // 2
                # Rank 1 sees with its last chunk all of rank 0's first chunk, as most tiles of a pass are.
                tiles = [(1, own, own), (1, other.part([(half, 2 * half)]), own.part([(0, half)]))]
            if documents:
                num_tokens = num_rows * length // degree
                packed = SeqLayout(((0, num_tokens),), typical_packing(num_tokens, max(1, num_tokens // DOCUMENTS)))
                tiles.append((1, packed, packed))
            samples |= dict.fromkeys(
                Sample(b, queries, keys, window, (first, "backward")) for b, queries, keys in tiles
            )
    dtype = getattr(torch, recipe.train.dtype)
    return Question(shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype, tuple(samples))


def case_of(recipe: Recipe, device: torch.device) -> Case:
    """Return the case of a rank's attention."""
    shape = attention_shape(recipe)
    dtype = getattr(torch, recipe.train.dtype)
    return Case(device.type, architecture(device), dtype, shape.head_dim, shape.num_kv_heads, False)


def measured(
    question: Question, case: Case, device: torch.device, file: Path, limit_s: float = LIMIT_S
) -> list[Timing]:
    """Return the timings of all backends that fit: those in `file`, or new ones, which are added to it.

    Backends that `limit_s` seconds do not suffice for are left out, and the next start measures again.
    Raises OSError if the file cannot be written.
    """
    key, machine = repr(question), machine_of(device)
    known = _recalled(file)
    if (rows := known.get(machine, {}).get(key)) is not None:
        log.info("attention backends: as measured before, %s", file)
        return [Timing(*row) for row in rows]
    default = choose_backend(case)
    deadline, complete, timings = time.monotonic() + limit_s, True, list[Timing]()
    for name, backend in backends.BACKENDS.items():
        if name == "reference":  # it holds all scores
            continue
        if (reason := backend.unfit(case)) is not None:
            log.info("attention backend %s: %s", name, reason)
            continue
        found, note = measured_apart(question, name, device, deadline - time.monotonic())
        for timing in found:
            log.info("attention backend %s", timing)
        if note:
            log.warning("attention backend %s does not count: %s", name, note)
        complete &= not note.startswith("no end") and not (note and name == default)
        timings += [] if note else found
    # Else the next start, which may find more kernels compiled or more memory free, measures again.
    if complete:
        device_name = json.loads(machine)["device"]
        kept = {other: rows for other, rows in known.items() if json.loads(other)["device"] != device_name}
        kept[machine] = {**known.get(machine, {}), key: [list(timing) for timing in timings]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(kept, indent=1) + "\n")
    return timings


def measured_apart(question: Question, backend: str, device: torch.device, seconds: float) -> tuple[list[Timing], str]:
    """Return what a process of its own measures of a backend, and why it does not count, or "".

    The process has some seconds.
    """
    words = [sys.executable, "-m", "longring.launch.measure_backend"]
    words += [str(os.getpid()), question_json(question), backend, str(device)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return [], f"no end within {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(LINE)]
    found = [Timing(*json.loads(line.removeprefix(LINE))) for line in lines]
    said = done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
    return found, "" if done.returncode == 0 else f"its process ended with {done.returncode}: {said[0][:300]}"


def machine_of(device: torch.device) -> str:
    """Return, as JSON, all that decides which kernel is fastest for a question."""
    gpu, driver = device.type == "cuda", Path("/proc/driver/nvidia/version")
    kernels = sorted(Path(backends.__file__).parent.glob("*.*"))
    return json.dumps(
        {
            "device": torch.cuda.get_device_name(device) if gpu else "CPU",
            "driver": driver.read_text().splitlines()[0] if gpu and driver.exists() else "",
            "torch": f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}",
            "packages": {name: installed(name) for name in PACKAGES},
            "longring": installed("longring"),
            "kernels": hashlib.sha256(b"".join(file.read_bytes() for file in kernels)).hexdigest()[:16],
        }
    )


def _recalled(file: Path) -> dict[str, dict[str, list[Any]]]:
    """Return the timings of the record, by machine and question; none if it cannot be read."""
    try:
        known = json.loads(file.read_text())
        return {machine: rows for machine, rows in known.items() if json.loads(machine)["device"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: cannot be read: %r; attention backends are measured again", file, error)
        return {}


def backends_table(timings: Iterable[Timing]) -> Table:
    """Return a table of the times of all backends, summed over samples, the fastest of each task and kind marked."""
    rows = list(timings)
    best = fastest(rows)
    table = plain_table(
        "Attention backends (* taken)", "task", "kind of tile", "backend", "ms", "note",
        left=["task", "kind of tile", "backend", "note"],
    )  # fmt: skip
    of_tiles: dict[tuple[Task, Kind, str], list[Timing]] = {}
    for row in sorted(rows, key=lambda row: row[:4]):
        of_tiles.setdefault((row.task, row.kind, row.backend), []).append(row)
    for (task, kind, backend), of_tile in of_tiles.items():
        seconds = [row.seconds for row in of_tile if row.seconds is not None]
        ms = f"{1e3 * sum(seconds):.3g}" if len(seconds) == len(of_tile) else ""
        taken = " *" * (best.get((task, kind)) == backend)
        table.add_row(task, kind, f"{backend}{taken}", ms, max(row.note for row in of_tile)[:160])
    return table
