"""The report of an ordering, `order.json`, which `longring inspect` shows (inspect/ordered.py)."""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..files import write_text
from ..format.first_line import FIRST_LINE_TOKENS, first_line
from ..format.manifest import REPORT_FILE
from ..order_config import OrderConfig
from .contexts import Layout, layout_folder, stored
from .documents import Documents
from .neighbors import Embeddings
from .path import NO_NEIGHBOR

SAMPLED_CONTEXTS = 256
"""Number of contexts of each bucket whose cosines are measured."""
SHOWN_DOCUMENTS = 6
"""Number of documents whose neighbours are shown."""
SHOWN_NEIGHBORS = 3
"""Number of neighbours shown for each of these documents."""


def make_report(
    data: DataConfig,
    order: OrderConfig,
    documents: Documents,
    embeddings: Embeddings,
    partial: Path,
    path: NDArray[np.void],
    lists: Iterable[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]],
    measured: dict[str, Any],
) -> None:
    """Write `order.json` to `partial`: results `measured` by earlier stages, path steps, contexts and some neighbours.

    `path` is STEP_DTYPE [steps]; `lists` yields documents [n], their neighbours [n, k] and cosines [n, k].
    """
    similarity = path["similarity"]
    steps = similarity[~np.isnan(similarity)]  # without jumps
    counts, edges = np.histogram(np.clip(steps, -1, 1), bins=20, range=(0, 1))
    counts[0] += int(np.count_nonzero(steps < 0))  # the range leaves these out
    report = {
        **measured,
        "path": {
            "documents": len(path),
            "jumps": int(np.count_nonzero(np.isnan(similarity))),
            "mean_similarity": float(steps.mean(dtype=np.float64)) if len(steps) else 0.0,
            "cosine_from": [round(float(edge), 2) for edge in edges[:-1]],
            "steps": counts.tolist(),
        },
        "contexts": context_similarity(data, order, len(documents.manifest.sources), embeddings, partial),
        "neighbors": _neighbor_pairs(documents, lists),
    }
    write_text(partial / REPORT_FILE, json.dumps(report, indent=1) + "\n")


def context_similarity(
    data: DataConfig, order: OrderConfig, num_sources: int, embeddings: Embeddings, partial: Path
) -> dict[str, float]:
    """Return the mean cosine of two documents of one train context, and of two contexts that are stored side by side.

    Up to SAMPLED_CONTEXTS joined contexts of each bucket of each source are measured, evenly spaced. "documents" is
    their mean number of documents.
    """
    inside, across, sizes = [], [], []
    for source, length in product(range(num_sources), order.lengths(data)):
        layout = Layout.load(layout_folder(partial, source), "train", order.lengths(data))
        own, count = len(layout.own[length]), layout.sequences(length)
        if not len(layout.contexts[length]):
            continue
        indices = np.unique(np.linspace(0, count - 1, SAMPLED_CONTEXTS).astype(np.int64))
        for index in indices.tolist():
            # Two sequences that are stored side by side, as numbers of contexts; a negative one is a piece of its own.
            two = stored(layout, length, order.seed, "train", np.arange(index, min(index + 2, count))) - own
            vectors = [embeddings[_documents(layout, length, context)] for context in two.tolist() if context >= 0]
            if two[0] < 0:
                continue
            first = vectors[0]  # [documents, dimensions]
            sizes.append(len(first))
            if len(first) > 1:
                cosines = first @ first.T  # [documents, documents], 1 on the diagonal
                inside.append((cosines.sum() - np.trace(cosines)) / (len(first) * (len(first) - 1)))
            if len(vectors) == 2:
                across.append((first @ vectors[1].T).mean())
    return {
        "inside": float(np.mean(inside)) if inside else float("nan"),
        "across": float(np.mean(across)) if across else float("nan"),
        "documents": float(np.mean(sizes)) if sizes else 0.0,
    }


def _documents(layout: Layout, length: int, context: int) -> NDArray[np.int64]:
    """Return the distinct documents of a joined context, ascending."""
    first = int(layout.contexts[length][context])
    begin = int(np.searchsorted(layout.starts, first, side="right")) - 1
    end = int(np.searchsorted(layout.starts, min(first + length, int(layout.starts[-1]))))
    return np.unique(layout.members["document"][begin:end].astype(np.int64))


def _neighbor_pairs(
    documents: Documents, lists: Iterable[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]
) -> list[dict[str, Any]]:
    """Return SHOWN_DOCUMENTS documents, evenly spaced, with their nearest neighbours."""
    wanted = set(np.unique(np.linspace(0, len(documents) - 1, SHOWN_DOCUMENTS).astype(np.int64)).tolist())
    found = []
    for numbers, ids, cosines in lists:
        for row in np.flatnonzero(np.isin(numbers, list(wanted))).tolist():
            nearest = [
                {"similarity": float(cosine), **describe(documents, int(other))}
                for other, cosine in zip(ids[row, :SHOWN_NEIGHBORS], cosines[row], strict=False)
                if other != NO_NEIGHBOR
            ]
            found.append({**describe(documents, int(numbers[row])), "neighbors": nearest})
    return found


def describe(documents: Documents, number: int) -> dict[str, str]:
    """Return the title of a document, which names its record and file, and its first line."""
    shard, _ = documents.locate(number)
    entry = documents.entry(number)
    record = int(entry["record"])
    tokens = documents.tokens(number, 0, min(int(entry["pairs"]), FIRST_LINE_TOKENS))[1:]
    return {"title": documents.manifest.origin(shard, record), "first_line": first_line(documents.manifest, tokens)}
