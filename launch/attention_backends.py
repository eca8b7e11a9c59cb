"""The attention backends of a run on GPUs: the fastest for each kind of tile, measured at a start or recalled.

Each backend is measured in a process of its own, since an error of a kernel may end the process or leave its GPU
unusable. What was measured is kept beside the compiled kernels, for this device, driver, code and these versions. What
a run takes is kept in its directory, and its next starts take the same.
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

import torch
from rich.console import Console
from rich.table import Table

from ..data.files import read_patiently, write_text
from ..kernels import backends
from ..kernels.backends import Selection, choose_backend
from ..kernels.blocks import architecture
from ..kernels.case import Case, Kind, Task
from ..kernels.choose import Question, Sample, Timing, fastest, rehearse, select, tiles_of
from ..kernels.layout import SeqLayout
from ..kernels.packages import installed
from ..parallel.cp.packed import divided, typical_packing
from ..parallel.mesh import Mesh
from ..parallel.world import World
from .config import Recipe
from .grids.choice import attention_shape
from .measure_backend import LINE, question_json
from .settings import flat
from .tables import plain_table
from .together import first_of_any, on_all_ranks, on_rank_0

log = logging.getLogger(__name__)

FILE = "attention.json"
"""Name of the table, in Triton's cache directory."""
LIMIT_S = 240.0
"""Seconds for all backends together: less than collectives, in which the other ranks wait, may take."""
PACKAGES = ("triton", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl")
"""Distributions whose versions decide about the kernels, besides torch with its libraries."""
DOCUMENTS = 4
"""Mean number of documents of a packed sample; the number in the sequences of a run is not known."""


def with_backends(
    recipe: Recipe, mesh: Mesh, lengths: Sequence[int], console: Console | None = None, file: Path | None = None
) -> Recipe:
    """Return the recipe with the attention backends that buckets of these lengths use on this mesh. Collective.

    On GPUs "auto" becomes the backends that an earlier start has kept in `file`, if they are still to be had, or else
    the fastest for each kind of tile, as rank 0 measures. It prints them to `console`, and keeps them in `file`. A
    deterministic run does not measure, since two starts may differ. Raises CommonError if a file cannot be read or
    written, and ValueError if no backend is right for a kind of tile.
    """
    train, device = recipe.train, mesh.device
    if train.attention_backend != "auto" or device.type != "cuda" or train.deterministic:
        return recipe
    question, case = question_of(recipe, lengths), case_of(recipe, device)
    default = choose_backend(case)
    # Less than the time without progress after which the watchdog ends a run.
    limit_s = min(LIMIT_S, 30 * recipe.faults.hang_minutes or LIMIT_S)
    print_line = partial(console.print, soft_wrap=True, highlight=False, markup=False) if console else log.info

    def timed(deadline: float) -> list[Timing]:
        cache = Path(os.environ["TRITON_CACHE_DIR"], FILE)
        return measured(question, case, device, cache, deadline - time.monotonic())

    def decided() -> str:
        """Return the backends of an earlier start, or the fastest, as the text of a `Selection`. Rank 0 only."""
        deadline = time.monotonic() + limit_s
        if file is not None:
            # A check that hangs leaves half of the time for a new measurement.
            kept, changed = recalled(file, question, case, device, deadline - limit_s / 2)
            if kept is not None:
                print_line(f"attention backends: {kept} (as before: {file})")
                return kept
            if changed:
                log.warning("attention backends: %s", changed)
                print_line(f"attention backends: {changed}: measured anew; sums may round differently from here")
        timings = timed(deadline)
        if console is not None:
            console.print(backends_table(timings))
        return str(select(default, timings))

    def checked_default() -> str:
        """Return the default backend, if it is right for every kind of tile. Rank 0 only."""
        timings = timed(time.monotonic() + limit_s)
        return str(select(default, [timing for timing in timings if timing.backend == default]))

    backend = on_rank_0(mesh, decided)
    names = set(Selection.parse(backend).chosen.values())
    lacking = (f"rank {mesh.rank}: {name}: {backends.BACKENDS[name].unfit(case)}" for name in names)
    if found := first_of_any(next((text for text in lacking if not text.endswith(": None")), None)):
        log.warning("attention backends of rank 0 are not those of all ranks (%s); all take %s", found, default)
        if mesh.rank == 0:
            print_line(f"attention backends: {backend}: not those of all ranks ({found}); all take {default} from here")
        backend = on_rank_0(mesh, checked_default)
    log.info("attention backends: %s", backend)

    def ready() -> None:
        rehearse(question, backend, device)
        if mesh.rank == 0 and file is not None:  # after the kernels have run
            kept = {"machine": json.loads(machine_of(device)), "tiles": repr(question), "backend": backend}
            write_text(file, json.dumps(kept, indent=1) + "\n")

    # One rank of a node goes first and compiles the kernels, which the others then load.
    is_first = World.from_environment().local_rank == 0
    for is_mine in (is_first, not is_first):
        on_all_ranks(mesh, ready if is_mine else lambda: None)
    return replace(recipe, train=replace(train, attention_backend=backend))


def question_of(recipe: Recipe, lengths: Sequence[int]) -> Question:
    """Return the tiles that buckets of these lengths have on one rank, as a question for `choose.measure`."""
    shape, parallel = attention_shape(recipe), recipe.parallel
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
                # The last chunk of rank 1 sees all of the first chunk of rank 0: most tiles of a pass are like this.
                tiles = [(1, own, own), (1, other.part([(half, 2 * half)]), own.part([(0, half)]))]
            if recipe.packs_documents:
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


def recalled(
    file: Path, question: Question, case: Case, device: torch.device, deadline: float
) -> tuple[str | None, str]:
    """Return the backends that an earlier start has kept in `file`, as the text of a `Selection`; None: measure.

    They are taken if device, driver, versions, code and tiles are the same and each of them, in a process of its own
    that ends by `deadline` (of `time.monotonic`), still passes its check. With None comes the reason, in words, or
    "" if there is no file. Raises OSError if the file cannot be read.
    """
    now = flat(json.loads(machine_of(device)))
    try:
        kept = json.loads(read_patiently(file, file.read_text))
        before, tiles = flat(kept["machine"]), kept["tiles"]
        selection = Selection.parse(kept["backend"])
        if selection.default not in backends.BACKENDS:
            raise ValueError(f"{selection.default!r} is no backend")
    except FileNotFoundError:
        return None, ""
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return None, f"{file} is damaged ({error!r:.200})"
    changed = [
        f"{key} from {before.get(key)!r:.120} to {value!r}" for key, value in now.items() if before.get(key) != value
    ]
    if changed:
        return None, ", ".join(changed)
    if tiles != repr(question):
        return None, f"other tiles than in {file}"
    # A tile of each kind, with the most sequences, by the backend that computes it.
    samples: dict[str, list[Sample]] = {}
    for (task, kind), numbers in tiles_of(question, device).items():
        most = max((question.samples[number] for number in numbers), key=lambda sample: sample.batch)
        samples.setdefault(selection.name_of(task, kind), []).append(most._replace(tasks=(task,)))
    for name, of_backend in samples.items():
        if fault := _fault(name, question._replace(samples=tuple(of_backend)), case, device, deadline):
            return None, f"{name} of {file}: {fault}"
    return kept["backend"], ""


def _fault(name: str, question: Question, case: Case, device: torch.device, deadline: float) -> str:
    """Return the reason why a backend fails on a question, which has one sample for each kind of tile, or ""."""
    if (reason := backends.BACKENDS[name].unfit(case)) is not None:
        return reason
    found, note = measured_apart(question, name, device, deadline - time.monotonic())
    passed = [timing for timing in found if timing.seconds is not None]
    if note or len(passed) == len(question.samples):
        return note
    return next((timing.note for timing in found if timing.seconds is None), "does not compute all of its tiles")


def measured(
    question: Question, case: Case, device: torch.device, file: Path, limit_s: float = LIMIT_S
) -> list[Timing]:
    """Return the timings of all backends that fit: those in `file`, or new ones, which are added to it.

    A backend whose process ends with an error has a note and no time. Backends that `limit_s` seconds do not suffice
    for are left out, and the next start measures again. Raises OSError if the file cannot be written.
    """
    key, machine = repr(question), machine_of(device)
    known = _recalled(file)
    if (rows := known.get(machine, {}).get(key)) is not None:
        log.info("attention backends: as measured before, %s", file)
        return rows
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
        timed_out = note.startswith("no end")
        complete &= not timed_out and not (note and name == default)
        if note:
            tiles = {} if timed_out else tiles_of(question, device)
            found = [Timing(*tile, of[0], name, None, note) for tile, of in tiles.items() if tile[1] in backend.kinds]
        timings += found
    # An incomplete result is not kept: the next start, which may find more kernels compiled or more memory free,
    # measures again.
    if complete and fastest(timings).keys() == {timing[:2] for timing in timings}:
        device_name = json.loads(machine)["device"]
        kept = {other: rows for other, rows in known.items() if json.loads(other)["device"] != device_name}
        kept[machine] = {**known.get(machine, {}), key: timings}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(kept, indent=1) + "\n")
    return timings


def measured_apart(question: Question, backend: str, device: torch.device, seconds: float) -> tuple[list[Timing], str]:
    """Return the timings of a backend, measured in a process of its own, and the reason why they do not count, or "".

    A process that has not ended after `seconds` is killed.
    """
    words = [sys.executable, "-m", "longring.launch.measure_backend"]
    words += [str(os.getpid()), question_json(question), backend, str(device)]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return [], f"no end within {max(0.0, seconds):.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(LINE)]
    said = (done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"])[0][:300]
    try:
        found = [Timing(*json.loads(line.removeprefix(LINE))) for line in lines]
    except (ValueError, TypeError) as error:
        return [], f"its process printed what cannot be read: {error}"
    if done.returncode != 0:
        return found, f"its process ended with {done.returncode}: {said}"
    # A package may end the process with status 0. A sum over fewer samples would make the backend look fast.
    kinds = backends.BACKENDS[backend].kinds
    asked = sum(len(numbers) for (_, kind), numbers in tiles_of(question, device).items() if kind in kinds)
    return found, "" if len(found) == asked else f"its process ended after {len(found)} of {asked} timings: {said}"


def machine_of(device: torch.device) -> str:
    """Return, as JSON, everything besides the question that decides which kernel is fastest."""
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


def _recalled(file: Path) -> dict[str, dict[str, list[Timing]]]:
    """Return the timings of the record, by machine and question; none if it cannot be read."""
    try:
        known = json.loads(file.read_text())
        return {
            machine: {question: [Timing(*row) for row in rows] for question, rows in of_machine.items()}
            for machine, of_machine in known.items()
            if json.loads(machine)["device"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
