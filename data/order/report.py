"""What an ordering found, in `order.json`. How `longring inspect` shows it: show.py."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..format.manifest import Manifest
from ..order_config import OrderConfig
from .contexts import Layout, stored
from .documents import Documents
from .neighbors import Embeddings
from .path import NO_NEIGHBOR

REPORT_FILE = "order.json"
SAMPLED_CONTEXTS = 256
SHOWN_DOCUMENTS = 6
SHOWN_NEIGHBORS = 3
FIRST_LINE_TOKENS = 32


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
    """Write `order.json`."""
    similarity = path["similarity"]
    steps = similarity[~np.isnan(similarity)]
    counts, edges = np.histogram(np.clip(steps, -1, 1), bins=20, range=(0, 1))
    counts[0] += int(np.count_nonzero(steps < 0))
    report = {
        **measured,
        "path": {
            "documents": len(path),
            "jumps": int(np.count_nonzero(np.isnan(similarity))),
            "mean_similarity": float(steps.mean(dtype=np.float64)) if len(steps) else 0.0,
            "cosine_from": [round(float(edge), 2) for edge in edges[:-1]],
            "steps": counts.tolist(),
        },
        "contexts": context_similarity(data, order, embeddings, partial),
        "neighbors": _neighbor_pairs(documents, lists),
    }
    (partial / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def context_similarity(data: DataConfig, order: OrderConfig, embeddings: Embeddings, partial: Path) -> dict[str, float]:
    """Return the mean cosine of two documents of one train context, and of two of neighbouring ones as stored.

    Of joined contexts, evenly spaced, up to SAMPLED_CONTEXTS of each bucket.
    """
    layout = Layout.load(partial / "work" / "layout", "train", order.lengths(data))
    inside, across, sizes = [], [], []
    for length in order.lengths(data):
        own, count = len(layout.own[length]), layout.sequences(length)
        if not len(layout.contexts[length]):
            continue
        places = np.unique(np.linspace(0, count - 1, SAMPLED_CONTEXTS).astype(np.int64))
        for place in places.tolist():
            pair = stored(layout, length, order.seed, "train", np.arange(place, min(place + 2, count))) - own
            vectors = [embeddings[_documents(layout, length, one)] for one in pair.tolist() if one >= 0]
            if pair[0] < 0:
                continue
            first = vectors[0]
            sizes.append(len(first))
            if len(first) > 1:
                cosines = first @ first.T
                inside.append((cosines.sum() - np.trace(cosines)) / (len(first) * (len(first) - 1)))
            if len(vectors) == 2:
                across.append((first @ vectors[1].T).mean())
    return {
        "inside": float(np.mean(inside)) if inside else float("nan"),
        "across": float(np.mean(across)) if across else float("nan"),
        "documents": float(np.mean(sizes)) if sizes else 0.0,
    }


def _documents(layout: Layout, length: int, context: int) -> NDArray[np.int64]:
    """Return the documents of a joined context."""
    first = int(layout.contexts[length][context])
    begin = int(np.searchsorted(layout.starts, first, side="right")) - 1
    end = int(np.searchsorted(layout.starts, min(first + length, int(layout.starts[-1]))))
    return np.unique(layout.members["document"][begin:end].astype(np.int64))


def _neighbor_pairs(
    documents: Documents, lists: Iterable[tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]]
) -> list[dict[str, Any]]:
    """Return some documents, evenly spaced, with their nearest neighbours."""
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
    """Return a document's title (where it came from) and its first line."""
    shard, _ = documents.place(number)
    record = int(documents.entry(number)["record"])
    pairs = int(documents.entry(number)["pairs"])
    tokens = documents.tokens(number, 0, min(pairs, FIRST_LINE_TOKENS))[1:]
    return {"title": documents.manifest.origin(shard, record), "first_line": first_line(documents.manifest, tokens)}


def first_line(manifest: Manifest, tokens: NDArray[np.unsignedinteger]) -> str:
    """Return the first line that has letters of a document's first tokens."""
    text = manifest.tokenizer().tokenizer.decode([token for token in tokens.tolist() if token != manifest.boundary_id])
    return next((line.strip() for line in text.splitlines() if any(map(str.isalnum, line))), text.strip())
