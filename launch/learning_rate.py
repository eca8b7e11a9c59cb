"""The learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable

from .config import TrainConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Share of a fall that is left after a part of it, from 1 at 0 to 0 at 1; "sqrt": the 1 - sqrt of arXiv 2405.18392."""


def learning_rate(step: int, train: TrainConfig) -> float:
    """Return the rate of `step`, by phases: warm-up, cool-down, constant, decay.

    It rises linearly over warmup_steps, falls by half a cosine over cooldown_steps to the constant rate (the infinite
    learning-rate schedule of arXiv 2403.08763), stays there, and decays over the last decay_steps to
    min_learning_rate. Only the decay depends on the number of steps. Without cool-down this is WSD (arXiv 2404.06395),
    and without a constant phase either, the cosine learning-rate schedule.
    """
    peak, constant = train.learning_rate, train.constant_learning_rate or train.learning_rate
    if step <= train.warmup_steps:  # never without warm-up: steps count from 1
        return train.initial_learning_rate + (peak - train.initial_learning_rate) * step / train.warmup_steps
    cooled = train.warmup_steps + train.cooldown_steps
    if step <= cooled:
        return constant + (peak - constant) * DECAYS["cosine"]((step - train.warmup_steps) / train.cooldown_steps)
    decay_steps = train.decay_steps or train.steps - cooled
    decayed = step - (train.steps - decay_steps)  # steps of the decay, this one included
    if decayed <= 0:
        return constant
    if train.decay == "exponential":
        return constant * (train.min_learning_rate / constant) ** (decayed / decay_steps)
    left = DECAYS[train.decay](decayed / decay_steps)
    return train.min_learning_rate + (constant - train.min_learning_rate) * left
