"""The learning rate of every step."""

from __future__ import annotations

import math

from .config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Return the rate of `step`: linear from 0 over warmup_steps, then half a cosine down to min_learning_rate."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    return (
        train.min_learning_rate
        + (train.learning_rate - train.min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
    )
