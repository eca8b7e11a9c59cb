"""The picture of prepared data: lengths of documents, tokens by bucket, and the curriculum of a run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files and needs no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ..format.manifest import Manifest
from ..read.batch_order import BatchOrder

CURRICULUM_BINS = 100
"""Maximum number of stretches of a run, all but the last equal, in which the curriculum is drawn."""
MIX_BINS = 50
"""Maximum number of stretches in which the shares of sources are drawn."""


def draw(manifest: Manifest, order: BatchOrder, file: Path) -> None:
    """Write the picture of the data and of the curriculum of a run."""
    figure = plt.figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([["documents", "buckets"], ["curriculum", "curriculum"]])
    _draw_documents(axes["documents"], manifest)
    colours = plt.colormaps["viridis"](np.linspace(0.1, 0.9, len(manifest.lengths)))
    names = [f"{length:,}" for length in manifest.lengths]

    tokens = [bucket.tokens for bucket in manifest.buckets("train")]
    axes["buckets"].bar(names, tokens, color=colours)
    axes["buckets"].set_xlabel("bucket, tokens")
    axes["buckets"].set_ylabel("tokens")
    axes["buckets"].set_title("Train split by bucket")
    axes["buckets"].tick_params(axis="x", rotation=45 if len(names) > 6 else 0)

    draw_by_bucket(axes["curriculum"], order)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_mix(order: BatchOrder, file: Path) -> None:
    """Write the picture of a run's mix: the shares of its tokens by bucket and by source over its steps."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(10, 6.5), layout="constrained")
    draw_by_bucket(above, order)
    above.set_xlabel("")
    edges = _edges(len(order.slots), MIX_BINS)
    # [edges, sources]: tokens of each source in the steps before.
    lengths = np.array(order.lengths)
    given = np.diff([lengths @ order.given(int(edge)) for edge in edges], axis=0)  # [bins, sources]
    sources = [part.source for part in order.orders[0].parts]
    _draw_stacked(below, edges, (given / given.sum(axis=1, keepdims=True)).T, sources, "tab20")
    below.set_title("Source of the tokens")
    below.legend(title="source", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize="small")
    below.set_xlabel("step")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_by_bucket(axes: Axes, order: BatchOrder) -> None:
    """Draw the share of each bucket in the tokens of equal stretches of a run."""
    edges = _edges(len(order.slots), CURRICULUM_BINS)
    parts = np.split(order.slots, edges[1:-1])  # [bins][steps of the bin, slots of a step]
    # [bucket, bin]
    shares = np.array([np.bincount(part.ravel(), minlength=len(order.lengths)) / part.size for part in parts]).T
    _draw_stacked(axes, edges, shares, [f"{length:,}" for length in order.lengths], "viridis")
    axes.set_xlabel("step")
    axes.set_title("Curriculum: bucket of the tokens")
    axes.legend(title="bucket", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize="small")


def _edges(steps: int, bins: int) -> NDArray[np.int64]:
    """Return the bounds of at most `bins` stretches of a run: the number of steps before each, and all at the end."""
    return np.array([*range(0, steps, -(-steps // bins)), steps])


def _draw_stacked(
    axes: Axes, edges: NDArray[np.int64], shares: NDArray[np.float64], names: Sequence[str], colours: str
) -> None:
    """Draw `shares` [names, bins] as stacked bars between `edges` [bins + 1]."""
    below = np.zeros(len(edges) - 1)
    chosen = plt.colormaps[colours](np.linspace(0.1, 0.9, len(names)))
    # `below` [bins] is the height reached by the names before.
    for share, colour, name in zip(shares, chosen, names, strict=True):
        axes.bar(edges[:-1], share, np.diff(edges), below, align="edge", color=colour, label=name)
        below += share
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of tokens")


def _draw_documents(axes: Axes, manifest: Manifest) -> None:
    """Draw the shares of documents and of tokens by the length of the document, in powers of two."""
    splits = list(manifest.ledger.splits.values())
    powers = sorted(set().union(*(split.document_lengths for split in splits)))
    # Powers between that no document has are drawn too, as gaps.
    powers = list(range(powers[0], powers[-1] + 1))
    documents = np.array([sum(split.document_lengths[power] for split in splits) for power in powers])
    tokens = np.array([sum(split.length_tokens[power] for split in splits) for power in powers])
    axes.bar(np.array(powers) - 0.2, documents / documents.sum(), 0.4, label="documents", color="0.6")
    axes.bar(np.array(powers) + 0.2, tokens / tokens.sum(), 0.4, label="tokens in them", color="tab:blue")
    axes.set_xticks(powers, labels=[f"$2^{{{power}}}$" for power in powers])
    axes.set_xlabel("tokens of a document, at least")
    axes.set_ylabel("share")
    axes.set_title("Documents by length")
    axes.legend(fontsize="small")
