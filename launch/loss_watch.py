"""Which steps are no good: gradients that are not finite, losses far above the ones before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Literal

from .checkpoint.format import TrainState
from .config import FaultsConfig


class LossWatch:
    """Judges every step by numbers that all ranks share, so that all come to the same end."""

    def __init__(self, config: FaultsConfig, recent_losses: Iterable[float] = ()) -> None:
        self._config = config
        self._recent = deque(recent_losses, maxlen=config.spike_window_steps)
        self._nonfinite = 0
        self._rewinds = 0

    @property
    def recent(self) -> tuple[float, ...]:
        """Losses of the last good steps, oldest first; the next one is told by them."""
        return tuple(self._recent)

    def judge(self, step: int, loss: float, grad_norm: float) -> Literal["good", "non-finite", "spike"]:
        """What the step just done was. Raises ArithmeticError at the last non-finite step in a row that is borne.

        A gradient norm that is not finite means that the engine has left weights and moments as they were. A loss that
        is not, with one that is, must not happen: then the weights are lost.
        """
        if not math.isfinite(grad_norm):
            self._nonfinite += 1
            if self._nonfinite >= self._config.max_nonfinite_steps:
                raise ArithmeticError(
                    f"step {step}: {self._nonfinite} steps in a row had no finite gradients "
                    f"(faults.max_nonfinite_steps = {self._config.max_nonfinite_steps}); the last had loss {loss}: "
                    "lower train.learning_rate, or look at the batches that the ranks' logs name"
                )
            return "non-finite"
        if not math.isfinite(loss):
            raise ArithmeticError(
                f"step {step}: loss {loss} with a gradient norm of {grad_norm}: the weights can be trusted no more"
            )
        self._nonfinite = 0
        if self._is_spike(loss):
            return "spike"
        self._recent.append(loss)
        return "good"

    def rewound(self, step: int, loss: float, to: TrainState | None) -> None:
        """Note that the run has gone back to `to`; None: there was no checkpoint before the spike, so it goes on.

        Raises ArithmeticError after faults.max_rewinds.
        """
        self._rewinds += 1
        if self._rewinds > self._config.max_rewinds:
            raise ArithmeticError(
                f"step {step}: loss {loss} is a spike, and so were {self._config.max_rewinds} before it in this start "
                "(faults.max_rewinds): lower train.learning_rate, or leave out more batches by faults.spike_skip_steps"
            )
        self._recent.clear()
        self._recent.extend(to.recent_losses if to else ())

    def _is_spike(self, loss: float) -> bool:
        recent, config = self._recent, self._config
        if not config.spike_deviations or len(recent) < config.spike_window_steps:
            return False
        return loss > statistics.fmean(recent) + config.spike_deviations * statistics.stdev(recent)
