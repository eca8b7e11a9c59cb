"""A start recalls the grids of an earlier start only if it divides attention in the same way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from longring.data.files import write_text
from longring.launch.config import load_recipe
from longring.launch.grids import decide
from longring.launch.grids.choice import LayerKind
from longring.launch.grids.decide import decide_grids, decide_links
from longring.launch.grids.remembered import recall_grids, recall_links, remember_links
from longring.parallel.cp.cost import Speed
from longring.parallel.cp.grid import CpGrid
from longring.parallel.cp.topology import Fabric, Topology, full_mesh
from longring.parallel.mesh import join

SIZE = 4
KEPT = "heads=2, in_flight=3"


def taken(recipe_file, directory: str, settings: list[str]) -> str:
    """Return the grid for sequences of 512 tokens on this rank."""
    recipe = load_recipe(recipe_file, [f"run_directory={directory}", "parallel.cp.topology=nvswitch", *settings])
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    return str(decide_grids(recipe, mesh, recipe.data.lengths)[LayerKind(512, None)])


@pytest.mark.full
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ([], None),
        (["parallel.zero_stage=3"], None),
        (["parallel.tokens_per_rank=128"], 4),
        (["parallel.tensor=2"], 2),
        (["parallel.cp.topology=full_mesh"], 2),
        (["parallel.cp.narrow_results=false"], 2),
    ],
    ids=["alike", "another ZeRO stage", "other ranks", "other heads", "another topology", "wider results"],
)
def test_grids_are_recalled_by_a_start_with_the_same_division(on_ranks, recipe_file, tmp_path, settings, size):
    first = ["parallel.tokens_per_rank=256"]
    assert KEPT not in on_ranks(SIZE, taken, recipe_file, str(tmp_path), first)
    file = tmp_path / "grids.json"
    [(division, entries)] = json.loads(file.read_text()).items()
    file.write_text(json.dumps({division: [{**entry, "grid": KEPT} for entry in entries]}))
    found = on_ranks(SIZE, taken, recipe_file, str(tmp_path), [*first, *settings])
    assert set(found) == {found[0]}
    if size is None:
        assert found[0] == KEPT
    else:
        assert found[0] != KEPT
        assert CpGrid.parse(found[0]).size == size
        assert len(json.loads(file.read_text())) == 2, "both divisions are kept"


def taken_though_prices_differ(recipe_file, directory: str) -> str:
    """Return the grid that this rank takes when every rank but rank 0 would choose another one."""
    choose = decide.choose_grids
    if dist.get_rank() != 0:
        decide.choose_grids = lambda *arguments: [
            choice._replace(taken=choice.others[0]) for choice in choose(*arguments)
        ]
    try:
        return taken(recipe_file, directory, ["parallel.tokens_per_rank=256"])
    finally:
        decide.choose_grids = choose


def test_all_ranks_take_the_grid_of_rank_0(on_ranks, recipe_file, tmp_path):
    """Ranks that measure the links would price grids differently."""
    [expected] = set(on_ranks(SIZE, taken, recipe_file, str(tmp_path / "alike"), ["parallel.tokens_per_rank=256"]))
    found = on_ranks(SIZE, taken_though_prices_differ, recipe_file, str(tmp_path / "apart"))
    assert found == [expected] * SIZE


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"of": [{"window": null}], "links, of": {"topology": {"inside": {"kind": 3}}}}']
)
def test_a_damaged_file_of_grids_is_reported(tmp_path, text):
    file = tmp_path / "grids.json"
    file.write_text(text)
    for recall in (recall_grids, recall_links):
        with pytest.raises(ValueError, match=f"{file}: damaged: .*; remove it"):
            recall(file, "of")


def refusal(recipe_file, directory: str, settings: list[str]) -> str:
    """Return the error of this rank when it decides about the grids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "measured_topology", lambda *_: (full_mesh(2), Speed(1e12, 1e12)))
        with pytest.raises((OSError, ValueError)) as raised:
            taken(recipe_file, directory, ["parallel.tokens_per_rank=256", *settings])
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("settings", "spoil", "said"),
    [
        ([], lambda run: write_text(run / "grids.json", "{"), "ValueError: .*grids.json: damaged: .*; remove it"),
        ([], lambda run: (run / "grids.json").mkdir(parents=True), "CommonError: .*Is a directory"),
        # A file in place of the directory: there is nothing to recall, and nothing can be written.
        ([], Path.touch, "CommonError: .*File exists"),
        (["parallel.cp.topology=probe"], Path.touch, "CommonError: .*File exists"),
    ],
    ids=["damaged", "unreadable", "grids not written", "links not written"],
)
def test_a_file_of_grids_that_rank_0_cannot_use_is_the_same_error_on_all_ranks(
    on_ranks, recipe_file, tmp_path, settings, spoil, said
):
    spoil(tmp_path / "run")
    [error] = set(on_ranks(2, refusal, recipe_file, str(tmp_path / "run"), settings))
    assert re.match(said, error), error


def links(recipe_file, directory: str, layout: str) -> list[tuple[Topology, Speed]]:
    """Return the links on which this rank prices layouts, asked for twice."""
    settings = [f"run_directory={directory}", "parallel.tokens_per_rank=256", f"parallel.cp.layout={layout}"]
    recipe = load_recipe(recipe_file, settings)
    mesh = join(recipe.parallel, recipe.max_context_parallel)
    return [decide_links(recipe, mesh) for _ in range(2)]


@pytest.mark.full
def test_links_are_measured_once_and_equal_on_all_ranks_and_starts(on_ranks, recipe_file, tmp_path):
    """Ranks price layouts without a word: a rank on other links could take another layout."""
    first = on_ranks(2, links, recipe_file, str(tmp_path), "auto")
    assert len({of for rank in first for of in rank}) == 1 and first[0][0][0].name == "probe"
    assert on_ranks(2, links, recipe_file, str(tmp_path), "auto") == first


def links_of_other_probes(recipe_file, directory: str) -> Speed:
    """Return the speed on which this rank prices layouts if every rank is in another probe."""
    speed = Speed(1e12 * (1 + dist.get_rank()), 1e12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "measured_topology", lambda *_: (full_mesh(2), speed))
        return links(recipe_file, directory, "auto")[0][1]


def test_tensor_parallel_ranks_price_layouts_on_the_links_of_one_probe(on_ranks, recipe_file, tmp_path):
    """They hold the same tokens, and each is in the probe of the data-parallel ranks beside it."""
    assert on_ranks(2, links_of_other_probes, recipe_file, str(tmp_path)) == [Speed(1e12, 1e12)] * 2


def test_links_are_recalled_whole(tmp_path):
    file, speed = tmp_path / "grids.json", Speed(1e12, 2e12, 1e-5)
    topology = Topology(
        "probe", 8, Fabric("mesh", 1e9, 1e-6), Fabric("switch", 1e8, 1e-5, 2), Fabric("ring", 2e9, 1e-7)
    )
    for of, kept in (("one", topology), ("other", replace(topology, across=None, copies=None))):
        assert recall_links(file, of) is None
        remember_links(file, of, kept, speed)
        assert recall_links(file, of) == (kept, speed)
        assert recall_grids(file, of) == {}
