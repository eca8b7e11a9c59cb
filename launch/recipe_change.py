"""A change of recipe between two starts: accepted if the steps done would have been the same under both recipes.

A key decides nothing about them, or their learning rates and batches alone, or more. Keys of the first kind are free.
Those of the second are judged by their effect: both recipes are laid out over the steps done and compared step by step.
All others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..data.read.batch_order import BatchOrder
from .config import Recipe
from .identity import changes
from .learning_rate import learning_rate
from .renewals import renewal_steps
from .settings import flat, to_tree

FREE = (
    *("run_directory", "data.directory", "order.directory", "order.work_directory"),
    *("evaluate.", "faults.", "parallel.", "slurm.", "track."),
    *("loader.workers", "loader.prefetch_batches", "loader.cache_", "loader.hash_"),
    *("train.ranks_per_node", "train.checkpoint_every_steps", "train.keep_checkpoint", "train.deterministic"),
    *("train.attention_backend", "train.memory.", "train.profile", "train.evaluate_", "train.gradient_norms"),
)
"""Beginnings of the keys that may always change. Run and data may be moved, as a checkpoint knows its data by hash. The
ranks and kernels may divide the work in another way, with the same batches, and losses equal up to rounding."""
RATES = (
    *("train.steps", "train.learning_rate", "train.initial_learning_rate", "train.warmup_steps"),
    *("train.cooldown_steps", "train.constant_learning_rate"),
    *("train.decay_steps", "train.decay", "train.min_learning_rate"),
)
"""Keys that decide the learning rates of a run."""
BATCHES = ("train.steps", "curriculum.", "loader.window_tokens")
"""Beginnings of the keys that decide which batches the steps of a run train on, the size of a batch aside."""


def check_change(before: Recipe, now: Recipe, steps_done: int, order_of: Callable[[Recipe], BatchOrder]) -> None:
    """Raise ValueError unless the steps that a run has done with one recipe would have been the same with another.

    The error names the keys, their values and the first step that would have been different. `order_of` returns the
    order of batches under a recipe.
    """
    changed = changes(flat(to_tree(before)), flat(to_tree(now)))
    judged = {key: values for key, values in changed.items() if not key.startswith(FREE)}
    for key, values in judged.items():
        if not key.startswith((*RATES, *BATCHES)):
            raise _refusal({key: values}, steps_done, 1, "would have been different")
    # A run that has done more steps than the recipe has is compared as far as the recipe goes.
    last = min(steps_done, now.train.steps)
    found: list[tuple[int, tuple[str, ...], str]] = []
    if any(key in RATES for key in judged):
        step = _first_other_rate(before, now, last)
        if step is not None:
            then, wanted = learning_rate(step, before.train), learning_rate(step, now.train)
            found.append((step, RATES, f"would have had learning rate {wanted!r}, and had {then!r}"))
    if any(key.startswith(BATCHES) for key in judged):
        orders = order_of(before), order_of(now)
        step = orders[0].first_difference(orders[1], last)
        # Steps after which only the new recipe measures losses, from which the batches after them follow.
        added = set(renewal_steps(now)) - set(renewal_steps(before))
        if unmeasured := [done for done in added if done < last]:
            found.append((min(unmeasured) + 1, BATCHES, "would have followed losses that were not measured"))
        if step is not None:
            then, wanted = (lengths_of(order, step) for order in orders)
            batch = f"of bucket {wanted}, and had one of {then}" if wanted != then else "of other sequences"
            found.append((step, BATCHES, f"would have had a batch {batch}"))
    if last < steps_done:
        found.append((last + 1, ("train.steps",), "would not have been done"))
    if found:
        step, keys, said = min(found)  # by step
        raise _refusal({key: judged[key] for key in judged if key.startswith(keys)}, steps_done, step, said)


def lengths_of(order: BatchOrder, step: int) -> str:
    """Return the buckets of a step as text, longest first: "2048", or "2048 x 2, 512 x 32" with their sequences."""
    batch = order.batch(step)
    if len(batch) == 1:
        return str(order.lengths[batch[0].bucket])
    return ", ".join(f"{order.lengths[stretch.bucket]} x {stretch.sequences}" for stretch in batch)


def _first_other_rate(before: Recipe, now: Recipe, last: int) -> int | None:
    """Return the first of steps 1 to `last` that has another learning rate, or None."""
    # Not vectorized: numpy's cosine and math's may differ in the last bit, and these are the rates that steps have.
    a, b = before.train, now.train
    return next((step for step in range(1, last + 1) if learning_rate(step, a) != learning_rate(step, b)), None)


def _refusal(keys: Mapping[str, tuple[Any, Any]], steps_done: int, step: int, said: str) -> ValueError:
    """Return the error of a change of these keys, which alters `step`."""
    now = ", ".join(f"{key} = {_text(value)}" for key, (_, value) in keys.items())
    then = ", ".join(_text(value) for value, _ in keys.values())
    return ValueError(
        f"{now}: was {then} in the {steps_done:,} steps done, and step {step:,} {said}; set it back to {then}, or name "
        "another run_directory"
    )


def _text(value: Any) -> str:
    """Return a value as text; a key of a table that the other recipe lacks is unset."""
    return "unset" if value is None else repr(value) if isinstance(value, str) else str(value)
