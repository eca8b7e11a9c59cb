"""Speeds of attention: those of a record if the device has one, else assumed ones."""

from __future__ import annotations

import json
from dataclasses import replace
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


def test_the_speed_of_a_measured_choice_is_that_of_its_backends_of_whole_tiles(monkeypatch, tmp_path):
    cudnn, flash = ({"forward_flops": x, "backward_flops": x / 2, "tile_s": x / 1e20} for x in (6e14, 5e14))
    record = {
        H100: {name: {"speed": speed, "record": "a.json"} for name, speed in (("cudnn", cudnn), ("flash", flash))}
    }
    (tmp_path / "speeds.json").write_text(json.dumps(record))
    monkeypatch.setattr(speeds, "FILE", tmp_path / "speeds.json")
    speeds.measured_speeds.cache_clear()
    try:
        both = "triton; continued whole: cudnn; backward whole: flash; continued causal: flash"
        assert speed_of(H100, both) == (Speed(6e14, 2.5e14, 6e-6), "a.json")
        recipe = load_recipe(DEMO)
        measured = replace(recipe, train=replace(recipe.train, attention_backend=both))
        assert named_topology("full_mesh", measured, 4, H100)[1] == Speed(6e14, 2.5e14, 6e-6)
        triton = ASSUMED_BY_BACKEND["triton"]
        assert speed_of(H100, "triton; continued whole: cudnn") == (
            Speed(6e14, triton.backward_flops, 6e-6),
            "assumed",
        )
        assert speed_of("unknown", "triton; continued causal: cudnn") == (triton, "assumed")
    finally:
        speeds.measured_speeds.cache_clear()


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
        assert named_device("h100", "triton").attention == ASSUMED_BY_BACKEND["triton"]
        a100, h100 = peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops(H100)
        assert a100 and h100
        assert named_device("a100").attention.forward_flops == ASSUMED.forward_flops * a100 / h100
    finally:
        speeds.measured_speeds.cache_clear()
