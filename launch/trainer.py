"""One rank's part of a start: its state, a training step, and the responses to spikes, signals and saves.

The loop in `launch/train.py` calls it. All ranks call the same methods in the same order.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from torch import Tensor

from ..data.files import write_text
from ..data.format.damage import DamagedDataError
from ..data.read.batch_order import ReplicaShare, Trained
from ..data.read.loader import Loader, MicroBatch
from ..kernels.compilations import Compilations
from ..parallel.gradient_norms import GradientNorms
from ..parallel.mesh import Mesh
from ..parallel.replicas import drifted_ranks
from ..parallel.zero import DeepSpeedEngine, gradient_norm, set_learning_rate
from .build import BucketLayout
from .checkpoint.format import TrainState, checkpoint_name
from .checkpoint.load import load_last_good
from .checkpoint.save import Saver
from .config import Recipe
from .errors import CommonError, rank_names
from .evaluation.in_training import EvaluationsInTraining, evaluation_line
from .evaluation.renewal import measure_renewal
from .learning_rate import learning_rate
from .loss_watch import LossWatch
from .meter import Meter
from .metrics import BucketMetrics, MetricsWriter, StepMetrics, ledger_entry, trained_table
from .preflight import Preflight
from .profile import StepProfiler
from .ranks.signals import StopSignals
from .ranks.watchdog import Watchdog
from .redact import redact
from .renewals import append_renewal, renewal_line, renewal_steps, shares_between
from .together import on_rank_0
from .totals import Totals, sum_over_ranks, trained_targets

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """One start of a run on one rank; a context manager that ends threads and closes files when it is left."""

    recipe: Recipe
    checked: Preflight
    mesh: Mesh
    console: Console
    signals: StopSignals
    watchdog: Watchdog
    last: int
    """Last step of this start."""
    engine: DeepSpeedEngine
    layouts: dict[int, BucketLayout]
    """Layout of every bucket, by sequence length."""
    loader: Loader
    losses: LossWatch
    saver: Saver
    writer: MetricsWriter | None
    """Rank 0 only."""
    state: TrainState
    """Progress of the run; `state.step` is the number of steps done."""
    left_out: set[int] = field(default_factory=set)
    """Numbers of the steps whose batches are left out after a spike."""
    stopped_by: str | None = None
    """Signal that ends this start, once all ranks know of it."""

    def __post_init__(self) -> None:
        self._compilations = Compilations()
        self._meter = Meter(self.recipe, self.checked.manifest, self.mesh)
        self._profiler = StepProfiler(self.recipe.train, self.checked.run.logs, self.mesh.rank)
        self._micro_batches = self.loader.batches(self.state.step, self.last)
        self._renewal_steps = renewal_steps(self.recipe)
        self._norms = GradientNorms(self.engine, self.mesh, self.recipe.train.gradient_norms_every_steps)
        self.evaluations = EvaluationsInTraining(
            self.recipe,
            self.checked.run,
            self.checked.manifest,
            self.mesh,
            self.engine,
            self.layouts,
            self.watchdog.at,
            lambda: self.signals.received is not None,
        )

    def __enter__(self) -> Self:
        self._compilations.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, ArithmeticError):  # raised by all ranks alike, so the save in flight can be finished
            self.saver.finish()
        self._profiler.close()
        self.saver.close()
        self._micro_batches.close()
        self._compilations.__exit__(kind, error, traceback)
        if self.writer is not None:
            self.writer.close()

    def train_step(self) -> StepMetrics:
        """Do the next step: read its batch, compute gradients, update the weights, record it. Collective.

        Raises OSError if a shard cannot be read or the step cannot be recorded, CommonError after too many failed
        saves, and ArithmeticError as `LossWatch.judge` does.
        """
        started = time.perf_counter()
        step, order, train = self.state.step + 1, self.checked.order, self.recipe.train
        self._profiler.before(step)
        self._norms.before(step)
        rate = learning_rate(step, train)
        set_learning_rate(self.engine, rate)

        sequences = {order.lengths[stretch.bucket]: stretch.sequences for stretch in order.batch(step)}
        micro_batches, targets = self._batch(step, sequences)  # targets [buckets]
        if step in self.left_out:
            for _ in micro_batches:  # the loader yields every step in turn, so this one is read as well
                pass
            loss_sums = self._no_losses()
        else:
            with self._meter.parts.messages():
                loss_sums = self._compute_gradients_and_update(step, micro_batches, sum(targets))

        totals = self._sum_over_ranks(step, loss_sums)
        loss, grad_norm, outcome = self._judge(step, sum(totals.loss_sums) / sum(targets))
        computed = step not in self.left_out
        buckets = {
            length: BucketMetrics(targets=count, loss=loss_sum / count if count and computed else math.nan)
            for length, count, loss_sum in zip(self.layouts, targets, totals.loss_sums, strict=True)
            if length in sequences
        }

        seconds = time.perf_counter() - started
        self._profiler.after(step)  # the clock is read before it, since it may write the trace
        tokens = {length: length * number for length, number in sequences.items()} if computed else {}
        metrics = StepMetrics(
            step=step,
            tokens=self.state.updates * train.global_batch_tokens,  # `_judge` has counted this step
            targets=sum(targets),
            loss=loss,
            bucket=max(buckets),
            cp=self.layouts[max(buckets)].context_parallel,
            buckets=buckets,
            learning_rate=rate,
            grad_norm=grad_norm,
            grad_norms=self._norms.take(grad_norm),
            step_ms=seconds * 1e3,
            tokens_per_s=train.global_batch_tokens / seconds,
            **self._meter.utilization(totals.attention_flops, tokens, seconds)._asdict(),
            bits_per_byte=self._meter.bits_per_byte(loss),
            ms=self._meter.parts.take(),  # the sum over the ranks has been read, so the GPU is done with the step
            memory=self._meter.parts.memory(),
            compilations=totals.compilations,
            outcome=outcome,
        )
        if self.writer is not None:
            self.writer.write(metrics)
        return metrics

    def _batch(self, step: int, sequences: Mapping[int, int]) -> tuple[Iterable[MicroBatch], list[int]]:
        """Return the step's micro-batches, and the number of trained targets of the global batch by bucket.

        `sequences` has the number of sequences by length. Collective with knots.
        """
        # Lazy: a micro-batch is taken from the loader once the one before it has been computed.
        micro_batches = self._read(step)
        if not self.recipe.knots.share:
            return micro_batches, [length * sequences.get(length, 0) for length in self.layouts]
        # Knots leave targets out, and the loss is a mean over those that count.
        all_read = list(micro_batches)
        return all_read, trained_targets(all_read, self.layouts, self.mesh)

    def _read(self, step: int) -> Iterator[MicroBatch]:
        """Yield the step's micro-batches, each read when it is asked for."""
        for number in range(self.recipe.accumulation_steps(self.mesh.world_size)):
            self.watchdog.at(step, f"reading micro-batch {number}")
            with self._meter.parts.part("data", on_host=True):
                micro_batch = read(self._micro_batches, step, self.mesh.rank)
            yield micro_batch

    def _no_losses(self) -> Tensor:
        """Return the sums of no losses by bucket: zeros, fp64 `[buckets]`."""
        return torch.zeros(len(self.layouts), dtype=torch.float64, device=self.mesh.device)

    def _compute_gradients_and_update(self, step: int, micro_batches: Iterable[MicroBatch], targets: int) -> Tensor:
        """Take the micro-batches through forward and backward, then update; `targets` are those of the global batch.

        Returns this rank's sums of losses by bucket, fp64 `[buckets]`.
        """
        # The engine averages gradients over data ranks and accumulation steps; the loss of a step is the mean over the
        # trained targets of the global batch, wherever they lie.
        loss_scale = self.mesh.data_size * self.recipe.accumulation_steps(self.mesh.world_size) / targets
        part = self._meter.parts.part
        loss_sums, index = self._no_losses(), {length: index for index, length in enumerate(self.layouts)}
        for number, micro_batch in enumerate(micro_batches):
            self.watchdog.at(step, f"forward and backward of micro-batch {number} of bucket {micro_batch.length}")
            layout = self.layouts[micro_batch.length]
            rows, starts, prepared = micro_batch.rows, micro_batch.document_starts, micro_batch.prepared
            inputs = layout.model_inputs(rows, starts, self.mesh.device, prepared)
            self._meter.add(micro_batch, layout)
            with part("forward"):
                token_losses = self.engine(*inputs)  # [b, s]
            token_losses = token_losses * layout.trained(micro_batch.trained, token_losses, inputs[2])
            with part("backward"):
                self.engine.backward(token_losses.sum() * loss_scale)
            with part("optimizer"):
                self.engine.step()  # changes the weights after the last micro-batch only
            loss_sums[index[micro_batch.length]] += token_losses.detach().sum(dtype=torch.float64)
        return loss_sums

    def _sum_over_ranks(self, step: int, loss_sums: Tensor) -> Totals:
        """Return the sums of a step over the ranks; act on signals and saves of any rank. Collective."""
        self.watchdog.at(step, "summing over the ranks")
        compiled, self._compilations.count = self._compilations.count, 0
        flops, stopped = self._meter.take_attention_flops(), self.signals.received is not None
        with self._meter.parts.part("sum", on_host=True):
            totals = sum_over_ranks(loss_sums, flops, stopped, self.saver.status, compiled, self.mesh)
        if totals.num_stopped:
            self.stopped_by = self.signals.received or "a signal to another rank"
        self.saver.settle(totals.num_written, totals.num_failed)
        return totals

    def _judge(self, step: int, loss: float) -> tuple[float, float, str]:
        """Count the step as done; return its loss, gradient norm and outcome, which are equal on all ranks."""
        grad_norm, outcome = math.nan, "left out"
        if step in self.left_out:
            loss = math.nan  # the sum over the ranks was 0: nothing was computed
        else:
            grad_norm = gradient_norm(self.engine)
            outcome = self.losses.judge(step, loss, grad_norm)
        skipped = self.state.skipped  # without spikes, which have changed the weights
        if outcome in ("non-finite", "left out"):
            skipped = (*skipped, step)
        if outcome == "non-finite":
            self._report_non_finite(step)
        self.state = replace(self.state, step=step, skipped=skipped)
        return loss, grad_norm, outcome

    def go_back(self, spike: StepMetrics) -> bool:
        """Return to the last checkpoint before a spike, and leave its batches out from now on. Collective.

        Returns False if there is no checkpoint; the run then continues from the spike. Raises ArithmeticError after
        more than faults.max_rewinds, and ValueError if all checkpoints are damaged.
        """
        step = spike.step
        self.watchdog.at(step, "going back before a loss spike")
        # A save in flight holds a step before the spike, so it may be the checkpoint to return to.
        self.saver.finish()
        checked = self.checked
        found = load_last_good(self.engine, checked.run.checkpoints, self.mesh, checked.check_checkpoint)
        self.losses.rewound(step, spike.loss, found and found[1])
        if found is None:
            return False
        _, before, _ = found
        self.left_out.update(range(step - self.recipe.faults.spike_skip_steps + 1, step + 1))
        self.tell(
            "spike",
            step,
            f"loss {spike.loss:.4g}: back to step {before.step}, leaving out steps {sorted(self.left_out)}",
        )
        # Steps after the checkpoint are done again, with the same numbers and batches, except those left out.
        self.state = replace(self.state, step=before.step, skipped=before.skipped)
        self._micro_batches.close()  # it has read ahead, beyond the spike
        self._micro_batches = self.loader.batches(before.step, self.last)
        if self.writer is not None:
            self.writer.rewind(before.step)
        return True

    def evaluate(self) -> None:
        """Evaluate the weights, and record it. Collective.

        A signal ends it without a record; the next start then begins with it.
        """
        step = self.state.step
        with self._meter.parts.part("evaluate", on_host=True):
            found = self.evaluations.measure(step)
        if found is None:
            self.stopped_by = self.signals.received or "a signal to another rank"
            return
        self.tell("evaluation", step, evaluation_line(found))
        if self.writer is not None and found["buckets"]:
            try:
                self.evaluations.record(step, found)
                self.writer.write_evaluation(step, found)
            except OSError as error:  # training needs no evaluation
                log.error("the evaluation after step %d is not recorded: %s", step, error)

    def renew(self) -> None:
        """Measure the losses of the sources if a cycle has ended, and go on with their new shares. Collective.

        A renewal that is on record is not measured again: the order of this start follows from it. Raises
        ArithmeticError if a loss is not finite, and CommonError if the renewal cannot be recorded.
        """
        step, checked, mesh = self.state.step, self.checked, self.mesh
        if step not in self._renewal_steps or step in {renewal.step for renewal in checked.renewals}:
            return
        with self._meter.parts.part("renew", on_host=True):
            at = partial(self.watchdog.at, step)
            renewal = measure_renewal(self.recipe, checked.manifest, mesh, self.engine, self.layouts, at, step)
            renewed = checked.with_renewals((*checked.renewals, renewal))
            end = next((other for other in self._renewal_steps if other > step), self.recipe.train.steps)
            shares = shares_between(renewed.order, step, end)
            # Before any step is trained by it: a checkpoint after it needs the record.
            record = partial(append_renewal, checked.run.renewals_file, checked.identity.run, renewal, shares)
            on_rank_0(mesh, record)
            self.checked, self.loader.order = renewed, renewed.order
            self._micro_batches.close()  # it has read ahead in the old order
            self._micro_batches = self.loader.batches(step, self.last)
        self.tell("renewal", step, renewal_line(renewal, shares))

    def save(self) -> None:
        """Begin to save the state; training waits for a copy in memory only. Collective.

        Raises CommonError after too many consecutive failed saves, and, before anything is saved, if a rank holds other
        weights than its replicas.
        """
        self.watchdog.at(self.state.step, "saving")
        self.saver.finish()  # there is one set of buffers, so one save at a time
        self._check_replicas()
        with self._meter.parts.part("save", on_host=True):
            waited = self.saver.begin(replace(self.state, recent_losses=self.losses.recent))
        log.info("saving step %d: training waited %.0f ms", self.state.step, waited * 1e3)
        if self.mesh.rank == 0:
            with suppress(OSError):  # the save itself reports a full disk
                self._record_trained()

    def _check_replicas(self) -> None:
        """Raise CommonError if a rank holds other weights than its replicas. Collective."""
        step = self.state.step
        self.watchdog.at(step, "comparing replicated weights")
        if not (drifted := drifted_ranks(self.engine, self.mesh)):
            return
        names = rank_names(drifted)
        self.tell("drift", step, f"{names}: weights are not those of the replicas")
        raise CommonError(
            f"{names}: weights after step {step} are not those of the replicas, so memory or a processor has failed; "
            "the step is not saved: exclude the machine, and the same command continues from the checkpoint before"
        )

    def finish_saving(self) -> None:
        """Wait until the last save is visible. Raises CommonError if it failed. Collective."""
        if not self.saver.finish():
            raise CommonError(
                f"step {self.state.step} could not be saved; the same command continues from the checkpoint before"
            )

    def tell(self, event: str, step: int, message: str) -> None:
        """Log an event; rank 0 also records it in the run's events and prints it."""
        message = redact(message)
        log.warning("step %d, %s: %s", step, event, message)
        if self.mesh.rank == 0:
            self.checked.run.record_event(event, step, message)
            self.console.print(f"step {step}, {event}: {message}", highlight=False, soft_wrap=True)

    def _report_non_finite(self, step: int) -> None:
        """Log the sequences of a step whose gradients are not finite, and tell of the step."""
        order = self.checked.order
        batch = order.batch(step)
        for stretch in batch:
            length = order.lengths[stretch.bucket]
            sequences = order.micro_batches(stretch, share_of(self.layouts[length])).tolist()  # [micro-batch][row]
            log.warning("step %d is not finite; sequences %s of bucket %d", step, sequences, length)
        lengths = ", ".join(str(order.lengths[stretch.bucket]) for stretch in batch)
        self.tell("step skipped", step, f"gradients are not finite, bucket {lengths}; logs/ name its sequences")

    def report(self) -> None:
        """Record the trained part of each cell, and print the last checkpoint; at the end of a run print the cells too.

        Rank 0 only.
        """
        run, step = self.checked.run, self.state.step
        trained = self._record_trained()
        self.console.print(f"saved {run.checkpoints / checkpoint_name(step)}", soft_wrap=True)
        if step == self.recipe.train.steps:
            self.console.print(trained_table(trained))
            if self.state.skipped:
                self.console.print(
                    f"{len(self.state.skipped)} of the {step} steps changed no weights: {run.events_file} says why"
                )

    def _record_trained(self) -> Sequence[Trained]:
        """Return the part of each cell that the steps so far have trained on, and record it. Rank 0 only."""
        step = self.state.step
        trained = self.checked.order.trained(step)
        entries = [ledger_entry(cell) for cell in trained]
        write_text(self.checked.run.trained_file, json.dumps({"step": step, "cells": entries}))
        return trained


def read(micro_batches: Iterator[MicroBatch], step: int, rank: int) -> MicroBatch:
    """Return the next micro-batch of `step`.

    Raises DamagedDataError for damaged data and OSError for data that cannot be read; both name the rank, as only one
    may notice.
    """
    try:
        micro_batch = next(micro_batches)
    except DamagedDataError as error:
        raise DamagedDataError(f"rank {rank}, step {step}: {error}") from error
    except OSError as error:
        raise OSError(f"rank {rank} cannot read its rows of step {step}: {error}") from error
    assert micro_batch.step == step, f"the loader is at step {micro_batch.step}, the run at step {step}"
    return micro_batch


def share_of(layout: BucketLayout) -> ReplicaShare:
    """Return the part of every micro-batch that this rank reads."""
    return ReplicaShare(layout.replica, layout.num_replicas, layout.sequences_per_replica)
