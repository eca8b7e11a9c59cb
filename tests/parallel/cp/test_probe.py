"""The probe: fits of times from a simulator written for this test, and a real run over gloo."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.lanes import by_lane
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.parallel.cp.cost import Speed
from longring.parallel.cp.fit import FEW, Fit, Timing, fabrics, fit, patterns
from longring.parallel.cp.group import CommunicatorOptions
from longring.parallel.cp.host_memory import HostQueue
from longring.parallel.cp.probe import Probe, from_json, probe
from longring.parallel.cp.topology import Fabric, Topology

LARGE, SMALL = 1_000_000, 8


def wires(fabric: Fabric, size: int, source: int, target: int) -> Sequence[object]:
    """Return the wires that a message takes, computed independently of `topology`."""
    if fabric.kind == "mesh":
        passed = [(source, target)]
    elif fabric.kind == "ring":
        ways = [[(source + way * hop) % size for hop in range(size)] for way in (1, -1)]
        ways = [way[: way.index(target) + 1] for way in ways]
        short = min(ways, key=len)
        passed = list(pairwise(short))
    else:
        ends = fabric.ends_per_port
        if source // ends == target // ends:
            passed = [(source, target)]
        elif fabric.full_duplex:
            return [f"from port {source // ends}", f"to port {target // ends}"]
        else:
            return [f"port {source // ends}", f"port {target // ends}"]
    return passed if fabric.full_duplex else [frozenset(pair) for pair in passed]


def simulated(fabric: Fabric, size: int, messages, num_bytes: int) -> float:
    """Return the time until the last message arrives; rates are max-min fair (progressive filling) at every moment."""
    routes = [wires(fabric, size, *message) for message in messages]
    left = dict.fromkeys(range(len(routes)), float(num_bytes))
    now = 0.0
    while left:
        rate: dict[int, float] = {}
        capacity = {wire: fabric.bytes_per_s for route in routes for wire in route}
        while len(rate) < len(left):
            using = {w: [m for m in left if m not in rate and w in routes[m]] for w in capacity}
            share, wire = min((capacity[w] / len(ms), str(w)) for w, ms in using.items() if ms)
            [narrow] = [w for w in capacity if str(w) == wire]
            for m in using[narrow]:
                rate[m] = share
                for w in routes[m]:
                    capacity[w] -= share
        step = min(left[m] / rate[m] for m in left)
        now += step
        left = {m: x - step * rate[m] for m, x in left.items() if x - step * rate[m] > 1e-6 * num_bytes}
    hops = max(map(len, routes)) if fabric.kind == "ring" else 1
    return now + hops * fabric.latency_s


CASES = [
    *((size, 1, kind) for size in (2, 3, 4, 6, 8) for kind in fabrics(size)),
    *((size, width, kind) for size, width in ((2, 2), (2, 4), (4, 2), (4, 8), (3, 3)) for kind in fabrics(size, width)),
]


def name(case) -> str:
    size, width, kind = case
    return f"{size}x{width} {kind.kind}{kind.ends_per_port}{'' if kind.full_duplex else ' half'}"


@pytest.mark.parametrize(("size", "width", "kind"), CASES, ids=map(name, CASES))
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), bytes_per_s=st.floats(1e6, 5e11))
def test_a_fabric_is_identified_by_its_times(size, width, kind, seed, bytes_per_s):
    """The fit is right for any bandwidth, with 5% of noise on every time."""
    true = replace(kind, bytes_per_s=bytes_per_s, latency_s=LARGE / bytes_per_s / 50)
    noise = random.Random(seed)

    def timed(messages, num_bytes: int) -> float:
        return simulated(true, size * width, messages, num_bytes) * noise.uniform(0.95, 1.05)

    timings = [Timing(p, timed(p.messages, SMALL), timed(p.messages, LARGE)) for p in patterns(size, width)]
    fits = fit(timings, size * width, LARGE - SMALL, fabrics(size, width))
    best = fits[0].fabric
    assert (best.kind, best.ends_per_port, best.full_duplex) == (kind.kind, kind.ends_per_port, kind.full_duplex)
    assert math.isclose(best.bytes_per_s, bytes_per_s, rel_tol=0.1)
    assert math.isclose(best.latency_s, true.latency_s, rel_tol=0.1)
    assert fits[0].error < 0.06
    assert len(fits) == len(fabrics(size, width))


def test_a_shared_bus_shows_as_a_large_error():
    """No fabric describes ranks that all share one bandwidth: the best fit has a large error."""
    timings = [Timing(p, 1e-6, len(p.messages) * 1e-3) for p in patterns(4)]
    assert fit(timings, 4, LARGE, fabrics(4))[0].error > 0.1


def test_noise_larger_than_the_difference_still_gives_numbers():
    timings = [Timing(p, 2e-3, 1e-3) for p in patterns(4)]
    best = fit(timings, 4, LARGE, fabrics(4))[0].fabric
    assert 0 < best.bytes_per_s < math.inf
    assert best.latency_s == 2e-3


def test_one_pattern_that_is_slow_by_chance_does_not_set_the_latency():
    latency_s = 1e-6
    timings = [Timing(p, latency_s, 1e-3) for p in patterns(4)]
    timings[2] = timings[2]._replace(small_s=100 * latency_s)
    assert fit(timings, 4, LARGE, fabrics(4)[:1])[0].fabric.latency_s == pytest.approx(latency_s)


@given(size=st.integers(2, 40), width=st.integers(1, 8))
def test_patterns_are_few_and_within_bounds(size, width):
    found = patterns(size, width)
    assert len({p.messages for p in found}) == len({p.name for p in found}) == len(found) <= 13
    for pattern in found:
        for source, target in pattern.messages:
            assert 0 <= source < size * width
            assert 0 <= target < size * width
            assert source // width != target // width
            assert source % width == target % width


def test_patterns_of_1024_ranks_are_not_quadratic():
    for size, width in ((128, 8), (1024, 1)):
        assert max(len(p.messages) for p in patterns(size, width)) <= 10 * size * width
    assert len(max(patterns(FEW), key=lambda p: len(p.messages)).messages) == FEW * (FEW - 1)


def probed() -> Probe:
    return probe(4, 2, 16, torch.float32, torch.device("cpu"))


def on_nodes_of(local_size: int, measure: Callable[[], Probe] = probed) -> Probe:
    """Probe with torchrun's variables for nodes of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(local_size))
        patch.setenv("LOCAL_RANK", str(int(os.environ["RANK"]) % local_size))
        return measure()


def by_copies() -> Probe:
    return probe(4, 2, 16, torch.float32, torch.device("cpu"), options=CommunicatorOptions(peer_copies="always"))


def two_nodes() -> Probe:
    return on_nodes_of(2)


def uneven(told: list[int]) -> str:
    try:
        on_nodes_of(told[int(os.environ["RANK"])])
    except ValueError as error:
        return str(error)
    return ""


def copies_of_one_node_fail() -> str:
    """Probe two nodes; a rank of the second copies nothing. Return the error."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "3":
            patch.setattr(HostQueue, "copy", lambda *_: None)
        try:
            on_nodes_of(2, by_copies)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.full
def test_a_failure_of_one_node_is_an_error_of_all(on_ranks):
    """The other node does not wait in the first measurement. The advice is that of test_copies."""
    found = on_ranks(4, copies_of_one_node_fail)
    advice = 'set parallel.cp.peer_copies = "never"'
    assert found == 4 * [f"parallel.cp.peer_copies: rank 2: wrong bytes arrived from rank 3; {advice}"]


@pytest.mark.parametrize(
    ("measure", "num_nodes"), by_lane([(probed, 1), (by_copies, 1), (two_nodes, 2)], quick=[(two_nodes, 2)])
)
def test_four_processes_find_the_same(on_ranks, measure, num_nodes):
    found = on_ranks(4, measure)
    assert found == [found[0]] * 4
    topology, speed = found[0].topology, found[0].speed
    assert found[0].num_nodes == num_nodes
    assert topology.ranks_per_node == 4 // num_nodes
    assert topology.covers(4)
    assert (topology.across is None) == (num_nodes == 1)
    for fabric in filter(None, (topology.inside, topology.across, topology.copies)):
        assert 0 < fabric.bytes_per_s < math.inf
        assert 0 < fabric.latency_s < math.inf
    assert 0 < speed.forward_flops < math.inf
    assert 0 < speed.backward_flops < math.inf
    assert 0 <= speed.tile_s < math.inf
    assert [x.error for x in found[0].inside] == sorted(x.error for x in found[0].inside)
    assert (topology.copies is not None) == bool(found[0].copies) == (measure is by_copies)


def test_uneven_nodes_are_refused_by_all(on_ranks):
    """A layout that follows the advice, 2 ranks on each of 2 nodes, is in test_four_processes_find_the_same."""
    for message in on_ranks(4, uneven, [3, 3, 3, 1]):
        assert message.endswith("nodes have 1 to 3 ranks (LOCAL_WORLD_SIZE); start equally many on each node")
    for message in on_ranks(4, uneven, [3, 3, 3, 3]):
        assert "lie unevenly on nodes of 3 ranks; use equally many of each node, in order" in message


def test_one_rank_alone_is_refused(on_ranks):
    assert on_ranks(1, uneven, [1])[0].endswith("one rank alone has no links to measure; start 2 ranks or more")


@pytest.mark.full
def test_two_ranks_are_probed(on_ranks):
    assert on_ranks(2, uneven, [2, 2]) == ["", ""]


@pytest.mark.parametrize("copies", [None, Fabric("mesh", 7.0, 1e-6)])
@pytest.mark.parametrize("across", [None, Fabric("switch", 2.5, 1e-5, ends_per_port=4, full_duplex=False)])
def test_json(across, copies):
    inside = Fabric("ring", 1 / 3, 1e-6)
    fits = (Fit(inside, 0.25), Fit(replace(inside, kind="mesh"), 0.5))
    topology = Topology("probe", 4, inside, across, copies)
    found = Probe(topology, Speed(1e9, 2e9, 1e-4), 2, fits, fits[:1] if across else (), 1.5, fits[1:] if copies else ())
    assert from_json(found.to_json()) == found
