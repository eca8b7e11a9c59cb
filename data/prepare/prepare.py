"""Documents to a prepared directory, on this machine's processes or as Slurm jobs; it appears whole or not at all.

The work is divided into input shards. datatrove's executors run them (Penedo et al., DataTrove, 2024); each is
repeatable and done when its books are written, so a preparation that was killed goes on where it was. `merge` then
writes the manifest.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from loguru import logger
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import DataConfig
from ..files import write_text, write_whole
from ..format.manifest import INPUTS_FILE, MANIFEST_FILE, Manifest, differences, open_prepared, settings_of
from ..format.store import LocalStore
from ..format.tokenizer import TOKENIZER_FILE, DocumentTokenizer, read_tokenizer, train_tokenizer, with_knot_tokens
from .decompose import split_of
from .input_shard import books_file, prepare_input_shard, progress_file
from .merge import merge
from .records import RecordReader
from .sources import InputShard, input_shards

# The engine would log over the progress bar; what goes wrong it raises.
logger.disable("datatrove")

OFFSETS_FILE = "offsets.bin"
"""int64 [input shards + 1]: where each one's line begins in the plan's inputs.jsonl."""

PLANNING_S = 3600
"""How long the other parts wait for part 0 to plan the work and train the tokenizer."""

DELETE_OR_GO_BACK = "go back to that to finish it, or delete it"


@dataclass(frozen=True)
class PrepareStep:
    """The engine's pipeline: the input shard whose number is the task's rank."""

    config: DataConfig
    partial: Path
    threads: int
    """Of the tokenizer, in each process."""

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Prepare input shard `rank`."""
        os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))
        prepare_input_shard(self.config, self.partial, rank, planned_shard(self.partial, rank))


def prepare(config: DataConfig, console: Console, workers: int = 0) -> Manifest:
    """Make `config.directory`, or take it as it is when it was made from the same settings; return its manifest.

    `workers` processes share the work, as many as there are CPUs for 0; what they make does not depend on it. Raises
    ValueError when the directory holds something else, when a source or the tokenizer cannot be read, too many records
    are bad, or no sequence comes out. The directory is then as it was before; input shards that were done stay beside
    it in `<directory>.partial` for the next attempt.
    """
    directory = Path(config.directory)
    if is_prepared(config):
        console.print(f"{directory} is already prepared from these settings; using it")
        return open_prepared(directory)
    partial = partial_directory(directory)
    try:
        with _progress(console) as progress:
            count = begin(config, partial, progress)
            if count:
                _run_here(config, partial, workers, range(count), progress)
        return merge(config, partial)
    finally:
        # A failure before anything is done, or without a sequence to train on, leaves nothing to go on from; after a
        # success `partial` has got its name.
        if partial.is_dir() and not any((partial / "shards").glob("*/*.tar")):
            shutil.rmtree(partial, ignore_errors=True)


def prepare_part(config: DataConfig, console: Console, part: int, num_parts: int, workers: int = 0) -> None:
    """Prepare one of `num_parts` equal shares of the input shards, as a task of an array job does.

    Part 0 plans the work and trains the tokenizer; the others wait for it. When all have ended, `prepare` finds nothing
    left to do but to merge. Raises ValueError as `prepare` does.
    """
    if is_prepared(config):
        console.print(f"{config.directory} is already prepared from these settings")
        return
    partial = partial_directory(Path(config.directory))
    with _progress(console) as progress:
        if part:
            task = progress.add_task("waiting for part 0 to plan", total=None, line="")
            deadline = time.monotonic() + PLANNING_S
            while not (partial / TOKENIZER_FILE).exists():
                if time.monotonic() > deadline:
                    raise ValueError(f"part 0 of {num_parts} has not planned {partial} within {PLANNING_S} s: start it")
                time.sleep(1)
            progress.remove_task(task)
        count = begin(config, partial, progress)
        if mine := range(count * part // num_parts, count * (part + 1) // num_parts):
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


def is_prepared(config: DataConfig) -> bool:
    """Whether `config.directory` is finished data made from `config`; ValueError when it holds anything else."""
    directory = Path(config.directory)
    if "://" in config.directory:
        raise ValueError(f"data.directory = {config.directory} is remote; prepare here, then copy the directory there")
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    if not (directory / MANIFEST_FILE).is_file():
        raise ValueError(f"data.directory = {directory} exists and is not prepared data; name another directory")
    open_prepared(directory).check_made_from(config)
    return True


def partial_directory(directory: Path) -> Path:
    """Return where a preparation of `directory` works."""
    return directory.with_name(f"{directory.name}.partial")


def begin(config: DataConfig, partial: Path, progress: Progress) -> int:
    """Plan the work and make the tokenizer, or find both as an earlier attempt left them -> number of input shards.

    Raises ValueError when that attempt had other settings or other files.
    """
    if (partial / MANIFEST_FILE).exists():
        Manifest.load(LocalStore(partial)).check_made_from(config)
        return 0
    inputs = input_shards(config)
    lines = [json.dumps(asdict(shard)).encode() + b"\n" for shard in inputs]
    plan = {"data": settings_of(config), "inputs": hashlib.sha256(b"".join(lines)).hexdigest()}
    plan_file, work = partial / "work" / "plan.json", partial / "work"
    if plan_file.exists():
        before = json.loads(plan_file.read_text())
        for key, old, new in differences("data", before["data"], json.loads(json.dumps(plan["data"]))):
            raise ValueError(f"{partial} is a preparation begun with {key} = {old!r}, not {new!r}; {DELETE_OR_GO_BACK}")
        if before["inputs"] != plan["inputs"]:
            raise ValueError(f"{partial} is a preparation begun with other files or file sizes; {DELETE_OR_GO_BACK}")
    else:
        write_whole(work / INPUTS_FILE, lambda path: path.write_bytes(b"".join(lines)))
        offsets = np.cumsum([0, *map(len, lines)])
        write_whole(work / OFFSETS_FILE, lambda path: path.write_bytes(offsets.astype("<i8").tobytes()))
        write_text(plan_file, json.dumps(plan))
    if not (partial / TOKENIZER_FILE).exists():
        tokenizer = _tokenizer_content(config, inputs, progress)
        DocumentTokenizer(tokenizer, config.tokenizer.boundary)
        write_whole(partial / TOKENIZER_FILE, lambda path: path.write_bytes(tokenizer))
    return len(inputs)


def planned_shard(partial: Path, number: int) -> InputShard:
    """Return input shard `number` of the plan; reads no other's line, of which there may be many."""
    with (partial / "work" / OFFSETS_FILE).open("rb") as offsets:
        offsets.seek(8 * number)
        first, last = np.frombuffer(offsets.read(16), dtype="<i8").tolist()
    with (partial / "work" / INPUTS_FILE).open("rb") as lines:
        lines.seek(first)
        entry = json.loads(lines.read(last - first))
    return InputShard(**{**entry, "files": tuple(entry["files"])})


def _tokenizer_content(config: DataConfig, inputs: list[InputShard], progress: Progress) -> bytes:
    """Return the bytes of the existing tokenizer, or of one trained on the documents that are not held out."""
    if config.tokenizer.path:
        return with_knot_tokens(read_tokenizer(config.tokenizer.path), config.tokenizer.knot_chunks)
    task = progress.add_task("training the tokenizer", total=None, line="")

    def texts() -> Iterator[str]:
        for source in config.named_sources:
            left = config.tokenizer.training_characters
            for shard in (shard for shard in inputs if shard.source == source):
                reader = RecordReader(shard, config.named_sources[source], config.max_bad_fraction)
                for document in reader.documents():
                    progress.advance(task)
                    if split_of(document.digest, config.seed, config.held_out_fraction) == "train":
                        assert isinstance(document.content, str), "token ids come with their tokenizer"
                        yield document.content
                        left -= len(document.content)
                    if left <= 0:
                        break
                if left <= 0:
                    break

    content = train_tokenizer(texts(), config.tokenizer)
    progress.update(task, total=progress.tasks[task].completed)
    return content


def _run_here(config: DataConfig, partial: Path, workers: int, shards: range, progress: Progress) -> None:
    """Prepare these input shards on this machine's processes."""
    cpus = len(os.sched_getaffinity(0))
    processes = min(workers or cpus, len(shards))
    executor = LocalPipelineExecutor(
        pipeline=[PrepareStep(config, partial, max(1, cpus // processes))],
        tasks=shards.stop,
        local_tasks=len(shards),
        local_rank_offset=shards.start,
        workers=processes,
        logging_dir=str(partial / "work" / "executor"),
        skip_completed=False,  # the books say what is done
    )
    with _shown(partial, shards, processes, progress):
        executor.run()


@contextmanager
def _shown(partial: Path, shards: range, processes: int, progress: Progress) -> Iterator[None]:
    """Show how far the processes have come, by the files in which they say so."""
    task = progress.add_task("tokenizing, cutting, writing", total=len(shards), line="")
    stop = threading.Event()

    def show() -> None:
        pending, done = list(shards), np.zeros(2, dtype=np.int64)
        finished, before, started = False, 0, time.monotonic()
        while not finished:
            finished = stop.wait(0.3)
            running = np.zeros(2, dtype=np.int64)
            # They are taken in order, so those at work are among the first.
            for number in pending[: None if finished else 2 * processes]:
                counts = _counts(progress_file(partial, number))
                if books_file(partial, number).exists():
                    pending.remove(number)
                    done += counts
                else:
                    running += counts
            documents, tokens = (done + running).tolist()
            before = before or tokens
            rate = (tokens - before) / (time.monotonic() - started)
            line = f"{documents:,} documents  {tokens:,} tokens  {rate:,.0f}/s"
            progress.update(task, completed=len(shards) - len(pending), line=line)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _counts(file: Path) -> NDArray[np.int64]:
    """Return (documents, tokens) of an input shard; 0 while its process has said nothing, or is about to."""
    words = file.read_text().split() if file.exists() else []
    return np.array(words if len(words) == 2 else [0, 0], dtype=np.int64)
