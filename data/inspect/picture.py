"""The picture of prepared data: lengths of documents, tokens by bucket, and the curriculum of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files and needs no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ..format.manifest import Manifest

CURRICULUM_BINS = 100
"""Number of equal stretches of a run in which the curriculum is drawn."""


def draw(manifest: Manifest, buckets: NDArray[np.uint8], file: Path) -> None:
    """Write the picture of the data and of a curriculum; `buckets` [steps] is the bucket of each step."""
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

    # [bucket, bin]: share of each bucket in the steps of equal stretches of the run.
    parts = np.array_split(buckets, min(CURRICULUM_BINS, len(buckets)))
    shares = np.array([np.bincount(part, minlength=len(names)) / len(part) for part in parts]).T
    edges = np.linspace(0, len(buckets), len(parts) + 1)
    below = np.zeros(len(parts))
    # Bars are stacked: `below` [bins] is the height reached by the shorter buckets.
    for share, colour, name in zip(shares, colours, names, strict=True):
        axes["curriculum"].bar(edges[:-1], share, np.diff(edges), below, align="edge", color=colour, label=name)
        below += share
    axes["curriculum"].set_xlim(0, len(buckets))
    axes["curriculum"].set_ylim(0, 1)
    axes["curriculum"].set_xlabel("step")
    axes["curriculum"].set_ylabel("share of steps")
    axes["curriculum"].set_title("Curriculum: bucket of the steps")
    axes["curriculum"].legend(
        title="bucket", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize="small"
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_documents(axes: Axes, manifest: Manifest) -> None:
    """Draw the shares of documents and of tokens by the length of the document, in powers of two."""
    splits = list(manifest.ledger.splits.values())
    powers = sorted(set().union(*(split.document_lengths for split in splits)))
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
