"""Time of a step by part: what one part waits for other ranks is no time of its own."""

from __future__ import annotations

from itertools import count

import pytest
import torch
import torch.distributed as dist
from longring.launch import parts
from longring.launch.parts import Parts


def waits(num_waits: int) -> dict[str, float]:
    """Return the ms of parts by a clock that advances a second a look, with waits for `num_waits` reductions."""
    measured, ticks, tensor = Parts(torch.device("cpu")), count(), torch.ones(2)
    before, parts.time.perf_counter = parts.time.perf_counter, lambda: float(next(ticks))
    own = dist.Work.wait
    try:
        with measured.part("data"), measured.messages():
            dist.all_reduce(tensor)
        with measured.messages(), measured.part("forward"):
            for _ in range(num_waits):
                dist.all_reduce(tensor)
        with measured.part("sum"):  # what is waited for here has a name of its own
            dist.all_reduce(tensor)
        with pytest.raises(ZeroDivisionError), measured.messages():
            _ = 1 / 0
    finally:
        parts.time.perf_counter = before
    assert dist.Work.wait is own
    return measured.take()


def test_a_wait_counts_as_communication_and_not_to_its_part(on_ranks):
    # Each wait looks at the clock twice, and so takes a second; the part looks once before and once after all of them.
    [found] = on_ranks(1, waits, 3)
    assert found == {"communication": 4e3, "data": 2e3, "forward": 4e3, "sum": 1e3}
