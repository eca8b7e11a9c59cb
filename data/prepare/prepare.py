"""`longring prepare`: documents to a prepared directory, which appears whole or not at all.

The sources are divided into input shards, which are prepared in processes of this machine, or as Slurm jobs (slurm.py;
the pattern is that of DataTrove, Penedo et al., 2024). Each input shard is repeatable, and done when its ledger is
written, so a preparation that was killed continues from there; `merge` then writes the manifest. The input shards of
finished data whose tar shards are missing or damaged are prepared again.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import DataConfig
from ..files import full_disk_named, write_whole
from ..format.manifest import MANIFEST_FILE, Manifest, open_prepared
from ..format.store import LocalStore
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer
from ..format.tokenizer_file import STUCK_STATUS
from ..lock import HeldError, held
from ..processes import process_pool
from .extend import extended_by, new_sources
from .input_shard import prepare_input_shard
from .job import begin_job, is_listed, list_inputs, listed_shard
from .merge import cannot_restore, merge, restore_parts
from .progress import shown
from .sampling import with_thresholds
from .sources import InputShard, input_shards
from .train_tokenizer import make_tokenizer, named

PART_0_SECONDS = 3600
"""Seconds that the other parts wait for part 0 to list the input shards and train the tokenizer."""


@dataclass(frozen=True)
class PrepareStep:
    """Step of a Slurm array, or of a pool of processes: task `rank` prepares input shard `numbers[rank]`."""

    config: DataConfig
    partial: Path
    numbers: Sequence[int]

    threads: int
    """Number of threads of the tokenizer in each process."""

    def __call__(self, rank: int) -> None:
        """Prepare input shard `numbers[rank]`, unless its ledger says that it is done."""
        os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))
        number = self.numbers[rank]
        prepare_input_shard(self.config, self.partial, number, listed_shard(self.partial, number))


def prepare(config: DataConfig, console: Console, workers: int = 0, *, verify: bool = False) -> Manifest:
    """Make `config.directory`, or repair it if it was made from the same settings; return its manifest.

    Input shards are prepared in `workers` processes, or one per CPU if 0; the result does not depend on it. Finished
    data that lacks some of the sources is extended by them (extend.py), and stays beside the result. Other finished
    data is left as it is, but shards that are missing or have another size are made again; with `verify` every shard
    is read, and those with another SHA-256 are made again too.

    Raises ValueError if the directory holds anything else, if another process prepares it, if a source or the tokenizer
    cannot be read, if too many records are bad, or if there is no training sequence. The directory is then unchanged,
    and the input shards that are done stay in `<directory>.partial` for the next attempt, also after the OSError of a
    full disk.
    """
    directory = Path(config.directory)
    if (manifest := _finished(config)) is not None:
        if damaged := sorted({number for number, _ in manifest.damaged_shards(verify=verify)}):
            with _progress(console) as progress, _held(config), full_disk_named(directory):
                _repair(config, manifest, damaged, workers, progress)
            numbers = ", ".join(map(str, damaged))
            console.print(f"{directory}: missing or damaged shards are made again, of input shard {numbers}")
        else:
            console.print(f"{directory} is already prepared from these settings; using it", markup=False)
        return open_prepared(directory)
    partial = partial_directory(directory)
    with _held(config):
        if _finished(config) is not None:  # by the process that has just released the lock
            return open_prepared(directory)
        with _progress(console) as progress, full_disk_named(partial):
            if numbers := begin(config, partial, progress, workers):
                _run_here(config, partial, workers, numbers, progress)
            manifest = merge(config, partial)
    if manifest.extends:
        before = directory.with_name(manifest.extends)
        console.print(f"{directory} is extended; the data before is {before}", markup=False, soft_wrap=True)
    return manifest


@contextmanager
def _held(config: DataConfig) -> Iterator[None]:
    """Hold the lock of a preparation, and remove what it leaves if that is of no use to another.

    Raises ValueError if another process holds the lock.
    """
    directory = Path(config.directory)
    partial, lock = partial_directory(directory), directory.with_name(f"{directory.name}.lock")
    try:
        with held(lock):
            try:
                yield
            finally:
                # Without a shard or key there is nothing to continue from; after a success `partial` has been renamed.
                kept = "shards/*/*.tar", "work/sampling/*.npy"
                if partial.is_dir() and not any(any(partial.glob(names)) for names in kept):
                    shutil.rmtree(partial, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except HeldError as error:
        raise ValueError(
            f"data.directory = {directory}: is being prepared by {error}; wait for it or end it, or name another one"
        ) from error


def prepare_part(config: DataConfig, console: Console, part: int, num_parts: int, workers: int = 0) -> None:
    """Prepare one of `num_parts` equal shares of the input shards, as a task of an array job does.

    Part 0 lists the input shards and trains the tokenizer, for which the others wait. When all parts have ended, only
    the merge is left to `prepare`. Raises ValueError as `prepare` does.
    """
    if is_prepared(config):
        console.print(f"{config.directory} is already prepared from these settings", markup=False)
        return
    partial = partial_directory(Path(config.directory))
    with _progress(console) as progress:
        if part:
            task = progress.add_task("waiting for part 0", total=None, line="")
            deadline = time.monotonic() + PART_0_SECONDS
            while not is_listed(partial):
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"--part {part}/{num_parts}: part 0 has not listed the input shards in {partial} within "
                        f"{PART_0_SECONDS} s; start it by --part 0/{num_parts}, then this one again"
                    )
                time.sleep(1)
            progress.remove_task(task)
        with full_disk_named(partial):
            # In parts other than 0 this finds all listed and made.
            numbers = begin(config, partial, progress, workers)
            count = len(numbers)
            # Parts are contiguous ranges that differ by at most one input shard.
            if mine := numbers[count * part // num_parts : count * (part + 1) // num_parts]:
                _run_here(config, partial, workers, mine, progress)
    console.print(f"part {part} of {num_parts}: {len(mine)} of {count} input shards are done", highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _finished(config: DataConfig) -> Manifest | None:
    """Return the manifest of finished data made from `config`.

    None if `config.directory` is absent or empty, or if its data is to be extended. Raises ValueError if the directory
    holds anything else or is remote, or if the manifest is damaged.
    """
    directory = Path(config.directory)
    if "://" in config.directory:
        raise ValueError(
            f"data.directory = {config.directory}: is remote; prepare in a local directory, then copy it there"
        )
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / MANIFEST_FILE).is_file():
        raise ValueError(
            f"data.directory = {directory}: exists and is not prepared data; name another directory, or delete "
            "this one if nothing in it is needed"
        )
    if extended_by(config) is not None:
        return None
    manifest = open_prepared(directory, check_shards=False)
    manifest.check_made_from(config)
    return manifest


def is_prepared(config: DataConfig) -> bool:
    """Return whether `config.directory` is finished data made from `config`.

    Raises ValueError if the directory holds anything else, or if a shard is missing or has another size.
    """
    manifest = _finished(config)
    if manifest is not None:
        manifest.check_sizes()
    return manifest is not None


def partial_directory(directory: Path) -> Path:
    """Return the directory in which a preparation of `directory` works."""
    return directory.with_name(f"{directory.name}.partial")


def begin(config: DataConfig, partial: Path, progress: Progress, workers: int = 0) -> range:
    """List the input shards and make the tokenizer, unless an earlier attempt has; return the numbers to prepare.

    Sources that are sampled are read once before, in `workers` processes, or one per CPU if 0. Raises ValueError as
    `open_job` does.
    """
    inputs, first = open_job(config, partial, progress)
    if inputs and not is_listed(partial):
        list_inputs(partial, with_thresholds(config, partial, inputs, first, workers, progress))
    return range(first, len(inputs))


def open_job(config: DataConfig, partial: Path, progress: Progress) -> tuple[list[InputShard], int]:
    """Begin a preparation or continue one, and make its tokenizer; return its input shards and the first to prepare.

    Those before the first are of the data that is extended; there are none at all if only the last renames are missing.
    Raises ValueError if the earlier attempt had other settings or other files, if a source cannot be read, or if the
    tokenizer is not usable.
    """
    if (partial / MANIFEST_FILE).exists():
        Manifest.load(LocalStore(partial)).check_made_from(config)
        return [], 0
    base = extended_by(config)
    before = [] if base is None else [InputShard.from_json(entry) for entry in base.inputs()]
    inputs = [*before, *input_shards(config if base is None else new_sources(config, base))]
    begin_job(config, partial, inputs)
    if not (partial / TOKENIZER_FILE).exists():
        tokenizer = make_tokenizer(config, inputs, progress) if base is None else base.tokenizer_json().encode()
        made = DocumentTokenizer(tokenizer, config.tokenizer.boundary, named(config.tokenizer))  # raises ValueError
        for source in config.named_sources.values():
            if source.holds_tokens:
                made.marks(source.bos, source.eos)  # raises ValueError
        write_whole(partial / TOKENIZER_FILE, lambda path: path.write_bytes(tokenizer))
    return inputs, len(before)


def _repair(config: DataConfig, manifest: Manifest, numbers: list[int], workers: int, progress: Progress) -> None:
    """Make input shards `numbers` of finished data again.

    Raises ValueError if their sources cannot be read, or do not give the bytes of the manifest any more.
    """
    directory = Path(config.directory)
    partial = partial_directory(directory)
    inputs = [InputShard.from_json(entry) for entry in manifest.inputs()]
    # The manifest may be another's: only files that the recipe itself names are read.
    known = {(shard.source, file) for shard in input_shards(config) for file in shard.files}
    for shard in inputs:
        if others := [file for file in shard.files if (shard.source, file) not in known]:
            raise cannot_restore(manifest, directory, f"{others[0]} is not among them")
    begin_job(config, partial, inputs)
    list_inputs(partial, inputs)
    shutil.copyfile(directory / TOKENIZER_FILE, partial / TOKENIZER_FILE)
    try:
        _run_here(config, partial, workers, numbers, progress)
    except ValueError as error:
        shutil.rmtree(partial)
        raise cannot_restore(manifest, directory, error) from error
    restore_parts(partial, manifest, directory, numbers)


def _run_here(config: DataConfig, partial: Path, workers: int, numbers: Sequence[int], progress: Progress) -> None:
    """Prepare input shards `numbers` in processes of this machine."""
    cpus = len(os.sched_getaffinity(0))
    processes = min(workers or cpus, len(numbers))
    step = PrepareStep(config, partial, numbers, max(1, cpus // processes))
    with shown(partial, numbers, processes, progress):
        if processes == 1:
            for index in range(len(numbers)):
                step(index)
            return
        with process_pool(processes) as pool:
            try:
                for task in as_completed(pool.submit(step, index) for index in range(len(numbers))):
                    task.result()
            except BrokenProcessPool as error:
                # A process that the tokenizer holds up ends itself, after it has said so (format/tokenizer_file.py).
                if STUCK_STATUS in [process.exitcode for process in pool._processes.values()]:
                    raise ValueError(
                        f"{partial}: a process of the preparation has ended; its error is above"
                    ) from error
                raise OSError(
                    f"{partial}: a process of the preparation was killed from outside, perhaps for memory; run the "
                    "same command again, with fewer --workers if memory was short"
                ) from error
