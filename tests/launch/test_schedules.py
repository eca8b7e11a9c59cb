"""Which grid a run takes: for its ranks as they are now, not as they were at an earlier start."""

from __future__ import annotations

import json

import pytest
from longring.launch import schedules
from longring.launch.config import load_recipe
from longring.launch.schedules import Kind
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.topology import GB
from longring.parallel.mesh import join

SIZE = 4
KEPT = "heads=2, in_flight=3"


def taken(recipe_file, directory: str, settings: list[str]) -> str:
    """For sequences of 512 tokens, on this rank."""
    recipe = load_recipe(recipe_file, [f"run_directory={directory}", "parallel.cp.topology=nvswitch", *settings])
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    return str(schedules.agree(recipe, mesh, recipe.data.lengths, None)[Kind(512, None)])


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (["parallel.tokens_per_rank=256"], None),
        (["parallel.tokens_per_rank=128"], 4),
        (["parallel.tokens_per_rank=256", "parallel.tensor=2", "model.num_heads=2"], 2),
    ],
    ids=["fits", "of other ranks", "of other heads"],
)
def test_what_an_earlier_start_took_is_taken_again_where_it_fits(on_ranks, recipe_file, tmp_path, settings, size):
    kept = {str(SIZE): [{"sequence_tokens": 512, "window": None, "grid": KEPT}]}
    (tmp_path / "schedules.json").write_text(json.dumps(kept))
    found = on_ranks(SIZE, taken, recipe_file, str(tmp_path), settings)
    assert set(found) == {found[0]}
    if size is None:
        assert found[0] == KEPT
    else:
        assert found[0] != KEPT
        assert CpGrid.parse(found[0]).size == size


@pytest.mark.parametrize(("tensor", "ends", "gb_per_s"), [(1, 8, 50), (2, 4, 25), (8, 1, 50 / 8), (16, 1, 50 / 8)])
def test_a_node_s_port_is_divided_among_its_tensor_parallel_slices(recipe_file, tensor, ends, gb_per_s):
    """Of 8 ranks at a port, `ends` share a sequence; the others carry as much for theirs."""
    recipe = load_recipe(recipe_file, [f"parallel.tensor={tensor}", "model.num_heads=16", "model.num_kv_heads=16"])
    topology, _ = schedules.preset("ethernet", recipe, 64)
    assert topology.ranks_per_node == ends
    assert topology.across is not None
    assert (topology.across.ends_per_port, topology.across.bytes_per_s) == (ends, gb_per_s * GB)
    assert topology.inside.bytes_per_s == 450 * GB
    pairs = [topology.path(8, source, source + ends) for source in (0, ends)] if ends < 8 else []
    assert len({link for path in pairs for link in path.links}) == 2 * len(pairs), "neighbours by two other ports"


@pytest.mark.parametrize(("tensor", "ends", "gb_per_s"), [(1, 2, 32), (2, 1, 16), (4, 1, 16)])
def test_a_port_inside_a_node_is_divided_too(recipe_file, tensor, ends, gb_per_s):
    recipe = load_recipe(recipe_file, [f"parallel.tensor={tensor}", "model.num_kv_heads=4"])
    inside = schedules.preset("pcie_pairs", recipe, 8)[0].inside
    assert (inside.ends_per_port, inside.bytes_per_s) == (ends, gb_per_s * GB)
