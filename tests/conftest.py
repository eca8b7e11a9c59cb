"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.ranks import Ranks

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before any test module


@pytest.fixture(scope="session")
def on_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`on_ranks(world_size, function, *args)`: the function's results by rank, on processes joined by gloo."""
    pools: dict[int, Ranks] = {}

    def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if world_size not in pools or not pools[world_size].alive:
            pools[world_size] = Ranks(world_size)
        return pools[world_size].run(function, *args)

    yield run
    for pool in pools.values():
        pool.stop()
