"""Links that a message takes: by hand for every kind of fabric, and as properties."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from longring.parallel.cp.topology import GB, PRESETS, Fabric, Topology, ethernet, infiniband, pcie_pairs

SWITCH, MESH, RING = (Fabric(kind, 5.0, 0.25) for kind in ("switch", "mesh", "ring"))


def links(fabric: Fabric, size: int, source: int, target: int) -> list[tuple]:
    path = fabric.path(size, source, target, "name")
    assert path.bytes_per_s == fabric.bytes_per_s
    found = [link for link in path.links if isinstance(link, tuple)]
    assert len(found) == len(path.links)
    assert all(link[0] == "name" for link in found)
    return [link[1:] for link in found]


def test_switch_a_port_an_end():
    assert links(SWITCH, 4, 1, 3) == [("out", 1), ("in", 3)]
    assert SWITCH.path(4, 1, 3).latency_s == 0.25


def test_switch_two_ends_a_port():
    pairs = replace(SWITCH, ends_per_port=2)
    assert links(pairs, 8, 1, 6) == [("out", 0), ("in", 3)]
    assert links(pairs, 8, 0, 7) == [("out", 0), ("in", 3)]
    assert links(pairs, 8, 2, 3) == [("pair", 2, 3)], "ends of one port reach each other without it"
    assert links(pairs, 8, 3, 2) == [("pair", 3, 2)]


def test_mesh():
    assert links(MESH, 4, 1, 3) == [("link", 1, 3)]
    assert links(MESH, 4, 3, 1) == [("link", 3, 1)]
    assert MESH.path(4, 1, 3).latency_s == 0.25


def test_ring_goes_the_shorter_way():
    assert links(RING, 5, 3, 0) == [("link", 3, 4), ("link", 4, 0)]
    assert links(RING, 5, 0, 3) == [("link", 0, 4), ("link", 4, 3)]
    assert links(RING, 4, 3, 1) == [("link", 3, 0), ("link", 0, 1)], "if both ways are equally long, the one ahead"
    assert links(RING, 2, 1, 0) == [("link", 1, 0)]
    assert RING.path(5, 3, 0).latency_s == 0.5
    assert RING.path(5, 3, 4).latency_s == 0.25


def test_one_direction_at_a_time():
    """Without full duplex both directions are one link, and a port of a switch is one for in and out."""
    switch, mesh, ring = (replace(fabric, full_duplex=False) for fabric in (SWITCH, MESH, RING))
    assert links(switch, 4, 1, 3) == [("both ways", 1), ("both ways", 3)]
    assert links(mesh, 4, 3, 1) == links(mesh, 4, 1, 3) == [("both ways", 1, 3)]
    assert sorted(links(ring, 5, 3, 0)) == sorted(links(ring, 5, 0, 3)) == [("both ways", 0, 4), ("both ways", 3, 4)]
    behind = replace(switch, ends_per_port=2)
    assert links(behind, 4, 2, 3) == links(behind, 4, 3, 2) == [("both ways", 2, 3)]


def test_nodes():
    cluster = Topology("", 4, SWITCH, replace(SWITCH, bytes_per_s=1.0, ends_per_port=4))
    assert cluster.path(12, 5, 6).links == ((1, "out", 1), (1, "in", 2))
    assert cluster.path(12, 5, 6).bytes_per_s == 5.0
    assert cluster.path(12, 3, 4).links == (("across", "out", 0), ("across", "in", 1))
    assert cluster.path(12, 3, 4).bytes_per_s == 1.0
    assert cluster.path(12, 11, 2).links == (("across", "out", 2), ("across", "in", 0))


def test_a_ring_inside_a_node_closes_among_the_ranks_that_take_part():
    node = Topology("", 8, RING)
    assert node.path(4, 3, 0).links == ((0, "link", 3, 0),)
    assert len(node.path(8, 3, 0).links) == 3


def test_presets():
    assert pcie_pairs().path(8, 0, 2).links[0] == pcie_pairs().path(8, 1, 3).links[0]
    assert infiniband(16).path(16, 0, 8).links[0] != infiniband(16).path(16, 1, 9).links[0]
    assert ethernet(16).path(16, 0, 8).links[0] == ethernet(16).path(16, 1, 9).links[0]
    assert ethernet(16).path(16, 0, 8).bytes_per_s == 50 * GB
    for make in PRESETS.values():
        assert make(8).covers(8)
    assert infiniband(1024).covers(1024)
    assert not pcie_pairs().covers(9)


@st.composite
def routes(draw) -> tuple[Fabric, int, int, int]:
    size = draw(st.integers(2, 24))
    source = draw(st.integers(0, size - 1))
    target = draw(st.integers(0, size - 1).filter(lambda x: x != source))
    kind, ends = draw(st.sampled_from([("switch", 1), ("switch", 2), ("switch", 4), ("mesh", 1), ("ring", 1)]))
    return Fabric(kind, 1.0, 1.0, ends, draw(st.booleans())), size, source, target


@given(routes())
def test_every_way_is_short_and_mirrored(case):
    fabric, size, source, target = case
    path, back = fabric.path(size, source, target), fabric.path(size, target, source)
    assert path.links
    assert max(Counter(path.links).values()) == 1, "no link twice"
    shared = set(path.links) & set(back.links)
    assert shared == set() if fabric.full_duplex else fabric.kind == "ring" or shared == set(path.links)
    if fabric.kind == "ring":
        distance = min(abs(source - target), size - abs(source - target))
        assert len(path.links) == path.latency_s == distance


@pytest.mark.parametrize("kind", ["switch", "mesh", "ring"])
def test_links_of_two_names_are_two(kind):
    fabric = Fabric(kind, 1.0, 1.0)
    assert not set(fabric.path(4, 0, 1, "a").links) & set(fabric.path(4, 0, 1, "b").links)


def test_rings_inside_a_node_take_copies_and_larger_ones_do_not():
    topology = Topology("two nodes", 4, SWITCH, RING, copies=replace(MESH, bytes_per_s=9.0))
    assert topology.path(4, 1, 3).links == ((0, "link", 1, 3),)
    assert topology.path(2, 0, 1).bytes_per_s == 9.0
    assert topology.path(8, 1, 3) == replace(topology, copies=None).path(8, 1, 3)
