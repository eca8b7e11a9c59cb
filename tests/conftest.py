"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from helpers.ranks import on_ranks

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before any test module
torch.set_num_threads(1)  # the tensors of tests are small: threads that wait for each other cost more than they save
# Examples are not timed: a busy machine is no wrong answer.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", name="on_ranks")
def _on_ranks() -> Callable[..., list[Any]]:
    """Return `on_ranks(world_size, function, *args)`: the function's results by rank, from processes joined by gloo."""
    return on_ranks
