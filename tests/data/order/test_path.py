"""The path against a direct, quadratic transcription of the paper's algorithm."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.order import path
from longring.data.order.path import (
    NO_NEIGHBOR,
    document_order,
    greedy_path,
    make_graph,
    nearest_groups,
    random_order,
    remove_dropped,
)


@st.composite
def lists(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw neighbour lists [n, k], symmetric cosines of few values (so that there are ties), and dropped documents."""
    n, k = draw(st.integers(1, 14)), draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    similarity = generator.integers(-2, 5, (n, n)).astype(np.float32) / 8
    similarity = np.maximum(similarity, similarity.T)
    ids = np.full((n, k), NO_NEIGHBOR, dtype=np.uint32)
    cosines = np.full((n, k), -np.inf, dtype=np.float32)
    for document in range(n):
        others = generator.permutation(np.delete(np.arange(n), document))
        listed = others[: generator.integers(0, k + 1)]
        # Holes may lie anywhere.
        slots = generator.permutation(k)[: len(listed)]
        ids[document, slots], cosines[document, slots] = listed, similarity[document, listed]
    return ids, cosines, generator.random(n) < draw(st.sampled_from([0.0, 0.3]))


def transcribed(ids: np.ndarray, cosines: np.ndarray, dropped: np.ndarray) -> tuple[list[int], list[float]]:
    """Return the path of Algorithm 1: an edge where either lists the other, jumps to minimum degree."""
    documents = [document for document in range(len(ids)) if not dropped[document]]
    edges: dict[int, dict[int, float]] = {document: {} for document in documents}
    for one in documents:
        for other, cosine in zip(ids[one].tolist(), cosines[one].tolist(), strict=True):
            if other in edges:
                edges[one][other] = edges[other][one] = cosine
    left, found, steps = set(documents), [], []
    while left:
        document, step = min(left, key=lambda one: (len(edges[one]), one)), float("nan")
        while True:
            found.append(document)
            steps.append(step)
            left.remove(document)
            neighbors = [other for other in edges[document] if other in left]
            if not neighbors:
                break
            here = edges[document]
            following = min(neighbors, key=lambda other: (-here[other], other))
            document, step = following, here[following]
    return found, steps


def walked(ids: np.ndarray, cosines: np.ndarray, dropped: np.ndarray, file: Path) -> np.ndarray:
    ids = ids.copy()
    remove_dropped(ids, dropped)
    for _ in greedy_path(make_graph(ids, cosines), dropped, file):
        pass
    return np.fromfile(file, dtype=path.STEP_DTYPE)


@settings(max_examples=300)
@given(found=lists())
def test_is_the_papers_algorithm(found: tuple[np.ndarray, np.ndarray, np.ndarray]):
    with tempfile.TemporaryDirectory() as temporary:
        steps = walked(*found, Path(temporary, "path"))
    documents, similarities = transcribed(*found)
    assert steps["document"].tolist() == documents
    assert sorted(documents) == np.flatnonzero(~found[2]).tolist()
    np.testing.assert_array_equal(steps["similarity"], np.array(similarities, dtype=np.float32))
    # As a search gives them: int64, -1 for no neighbour, and each document the nearest to itself.
    ids, cosines, dropped = found
    own = np.arange(len(ids))[:, None]
    lists = np.hstack([own, np.where(ids == NO_NEIGHBOR, -1, ids.astype(np.int64))])
    order, similar = document_order(lists, np.hstack([np.ones_like(own, dtype=np.float32), cosines]), dropped)
    np.testing.assert_array_equal(order, steps["document"])
    np.testing.assert_array_equal(similar, steps["similarity"])


@pytest.mark.parametrize(
    ("advice", "wrong", "right"),
    [("give a row for each document", np.zeros((3, 1)), np.zeros((2, 1))),
     ("give -1 where there is no neighbour", [[1], [2]], [[1], [-1]]),
     (r"neighbors\[1\] = \[0, 0\]: lists document 0 twice; give -1 instead of the second",
      [[-1, 1], [0, 0]], [[-1, 1], [0, -1]])],
)  # fmt: skip
def test_lists_that_are_no_graph_are_refused(advice: str, wrong: list[list[int]], right: list[list[int]]):
    similarities = np.ones_like(right, dtype=np.float32)
    with pytest.raises(ValueError, match=advice):
        document_order(np.array(wrong, dtype=np.int64), similarities)
    assert sorted(document_order(np.array(right, dtype=np.int64), similarities)[0].tolist()) == [0, 1]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_similarity_that_is_not_finite_is_refused_unless_there_is_no_neighbour(wrong):
    neighbors, similarities = np.array([[1, 2], [0, -1], [0, -1]]), np.array([[0.5, wrong], [0.5, wrong], [0.1, wrong]])
    with pytest.raises(
        ValueError, match=r"\[0, 1\] = .*: must be finite, since .* = 2; give -1 there if it is no neigh"
    ):
        document_order(neighbors, similarities)
    neighbors[0, 1] = -1
    assert document_order(neighbors, similarities)[0].tolist() == [1, 0, 2]


@settings(max_examples=100)
@given(found=lists())
def test_degrees_and_edges_are_the_undirected_graphs(found: tuple[np.ndarray, np.ndarray, np.ndarray]):
    ids, cosines, _ = found
    graph = make_graph(ids, cosines)
    pairs = {(one, int(other)) for one in range(len(ids)) for other in ids[one] if other != NO_NEIGHBOR}
    pairs |= {(other, one) for one, other in pairs}
    for document in range(len(ids)):
        mine = [int(other) for other in ids[document] if other != NO_NEIGHBOR]
        mine += graph.listed_by[graph.first[document] : graph.first[document + 1]].tolist()
        assert sorted(mine) == sorted(other for one, other in pairs if one == document), "each edge once at either end"
        assert graph.degrees[document] == len(mine)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 13])
def test_stopped_anywhere_and_continued_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int):
    generator = np.random.default_rng(1)
    ids = np.array([generator.permutation(np.delete(np.arange(40), one))[:3] for one in range(40)], dtype=np.uint32)
    cosines, dropped = generator.random((40, 3)).astype(np.float32), np.zeros(40, dtype=np.bool_)
    dropped[[3, 30]] = True
    whole = walked(ids, cosines, dropped, tmp_path / "whole")
    monkeypatch.setattr(path, "CHECKPOINT_STEPS", steps)
    ids = ids.copy()
    remove_dropped(ids, dropped)
    for number, done in enumerate(greedy_path(make_graph(ids, cosines), dropped, tmp_path / "file"), start=1):
        assert done == min(38, steps * number) == (tmp_path / "file").stat().st_size // 8
        if number == 2:
            break
    with (tmp_path / "file").open("ab") as file:
        file.write(b"\1\2\3")  # a step cut short
    rest = list(greedy_path(make_graph(ids, cosines), dropped, tmp_path / "file"))
    assert rest == ([*range(3 * steps, 38, steps), 38] if 2 * steps < 38 else [])
    assert (tmp_path / "file").read_bytes() == whole.tobytes()
    assert list(greedy_path(make_graph(ids, cosines), dropped, tmp_path / "file")) == []


@settings(max_examples=100)
@given(found=lists(), seed=st.integers(0, 5))
def test_baselines_are_permutations(found: tuple[np.ndarray, np.ndarray, np.ndarray], seed: int):
    ids, _, dropped = found
    remove_dropped(ids, dropped)
    order = random_order(len(ids), dropped, seed)
    groups = nearest_groups(ids, dropped, seed)
    assert sorted(order.tolist()) == sorted(groups.tolist()) == np.flatnonzero(~dropped).tolist()
    # Each document that is left, in random order, then those it lists that are left.
    expected: list[int] = []
    for document in order.tolist():
        for other in [document, *ids[document].tolist()] if document not in expected else []:
            if other != NO_NEIGHBOR and other not in expected:
                expected.append(other)
    assert groups.tolist() == expected
