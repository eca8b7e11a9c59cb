"""Saving in the background: training waits for a copy in memory, and a thread writes it during the next steps.

Every rank writes one safetensors file with the ranges it owns, and beside it the entry of this file in the manifest.
After each step all ranks learn from one sum, which the loss needs anyway, how many ranks have written their file. When
all have, the thread of rank 0 writes the manifest and renames the directory. No collective runs in these threads.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.fragments import owned, parameters
from ...parallel.mesh import Mesh
from ...parallel.zero import DeepSpeedEngine
from ..config import TrainConfig
from ..errors import CommonError
from ..run_directory import RunDirectory
from .format import (
    PARTIAL,
    CheckpointManifest,
    FileEntry,
    ParameterEntry,
    TrainState,
    checkpoint_name,
    publish_checkpoint,
    write_checkpoint_manifest,
)
from .retention import prune_checkpoints
from .tensors import write_safetensors

log = logging.getLogger(__name__)

Status = Literal["idle", "writing", "written", "failed"]
_MAX_WARNINGS = 8
"""Largest number of failed ranks that each print a warning; of more, rank 0 alone prints, and the events record all."""


class _Save(NamedTuple):
    """A save in flight."""

    partial: Path
    """Directory that is being written, `step-N.partial`."""
    manifest: CheckpointManifest
    """Manifest without its files."""
    writing: Future[None]
    """Writing of this rank's own file."""


class Saver:
    """Writer of the checkpoints of one run. All ranks call its methods after the same steps."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        run: RunDirectory,
        mesh: Mesh,
        config: TrainConfig,
        max_failed: int,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._run = run
        self._mesh = mesh
        self._config = config
        self._max_failed = max_failed
        self._num_failed = 0
        """Number of consecutive failed saves."""
        self._progress = progress
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # one thread: a removal ends before the next save is written
        self._host: dict[str, Tensor] = {}
        """Buffers in host memory, kept between saves."""
        self._save: _Save | None = None
        self._publishing: tuple[int, Future[None] | None] | None = None
        """Step whose manifest rank 0 writes and whose directory it renames; the work itself on rank 0 only."""

    @property
    def status(self) -> Status:
        """Progress of this rank's own file of the save in flight."""
        if self._save is None:
            return "idle"
        if not self._save.writing.done():
            return "writing"
        return "failed" if self._save.writing.exception() else "written"

    def begin(self, state: TrainState) -> float:
        """Copy the ranges that this rank owns and start writing them; return the seconds that training waited.

        No save may be in flight.
        """
        # Only the copy is waited for: the weights may change once this function has returned.
        assert self._save is None, "the previous save is finished"
        started = time.perf_counter()
        fragments = owned(self._engine, self._mesh)
        # Each is a view of the optimizer's fp32 buffer, [numel], which the next step changes in place.
        tensors = {f"{f.parameter.name}/{kind}": t for f in fragments for kind, t in f.tensors.items()}
        copies = self._copied(tensors)
        whole = {
            p.name: ParameterEntry(shape=p.shape, cut=p.cut and (p.cut.dim, p.cut.stride))
            for p in parameters(self._engine, self._mesh.tensor_size)
        }
        partial = self._run.checkpoints / (checkpoint_name(state.step) + PARTIAL)
        ranges = {f.parameter.name: (f.start, f.numel) for f in fragments}
        writing = self._thread.submit(self._write, partial, copies, ranges)
        self._save = _Save(partial, CheckpointManifest(state=state, parameters=whole), writing)
        return time.perf_counter() - started

    def settle(self, num_written: int, num_failed: int) -> None:
        """Complete or drop the save in flight once every rank has written its file or failed to.

        All ranks pass the same two sums, so all of them complete or drop it after the same step. Raises CommonError
        after `max_failed` consecutive failed saves.
        """
        if self._save is None or num_written + num_failed < self._mesh.world_size:
            return  # some rank still writes
        (partial, manifest, writing), self._save = self._save, None
        if num_failed:
            if (error := writing.exception()) is not None:
                few = num_failed <= _MAX_WARNINGS
                self._report(manifest.state.step, error, on_terminal=few or self._mesh.rank == 0)
            if self._mesh.rank == 0:
                self._thread.submit(shutil.rmtree, partial, ignore_errors=True)  # no rank writes there any more
            self._count_failure(manifest.state.step)
        else:
            # The step on every rank: if rank 0 fails, all of them raise the same error.
            publishing = self._thread.submit(self._publish, partial, manifest) if self._mesh.rank == 0 else None
            self._publishing = manifest.state.step, publishing

    def finish(self) -> bool:
        """Wait for the save in flight; return whether it succeeded, True if there was none. Collective.

        Raises CommonError after `max_failed` consecutive failed saves.
        """
        failed_before = self._num_failed
        # First every rank's own file, then rank 0's manifest and rename: each has one sum over the ranks.
        if self._save is not None:
            failed = self._save.writing.exception() is not None  # waits
            # [written, failed]
            votes = torch.tensor([int(not failed), int(failed)], device=self._mesh.device)
            dist.all_reduce(votes)
            self.settle(*votes.tolist())
        votes = torch.zeros(2, dtype=torch.int64, device=self._mesh.device)  # [published, failed]
        step, publishing = self._publishing or (0, None)
        if publishing is not None:
            error = publishing.exception()  # waits
            votes[int(error is not None)] = 1
            if error is not None:
                self._report(step, error, on_terminal=True)
        self._publishing = None
        dist.all_reduce(votes)
        published, lost = votes.tolist()
        if lost:
            self._count_failure(step)
        if published:
            self._num_failed = 0
        return bool(published) or self._num_failed == failed_before  # no failure either: there was no save

    def close(self) -> None:
        """End the thread after the write in progress."""
        self._thread.shutdown()

    def _report(self, step: int, error: BaseException, *, on_terminal: bool) -> None:
        """Log and record this rank's own failure."""
        message = f"rank {self._mesh.rank} could not save step {step}: {error}"
        log.error("%s", message)
        if on_terminal:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._run.record_event("save failed", step, message)

    def _count_failure(self, step: int) -> None:
        self._num_failed += 1
        if self._num_failed >= self._max_failed:
            raise CommonError(
                f"faults.max_failed_saves = {self._max_failed}: step {step} could not be saved, nor the "
                f"{self._num_failed - 1} saves before it, for the reasons in {self._run.events_file}; make room in "
                f"{self._run.checkpoints}, and the same command continues from the last checkpoint"
            )

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in host memory, which is page-locked if there is a GPU and is reused by later saves."""
        cuda = self._mesh.device.type == "cuda"
        for name, tensor in tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
            self._host[name].copy_(tensor, non_blocking=cuda)
        if cuda:
            # The copies are queued behind the step that computed the weights; the thread must not read them before.
            torch.cuda.current_stream().synchronize()
        return {name: self._host[name] for name in tensors}

    def _write(self, partial: Path, tensors: Mapping[str, Tensor], ranges: dict[str, tuple[int, int]]) -> None:
        partial.mkdir(exist_ok=True)  # not its parents: the run directory may have been moved away
        file = partial / f"rank-{self._mesh.rank:05d}.safetensors"
        num_bytes, sha256 = write_safetensors(file, tensors, self._progress)
        entry = FileEntry(bytes=num_bytes, sha256=sha256, slice=self._mesh.tensor_rank, ranges=ranges)
        file.with_suffix(".json").write_text(json.dumps(asdict(entry)))  # rank 0 reads it once all have written

    def _publish(self, partial: Path, manifest: CheckpointManifest) -> None:
        try:
            self._complete(partial, manifest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk its room is needed for the next save
            raise
        self._run.record_save(manifest.state.step)
        keep = self._config.keep_checkpoints, self._config.keep_checkpoint_every_steps
        try:
            for gone in prune_checkpoints(self._run.checkpoints, *keep):
                log.info("removed %s", gone)
        except OSError as error:  # the save itself has succeeded; the next one tries again
            log.warning("retention could not remove a checkpoint: %s", error)
            self._run.record_event("not removed", manifest.state.step, str(error))

    def _complete(self, partial: Path, manifest: CheckpointManifest) -> None:
        """Add the ranks' files to the manifest, write it, and give the directory its final name."""
        for rank in range(self._mesh.world_size):
            # The file describes itself, so that no rank has to send its ranges to rank 0.
            part = partial / f"rank-{rank:05d}.json"
            manifest.files[f"rank-{rank:05d}.safetensors"] = FileEntry(**json.loads(part.read_text()))
            part.unlink()  # a complete checkpoint has only files that its manifest names
            self._progress()
        write_checkpoint_manifest(partial, manifest)
        log.info("saved %s", publish_checkpoint(partial))
