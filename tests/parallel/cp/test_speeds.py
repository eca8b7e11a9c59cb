"""Speeds of attention: those of a record if the device has one, else assumed ones."""

from __future__ import annotations

import json
from pathlib import Path

from longring.launch.config import load_recipe
from longring.launch.fit.device import named_device
from longring.launch.flops import peak_flops
from longring.launch.grids.measure import named_topology
from longring.parallel.cp import speeds
from longring.parallel.cp.cost import ASSUMED, Speed
from longring.parallel.cp.speeds import ASSUMED_BY_BACKEND, speed_of

H100 = "NVIDIA H100 80GB HBM3"
DEMO = Path(__file__).parents[3] / "launch" / "recipes" / "demo.toml"


def test_a_device_without_a_record_has_the_assumed_speed_of_the_kernel():
    assert speed_of("unknown") == (ASSUMED, "assumed")
    assert speed_of("unknown", "triton") == (ASSUMED_BY_BACKEND["triton"], "assumed")
    assert speed_of("unknown", "cudnn") == (ASSUMED, "assumed")
    assert (
        named_topology("full_mesh", load_recipe(DEMO, ["train.attention_backend=triton"]), 4)[1]
        == (ASSUMED_BY_BACKEND["triton"])
    )


def test_a_record_gives_the_speed_of_its_device_alone(monkeypatch, tmp_path):
    recorded = {"forward_flops": 6e14, "backward_flops": 5e14, "tile_s": 2e-5}
    (tmp_path / "speeds.json").write_text(json.dumps({H100: {"auto": {"speed": recorded, "record": "a.json"}}}))
    monkeypatch.setattr(speeds, "FILE", tmp_path / "speeds.json")
    speeds.measured_speeds.cache_clear()
    try:
        assert speed_of(H100) == (Speed(**recorded), "a.json")
        assert speed_of(H100, "triton") == (ASSUMED_BY_BACKEND["triton"], "assumed")
        assert named_topology("full_mesh", load_recipe(DEMO), 4, H100)[1] == Speed(**recorded)
        assert named_device("h100").attention == Speed(**recorded)
        a100, h100 = peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops(H100)
        assert a100 and h100
        assert named_device("a100").attention.forward_flops == ASSUMED.forward_flops * a100 / h100
    finally:
        speeds.measured_speeds.cache_clear()
