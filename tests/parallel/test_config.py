"""Settings under [parallel.cp]."""

from __future__ import annotations

import pytest
from longring.parallel.config import CpConfig
from longring.parallel.cp.grid import NAMED, CpGrid, grids


@pytest.mark.parametrize("name", NAMED)
def test_named_grids_have_the_number_of_ranks_asked_for(name):
    for size in (1, 2, 3, 4, 6, 8, 16):
        grid = CpConfig(schedule=name).named_grid(size)
        assert grid is not None
        assert grid.size == size


def test_a_number_of_ranks_may_have_its_own_grid():
    config = CpConfig(schedule="ring", schedule_of={"4": "query=2, kv=2", "8": "auto"})
    assert config.named_grid(2) == CpGrid.ring(2)
    assert config.named_grid(4) == CpGrid(query=2, kv=2)
    assert config.named_grid(8) is None


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_every_grid_can_be_written_down(size):
    for grid in grids(size):
        assert CpGrid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": "tokenring"}, "parallel.cp.schedule = 'tokenring': neither auto, ring, .* nor a grid"),
        ({"schedule": "query=0"}, "query = 0: must be at least 1"),
        ({"schedule": "query=two"}, "query = 'two': must be a number"),
        (
            {"schedule": "query=2, query_route=straight"},
            "query_route = 'straight': must be one of round, ",
        ),
        ({"schedule_of": {"4": "ringg"}}, "parallel.cp.schedule_of.4 = 'ringg'"),
        ({"schedule_of": {"four": "ring"}}, "schedule_of.four = 'ring': the key must be a number of ranks"),
        ({"topology": "dragonfly"}, "parallel.cp.topology = 'dragonfly': must be one of probe, nvswitch"),
    ],
)
def test_wrong_settings_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        CpConfig(**change)


def test_a_grid_of_another_size_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"a grid of 4 ranks, and a bucket is spread over 8.*schedule_of\.8"):
        CpConfig(schedule="query=4").named_grid(8)
    with pytest.raises(ValueError, match=r"parallel\.cp\.schedule_of\.8 = 'query=4': is a grid of 4 ranks"):
        CpConfig(schedule_of={"8": "query=4"}).named_grid(8)
