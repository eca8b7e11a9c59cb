"""Neighbours against the cosines of all pairs."""

from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from longring.data.order import neighbors
from longring.data.order.neighbors import Embeddings
from longring.data.order.path import NO_NEIGHBOR


def clustered(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors in clusters of ten."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(count // 10 + 1, dimensions))
    vectors = centres[np.arange(count) // 10] + 0.3 * generator.normal(size=(count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def embeddings(vectors: np.ndarray, folder: Path, shards: int) -> Embeddings:
    parts = np.array_split(vectors, shards)
    for number, part in enumerate(parts):
        np.save(folder / f"{number:06d}.npy", part)
    return Embeddings(folder, np.cumsum([0, *map(len, parts)]))


def all_nearest(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours by brute force: largest cosine first, equals by number, without the document itself."""
    cosines = np.einsum("nd,kd->nk", vectors.astype(np.float32), vectors.astype(np.float32))
    np.fill_diagonal(cosines, -np.inf)
    ids = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return ids, np.take_along_axis(cosines, ids, axis=1)


def test_vectors_are_read_in_any_order(tmp_path: Path):
    vectors = clustered(57, 8)
    found = embeddings(vectors, tmp_path, 5)
    numbers = np.random.default_rng(2).integers(0, 57, 100)
    assert found.dimensions == 8
    assert np.array_equal(found[numbers], vectors[numbers].astype(np.float32))


def test_exact_search_finds_all_nearest_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbors, "QUERIES_AT_ONCE", 16)
    vectors = clustered(120, 16)
    vectors[40:50] = vectors[40]  # more equal vectors than neighbours are asked for
    found = embeddings(vectors, tmp_path, 3)
    numbers = np.arange(120)
    ids, cosines = neighbors.nearest(neighbors.exact_index(found, numbers), found, numbers, 6, exact=True)
    expected_ids, expected = all_nearest(vectors, 6)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    distinct = ~np.isin(numbers, np.arange(40, 50))
    assert np.mean(ids[distinct] == expected_ids[distinct]) > 0.99, "but for cosines that differ by rounding alone"
    assert not np.any(ids == numbers[:, None])
    assert all(len(set(row)) == 6 for row in ids.tolist())


def test_cosines_are_the_same_from_either_side(tmp_path: Path):
    found = embeddings(clustered(200, 16), tmp_path, 2)
    numbers = np.arange(200)
    ids, cosines = neighbors.nearest(neighbors.exact_index(found, numbers), found, numbers, 8, exact=True)
    pairs = {
        (one, int(other)): value for one in range(200) for other, value in zip(ids[one], cosines[one], strict=True)
    }
    both = [(one, other) for one, other in pairs if (other, one) in pairs]
    assert len(both) > 500
    assert all(pairs[one, other] == pairs[other, one] for one, other in both)


def test_fewer_documents_than_neighbours_leave_places_empty(tmp_path: Path):
    found = embeddings(clustered(9, 4), tmp_path, 2)
    numbers = np.array([2, 4, 7])
    ids, cosines = neighbors.nearest(neighbors.exact_index(found, numbers), found, numbers, 5, exact=True)
    assert [set(row) for row in ids.tolist()] == [{4, 7, NO_NEIGHBOR}, {2, 7, NO_NEIGHBOR}, {2, 4, NO_NEIGHBOR}]
    assert np.array_equal(ids == NO_NEIGHBOR, np.isneginf(cosines))
    alone = np.array([4])
    ids, _ = neighbors.nearest(neighbors.exact_index(found, alone), found, alone, 5, exact=True)
    assert ids.tolist() == [[NO_NEIGHBOR] * 5]


@pytest.mark.parametrize(("gpus", "dimensions", "moves"), [(0, 24, 0), (1, 24, 2), (1, 21, 1)])
def test_ivf_pq_on_disk_finds_nearly_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, dimensions: int, moves: int
):
    """An index trained on a sample, filled in parts and merged on disk finds the neighbours.

    On "GPUs", with faiss' functions for them replaced, clustering runs there, and so does the search of codes of 8
    bytes, but not of 7.
    """
    moved: list[object] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus)
    monkeypatch.setattr(
        faiss, "index_cpu_to_all_gpus", lambda index, co=None: moved.append(index) or index, raising=False
    )
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", SimpleNamespace, raising=False)
    vectors = clustered(3_000, dimensions)
    found = embeddings(vectors, tmp_path, 4)
    numbers = np.arange(0, 3_000, 2)  # one split's
    trained, merged = tmp_path / "trained.faiss", tmp_path / "merged.faiss"
    neighbors.train_index(found, numbers, trained)
    parts = []
    for number, part in enumerate(np.array_split(numbers, 4)):
        parts.append(tmp_path / f"part{number}.faiss")
        neighbors.fill_index(trained, found[part], part, parts[-1])
    neighbors.merge_index(trained, parts, tmp_path / "merged.lists", merged)
    index = neighbors.merged_index(merged)
    assert index.ntotal == 1_500
    assert len(moved) == moves
    ids, cosines = neighbors.nearest(index, found, numbers, 4, exact=False)
    expected_ids, expected = all_nearest(vectors[numbers], 4)
    assert not np.any(ids == numbers[:, None])
    found_share = np.mean(
        [
            len(set(one) & set(other)) / 4
            for one, other in zip(ids.tolist(), numbers[expected_ids].tolist(), strict=True)
        ]
    )
    assert found_share > 0.9
    hits, exact = neighbors.recall(found, numbers, lambda document: ids[document // 2], 4, at_once=97)
    assert hits / exact == pytest.approx(found_share, abs=0.05)
    # Cosines are those of the vectors, not of their codes.
    same = ids == numbers[expected_ids]
    np.testing.assert_allclose(cosines[same], expected[same], atol=1e-6)


def test_recall_is_that_of_the_exact_neighbours(tmp_path: Path):
    vectors = clustered(100, 8)
    found = embeddings(vectors, tmp_path, 2)
    expected, _ = all_nearest(vectors, 5)
    numbers = np.arange(100)
    assert neighbors.recall(found, numbers, lambda one: expected[one], 5, at_once=7) == (500, 500)
    assert neighbors.recall(found, numbers, lambda one: expected[one, 2:], 5, at_once=13) == (300, 500)


@pytest.mark.parametrize(("documents", "lists"), [(235_266_464, 32_768), (1_000_000, 2_048), (10_000, 256)])
def test_the_papers_settings_are_scaled(documents: int, lists: int):
    assert neighbors.num_lists(documents) == lists
    assert neighbors.SAMPLES_PER_LIST * 32_768 == 1_572_864
    assert [neighbors.code_bytes(d) for d in (768, 384, 128, 7)] == [256, 128, 32, 1]
