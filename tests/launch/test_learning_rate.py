"""The learning rate of every step, against torch's and transformers' schedules and the formulas of the papers."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from longring.launch.config import TrainConfig
from longring.launch.learning_rate import learning_rate
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

PEAK, STEPS = 2.0, 40


def rates(**settings: Any) -> list[float]:
    """Return the rates of all steps; 0 stands before the first."""
    train = TrainConfig(global_batch_tokens=1, **{"steps": STEPS, "learning_rate": PEAK, **settings})
    return [learning_rate(step, train) for step in range(1, train.steps + 1)]


def rates_of(make: Any, steps: int = STEPS) -> list[float]:
    """Return the rates that a scheduler, made from an optimizer, has at steps 1 to `steps`; its own count is from 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler: LRScheduler = make(optimizer)
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


def wsd(decay_type: str, warmup: int, decay: int, smallest: float) -> Any:
    return partial(
        get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=STEPS,
        decay_type=decay_type,
        min_lr_ratio=smallest / PEAK,
    )


@pytest.mark.parametrize("smallest", [0.0, 0.5])
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_default_is_the_cosine_schedule(warmup, smallest):
    expected = rates_of(
        partial(
            get_cosine_with_min_lr_schedule_with_warmup,
            num_warmup_steps=warmup,
            num_training_steps=STEPS,
            min_lr=smallest,
        )
    )
    assert rates(warmup_steps=warmup, min_learning_rate=smallest) == pytest.approx(expected)


@pytest.mark.parametrize("smallest", [0.0, 0.5])
@pytest.mark.parametrize("form", [("cosine", "cosine"), ("linear", "linear"), ("sqrt", "1-sqrt")], ids=lambda f: f[0])
def test_decay_steps_make_it_wsd(form, smallest):
    ours, theirs = form
    expected = rates_of(wsd(theirs, warmup=5, decay=10, smallest=smallest))
    # transformers begins the warm-up of this one at the smallest rate.
    ends = {"initial_learning_rate": smallest, "min_learning_rate": smallest}
    found = rates(warmup_steps=5, decay_steps=10, decay=ours, **ends)
    assert found == pytest.approx(expected)
    assert found[4:30] == [PEAK] * 26  # from the end of warm-up to the last step before the decay


def test_cooldown_steps_make_it_the_infinite_schedule():
    """Warm-up, cool-down and constant by torch's schedulers, the annealing by the paper's formula."""
    constant, smallest = 0.8, 0.1

    def scheduler(optimizer: torch.optim.Optimizer) -> LRScheduler:
        parts = [
            LinearLR(optimizer, 1e-9, 1.0, total_iters=4),
            CosineAnnealingLR(optimizer, T_max=10, eta_min=constant),
            ConstantLR(optimizer, constant / PEAK, total_iters=1000),
        ]
        return SequentialLR(optimizer, parts, milestones=[4, 14])

    until_decay = rates_of(scheduler, steps=32)
    annealed = [constant * (smallest / constant) ** (k / 8) for k in range(1, 9)]
    found = rates(
        **{"warmup_steps": 4, "cooldown_steps": 10, "constant_learning_rate": constant},
        **{"decay_steps": 8, "decay": "exponential", "min_learning_rate": smallest},
    )
    assert found == pytest.approx(until_decay + annealed, rel=1e-6)


def test_warm_up_begins_at_the_initial_rate():
    found = rates(warmup_steps=4, initial_learning_rate=1.0, decay_steps=1)
    assert found[:5] == [1.25, 1.5, 1.75, 2.0, 2.0]


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """Return a schedule of 30 steps or more."""
    cooldown = draw(st.integers(0, 10))
    constant = draw(st.floats(0.01, PEAK)) if cooldown else PEAK
    decay = draw(st.sampled_from(["cosine", "linear", "sqrt", "exponential"]))
    return {
        "warmup_steps": draw(st.integers(0, 9)),
        "initial_learning_rate": draw(st.floats(0, PEAK)),
        "cooldown_steps": cooldown,
        "constant_learning_rate": constant if cooldown else 0.0,
        "decay_steps": draw(st.integers(1, 10)),
        "decay": decay,
        "min_learning_rate": draw(st.floats(1e-3 * constant if decay == "exponential" else 0.0, constant)),
    }


@given(schedule=schedules(), steps=st.integers(30, 60), longer=st.integers(1, 1000))
def test_only_the_decay_depends_on_the_number_of_steps(schedule, steps, longer):
    found, more = rates(**schedule, steps=steps), rates(**schedule, steps=steps + longer)
    same = steps - schedule["decay_steps"]
    assert found[:same] == more[:same]
    assert found[-1] == pytest.approx(schedule["min_learning_rate"])
    assert more[-1] == pytest.approx(schedule["min_learning_rate"])


@given(schedule=schedules(), steps=st.integers(30, 60))
def test_rates_rise_to_the_peak_and_then_fall(schedule, steps):
    found = rates(**schedule, steps=steps)
    warmup = schedule["warmup_steps"]
    rising, falling = found[:warmup], found[max(warmup - 1, 0) :]
    assert rising == sorted(rising)
    assert all(math.isfinite(rate) for rate in found)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(falling))
    assert max(found) <= PEAK * (1 + 1e-12)
