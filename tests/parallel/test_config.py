"""Settings under [parallel]."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from longring.parallel.config import CpConfig, ParallelConfig, ZeroConfig
from longring.parallel.cp.grid import NAMED, CpGrid, grids
from longring.parallel.device import this_device
from longring.parallel.world import World
from longring.parallel.zero import deepspeed_config


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
        ({"schedule": "query=two"}, "query = 'two': must be a whole number; leave it out for 1"),
        (
            {"schedule": "query=2, query_route=straight"},
            "query_route = 'straight': must be one of round, ",
        ),
        ({"schedule_of": {"4": "ringg"}}, "parallel.cp.schedule_of.4 = 'ringg'"),
        ({"schedule_of": {"four": "ring"}}, "schedule_of.four = 'ring': the key must be a number of ranks; write it"),
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


@pytest.mark.parametrize(
    ("change", "stage", "right"),
    [
        ({"offload_param": "cpu"}, 2, "3"),
        ({"offload_optimizer": "cpu"}, 0, "1 or 2 or 3"),
        ({"allgather_bucket_size": 2**20}, 3, "1 or 2"),
        ({"zero_quantized_weights": True}, 1, "3"),
    ],
)
def test_a_setting_of_another_stage_is_refused_and_the_advice_works(change, stage, right):
    [(name, value)] = change.items()
    said = (
        f"parallel.zero.{name} = {value!r}: has no effect with parallel.zero_stage = {stage}; remove it, or set "
        f"parallel.zero_stage to {right}"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        ParallelConfig(tokens_per_rank=1, zero_stage=stage, zero=ZeroConfig(**change))
    ParallelConfig(tokens_per_rank=1, zero_stage=stage)
    for other in right.split(" or "):
        ParallelConfig(tokens_per_rank=1, zero_stage=int(other), zero=ZeroConfig(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantized_collectives_are_refused_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world = World(0, 1, 0, 1, "localhost", 1, hosted=False)
    for value, refused in ((True, True), (False, False)):
        config = ParallelConfig(tokens_per_rank=1, zero_stage=3, zero=ZeroConfig(**{name: value}))  # type: ignore[arg-type]
        advice = "need GPUs; set it to false on a machine without them"
        with pytest.raises(ValueError, match=f"parallel.zero.{name} = True: .* {advice}") if refused else nullcontext():
            assert this_device(config, world, 10).type == "cpu"


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_takes_every_setting_by_its_name(stage):
    """Its configuration refuses names that it does not know; what it understands is what was set."""
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    config = ParallelConfig(tokens_per_rank=1, zero_stage=stage)
    settings = deepspeed_config(config, "bfloat16", "float32")["zero_optimization"]
    found = zero_config.get_zero_config({"zero_optimization": settings})
    known = found.model_dump(by_alias=True)
    assert found.stage == stage and set(settings) <= set(known)
    for name, value in settings.items():
        assert known[name]["device"] == value["device"] if name.startswith("offload") else known[name] == value
