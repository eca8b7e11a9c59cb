"""The search over settings against all of its space, one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from operator import mul

import pytest
from helpers.lanes import by_lane
from longring.launch.config import load_recipe
from longring.launch.fit.device import named_device
from longring.launch.fit.links import assumed_topology
from longring.launch.fit.search import Plan, Planner, Setting, with_longest
from longring.parallel.config import ZeroConfig

RANKS = 8


MIXES: dict[str, dict[int, int]] = {"the longest bucket alone": {}, "mostly short": {256: 90_000, 512: 10_000}}
"""Tokens that the run trains in each bucket."""


def planner_of(recipe_file, memory_bytes: float, *settings: str, mix: str = "the longest bucket alone") -> Planner:
    few = ["train.dtype=bfloat16", "data.min_bucket_tokens=256", "parallel.tokens_per_rank=256", *settings]
    device = replace(named_device("h100"), memory_bytes=memory_bytes)
    topology = assumed_topology("nvswitch", RANKS, "h100")
    return Planner(load_recipe(recipe_file, few), RANKS, 500, device, topology, MIXES[mix])


def all_that_fit(planner: Planner) -> list[Plan]:
    plans = [planner.plan(recipe) for _, recipe in planner.settings()]
    return [plan for plan in plans if plan.memory_bytes <= planner.device.memory_bytes]


def changes(planner: Planner, plan: Plan) -> dict[str, int | str]:
    return Setting.of(plan.recipe).changes(planner.recipe)


@pytest.fixture(scope="module")
def sizes(recipe_file) -> list[int]:
    """The memory of all settings, ascending."""
    planner = planner_of(recipe_file, 1e18)
    return sorted(plan.memory_bytes for plan in all_that_fit(planner))


CASES = list(product([0.02, 0.0, 0.3, 1.0], MIXES))


@pytest.mark.parametrize(("share", "mix"), by_lane(CASES, quick=[], slow=[CASES[0], *CASES[2:]]))
def test_the_best_and_the_nearest_are_those_of_the_whole_space(recipe_file, sizes, share, mix):
    memory = sizes[int(share * (len(sizes) - 1))]
    planner = planner_of(recipe_file, memory, "train.memory.activations=keep", mix=mix)
    fitting = all_that_fit(planner)
    assert fitting
    for plan in fitting:
        seconds, tokens = [b.time.total for b in plan.buckets], [planner.tokens.get(b.length, 0) for b in plan.buckets]
        mean = sum(map(mul, seconds, tokens)) / sum(tokens) if planner.tokens else seconds[-1]
        assert plan.seconds == pytest.approx(mean, rel=1e-12)
    best = [plan.seconds for plan in planner.three_best()]
    useful = [
        plan.seconds
        for plan in fitting
        if not any(
            other.seconds <= plan.seconds
            and changes(planner, other).items() <= changes(planner, plan).items()
            and changes(planner, other) != changes(planner, plan)
            for other in fitting
        )
    ]
    assert best == sorted(useful)[:3]
    nearest = planner.nearest()
    assert nearest is not None
    assert (len(changes(planner, nearest)), nearest.seconds) == min(
        (len(changes(planner, plan)), plan.seconds) for plan in fitting
    )
    longest, batch = planner.longest(), planner.recipe.train.global_batch_tokens
    assert longest is not None
    reached = [
        length
        for length in (256, 512, 1024, 2048, 4096)
        if length <= batch
        and any(
            planner.fits(planner.plan(recipe, [length]))
            for _, recipe in planner.settings(with_longest(planner.recipe, length))
        )
    ]
    assert longest.buckets[-1].length == max(reached)


def test_nothing_fits_a_device_without_memory(recipe_file):
    planner = planner_of(recipe_file, 1.0)
    assert (planner.three_best(), planner.nearest(), planner.longest()) == ([], None, None)


def test_a_setting_brings_what_it_needs(recipe_file):
    """A first tensor degree brings sequence parallelism; another stage drops the settings of the one before."""
    planner = planner_of(recipe_file, 1e18, "parallel.zero_stage=3", "parallel.zero.sub_group_size=1000")
    found = dict(planner.settings())
    of = Setting.of(planner.recipe)
    assert found[of] == planner.recipe
    assert found[of._replace(tensor=2)].parallel.sequence_parallel
    assert changes(planner, planner.plan(found[of._replace(tensor=2)])) == {
        "parallel.tensor": 2,
        "parallel.sequence_parallel": True,
    }
    assert found[of._replace(zero_stage=1)].parallel.zero == ZeroConfig()
    assert all(recipe.accumulation_steps(RANKS) for recipe in found.values())
    assert {setting.offload_param for setting in found if setting.zero_stage < 3} == {"none"}


def test_a_setting_has_grids_of_its_own_ranks(recipe_file):
    """A grid that the recipe names is of 2 ranks: no setting spreads a sequence over more, and the search ends."""
    planner = planner_of(recipe_file, 1e18, "parallel.cp.schedule=heads=2")
    assert {recipe.max_context_parallel for _, recipe in planner.settings()} == {1, 2}
    assert planner.three_best()
