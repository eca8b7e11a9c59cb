"""Detection of steps with non-finite gradients and of loss spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Literal

from .checkpoint.format import TrainState
from .config import FaultsConfig


class LossWatch:
    """Detector of non-finite steps and of spikes. Its input is equal on all ranks, so all ranks decide alike."""

    def __init__(self, config: FaultsConfig, recent_losses: Iterable[float] = ()) -> None:
        self._config = config
        self._recent = deque(recent_losses, maxlen=config.spike_window_steps)
        self._nonfinite = 0  # consecutive steps
        self._rewinds = 0  # in this start

    @property
    def recent(self) -> tuple[float, ...]:
        """Losses of the last good steps, oldest first, from which the next spike is detected."""
        return tuple(self._recent)

    def judge(self, step: int, loss: float, grad_norm: float) -> Literal["good", "non-finite", "spike"]:
        """Return the outcome of the step just done.

        After a gradient norm that is not finite the engine has changed no weights and no moments. Raises
        ArithmeticError after faults.max_nonfinite_steps consecutive steps of this kind, and if the loss is not finite
        although the norm is, since the weights may then be corrupt.
        """
        if not math.isfinite(grad_norm):
            self._nonfinite += 1
            if self._nonfinite >= self._config.max_nonfinite_steps:
                raise ArithmeticError(
                    f"faults.max_nonfinite_steps = {self._config.max_nonfinite_steps}: {self._nonfinite} consecutive "
                    f"steps had gradients that are not finite, the last of them step {step} with loss {loss}; lower "
                    "train.learning_rate in a new run_directory, or look at the sequences that the logs name"
                )
            return "non-finite"
        if not math.isfinite(loss):
            raise ArithmeticError(
                f"step {step}: loss {loss} with gradient norm {grad_norm}, so the weights may be corrupt; give the "
                "same command again to continue from the last checkpoint"
            )
        self._nonfinite = 0
        if self._is_spike(loss):
            return "spike"  # its loss does not enter the spike window
        self._recent.append(loss)
        return "good"

    def rewound(self, step: int, loss: float, to: TrainState | None) -> None:
        """Record a rewind to the state `to`; None: there was no checkpoint, so the run continues from the spike.

        Raises ArithmeticError after more than faults.max_rewinds.
        """
        self._rewinds += 1
        if self._rewinds > self._config.max_rewinds:
            raise ArithmeticError(
                f"faults.max_rewinds = {self._config.max_rewinds}: step {step} with loss {loss} is one more spike in "
                "this start; raise faults.spike_skip_steps to leave out more batches, or lower train.learning_rate in "
                "a new run_directory"
            )
        # The losses since the checkpoint belong to steps that are done again. Without a checkpoint detection starts
        # over, and no loss is a spike before the spike window is full.
        self._recent.clear()
        self._recent.extend(to.recent_losses if to else ())

    def _is_spike(self, loss: float) -> bool:
        recent, config = self._recent, self._config
        if not config.spike_deviations or len(recent) < config.spike_window_steps:
            return False
        return loss > statistics.fmean(recent) + config.spike_deviations * statistics.stdev(recent)
